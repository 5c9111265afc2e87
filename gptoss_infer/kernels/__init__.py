"""Kernels, and the one place that chooses between them: Triton on a GPU, C++ to infer on a CPU, else plain PyTorch.

Triton is imported when the first CUDA (or ROCm) tensor arrives, never before. A kernel's module holds its launcher,
with the signature and the results of its reference; `crosscompile` compiles all of them for GPUs that need not be
there. The C++ of `cpu` is compiled when inference first asks for it. Used by the model, the engine and training.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.errors import MachineError

if TYPE_CHECKING:
    from gptoss_infer.kernels.cpu import Kernels

if TYPE_CHECKING:
    from gptoss_infer.kernels import moe

MAX_TILED_SCALE = 128  # larger scale bytes have no place in tiles; it means weights of up to 12
_LOG = logging.getLogger(__name__)


def on_gpu(x: Tensor) -> bool:
    """Whether work on `x` goes the way of a GPU. That of a tensor without data (device meta) does, for planning."""
    return x.device.type != "cpu"


def decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Expand MXFP4; signature, values and errors are those of `gptoss_infer.mxfp4.decode`."""
    if blocks.is_cuda and dtype in (torch.bfloat16, torch.float32) and has_triton():
        from gptoss_infer.kernels import mxfp4_decode

        return mxfp4_decode.decode(blocks, scales, dtype)
    return mxfp4.decode(blocks, scales, dtype)


def tile(
    blocks: Tensor, scales: Tensor, bias: Tensor, factors: tuple[Tensor, Tensor, float] | None = None
) -> moe.Linear:
    """Return a projection of all experts of a layer as `run_tiled` takes it; needs a GPU's Triton.

    Args:
        blocks, scales: MXFP4, uint8 (E, out, G, 16) and (E, out, G). bias: (E, out).
        factors: A (E, r, in), B (E, out, r) and scaling of an adapter that stays unmerged.
    Raises: ValueError for a scale byte above `MAX_TILED_SCALE`.
    """
    from gptoss_infer.kernels import low_rank, moe, tiles, tuning

    packed = tiles.pack(blocks, scales, tuning.ORDERS[tuning.target_of(blocks.device)])
    return moe.Linear(packed, bias, None if factors is None else low_rank.join([factors]))


def run_tiled(
    x: Tensor, logits: Tensor, gate_up: moe.Linear, down: moe.Linear, *, activation: tuple[float, float], top_k: int
) -> Tensor:
    """Return the weighted sum of each token's experts from x bf16 (N, C) and router logits (N, E); no gradients.

    activation: alpha and limit of the clamped SwiGLU. An adapter, if there is one, is every token's.
    """
    from gptoss_infer.kernels import moe

    adapted = gate_up.low_rank is not None or down.low_rank is not None
    adapters = x.new_zeros(len(x), dtype=torch.int32) if adapted else None
    return moe.moe(x, logits, moe.Layer(gate_up, down, moe.Swiglu(*activation), top_k), adapters=adapters)


@functools.cache
def cpu_kernels() -> Kernels | None:
    """Return the compiled kernels of the CPU; where they cannot be had, None, and one line that says why."""
    from gptoss_infer.kernels.cpu import Kernels

    try:
        return Kernels()
    except MachineError as error:
        _LOG.warning("the CPU runs plain PyTorch instead of our compiled kernels, more slowly: %s", error)
        return None


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; without it a GPU runs the references, which is said once."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        _LOG.warning("triton is not installed: the GPU runs plain PyTorch instead of our kernels, more slowly")
    return found
