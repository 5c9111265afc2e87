"""The peers' own MXFP4, to compare with: torchao's and NVIDIA ModelOpt's rounding, transformers' decoding.

- `torchao floor`, `torchao ceil`: scales computed again from the largest weight of a block, by floor and ceil of its
  log2; ties to the even code.
- `modelopt`: the scale is the least power of two that holds the largest weight; ties go towards zero.
- transformers: expands blocks and scales, and transposes, as its model wants experts (in, out).

None of them is needed for anything else, so they are an extra of its own, for an environment of its own:

    python3.11 -m venv .oracles && .oracles/bin/pip install -c .ci/constraints.txt -e ".[oracles]"

Each is here or not on its own. One that cannot be imported is left out, which is said once on stderr.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gptoss_infer import mxfp4

CURE = (
    'python3.11 -m venv .oracles && .oracles/bin/pip install -c .ci/constraints.txt -e ".[oracles]" '
    "makes an environment that has it"
)

_T = TypeVar("_T")


class Rule(NamedTuple):
    """How a peer rounds."""

    package: str  # as it is installed
    quantize: Callable[[Tensor], Any]  # bf16 or fp32 (..., 32 G) -> what the peer holds it as
    dequantize: Callable[[Any], Tensor]  # that -> fp32 (..., 32 G)


@functools.cache
def rules() -> dict[str, Rule]:
    """Return the rules of the peers that are here, by the names in the module docstring."""
    return (_load("torchao", _torchao) or {}) | (_load("nvidia-modelopt", _modelopt) or {})


@functools.cache
def transformers_decode() -> Callable[[Tensor, Tensor, torch.dtype], Tensor] | None:
    """Return transformers' blocks uint8 (E, out, G, 16), scales uint8 (E, out, G), dtype -> (E, 32 G, out), if here."""
    return _load("transformers", _transformers)


def write(rule: Rule, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return blocks and scales with exactly the values that a peer makes of weights (..., 32 G).

    Zeros have a sign, and blocks have scales, as `mxfp4.encode` gives them, not as the peer does.

    Raises: ValueError if a value that the peer dequantizes to is not on MXFP4's grid.
    """
    values = rule.dequantize(rule.quantize(weights))
    pair = mxfp4.encode(values)
    wrong = int((mxfp4.decode(*pair, torch.float32) != values).sum())
    if wrong:
        raise ValueError(
            f"{wrong} of {values.numel()} values that the peer dequantized to are not on MXFP4's grid; expected none: "
            "another version of it? (the `oracles` extra has the one that was tried)"
        )
    return pair


def _load(package: str, load: Callable[[], _T]) -> _T | None:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results, whatever they print when imported
            return load()
    except ImportError as error:
        print(f"{package} cannot be imported ({error}), so it is left out; {CURE}", file=sys.stderr)
        return None


def _torchao() -> dict[str, Rule]:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    def rule(mode: ScaleCalculationMode) -> Rule:
        to_mx = functools.partial(
            MXTensor.to_mx, elem_dtype=torch.float4_e2m1fn_x2, block_size=mxfp4.BLOCK, scaling_mode=mode
        )
        return Rule("torchao", to_mx, lambda held: held.dequantize(torch.float32))

    return {"torchao floor": rule(ScaleCalculationMode.FLOOR), "torchao ceil": rule(ScaleCalculationMode.CEIL)}


def _modelopt() -> dict[str, Rule]:
    from modelopt.torch.quantization.qtensor import MXFP4QTensor

    def dequantize(held: tuple[MXFP4QTensor, Tensor]) -> Tensor:
        blocks, scale = held
        return blocks.dequantize(torch.float32, scale=scale, block_sizes={-1: mxfp4.BLOCK})

    quantize = functools.partial(MXFP4QTensor.quantize, block_size=mxfp4.BLOCK)
    return {"modelopt": Rule("nvidia-modelopt", quantize, dequantize)}


def _transformers() -> Callable[[Tensor, Tensor, torch.dtype], Tensor]:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return lambda blocks, scales, dtype: convert_moe_packed_tensors(blocks, scales, dtype=dtype)
