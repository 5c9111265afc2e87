"""What a kernel's module tells about itself: in which forms it is launched, and how its results are checked on a GPU.

Every module in `MODULES` has `cases(target) -> list[Case]`, which `crosscompile` compiles without a GPU, and
`checks(config, device, tokens) -> Iterator[Check]`, which `check` compares and times on one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gptoss_infer.config import ModelConfig

# Targets for which every kernel must compile, and for which launchers have their tuning.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MODULES = (
    "attention_cases", "cross_entropy", "low_rank", "moe_backward_cases", "moe_cases", "mxfp4_decode", "norm", "rope",
    "routing", "sampling_cases",
)  # fmt: skip

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
    keeps_subnormals: bool = True  # results may not be rounded to zero; a softmax does not care
    blocks: int = 1  # that must fit on one multiprocessor, by registers and shared memory


@dataclass(frozen=True)
class Check:
    """One comparison of a kernel with its reference, and what to time."""

    name: str
    runs: Sequence[Callable[[], Any]]  # of several inputs, timed in turn: what one reads, no cache has from another
    expected: Callable[[], Any]  # what the reference makes of the first of them
    allowed: float  # error, relative in the norm over all elements; 0 for equal
    moved_bytes: float = 0.0  # to and from memory, at least, by one run; 0 if its time is of no interest
    flops: float = 0.0
    compared: Callable[[Any], Tensor] = lambda result: result  # what of a result is compared


def cases(target: str) -> list[Case]:
    """Return every kernel in every form that is launched on one of `TARGETS`. Needs Triton."""
    return [case for module in _modules() for case in module.cases(target)]


def checks(config: ModelConfig, device: torch.device, tokens: Sequence[int]) -> Iterator[Check]:
    """Yield every kernel's checks at the sizes of a model, for batches of so many tokens. Needs Triton."""
    for module in _modules():
        yield from module.checks(config, device, tokens)


def _modules() -> list[Any]:
    return [importlib.import_module(f"gptoss_infer.kernels.{name}") for name in MODULES]
