"""What a kernel's module tells about the forms in which it is launched, so that they can be compiled without a GPU.

Every kernel's module has `cases(target) -> list[Case]` and is named in `MODULES`; `crosscompile` compiles them all.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# Targets for which every kernel must compile, and for which launchers have their tuning.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MODULES = ("low_rank", "moe", "mxfp4_decode", "routing")

# What matrix instructions a kernel must come out with. "wide" ones are those of a whole warpgroup on sm_90 and of
# tensor memory on sm_100, for which a product needs 64 rows; "any" are of a single warp (HMMA) or better.
TensorCores = Literal["none", "any", "wide"]


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel, as its launcher would ask for it."""

    name: str
    kernel: Any  # triton.JITFunction
    signature: Mapping[str, str]  # Triton's types, such as *u8 and i64, of the arguments that are no constants
    constants: Mapping[str, object] = field(default_factory=dict)
    aligned: Sequence[str] = ()  # pointers and sizes that are multiples of 16; without it loads are not vectorised
    options: Mapping[str, object] = field(default_factory=dict)  # num_warps, num_stages, ...
    tensor_cores: TensorCores = "none"
    blocks: int = 1  # that must fit on one multiprocessor, by registers and shared memory


def cases(target: str) -> list[Case]:
    """Return every kernel in every form that is launched on one of `TARGETS`. Needs Triton."""
    modules = (importlib.import_module(f"gptoss_infer.kernels.{name}") for name in MODULES)
    return [case for module in modules for case in module.cases(target)]
