"""Kernels, and the one place that chooses between them: Triton on a GPU, C++ to infer on a CPU, else plain PyTorch.

Triton is imported when the first CUDA (or ROCm) tensor arrives, never before. A kernel's module holds its launcher,
with the signature and the results of its reference; `crosscompile` compiles all of them for GPUs that need not be
there. The C++ of `cpu` is compiled when inference first asks for it. Used by the model, the engine and training.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.errors import MachineError

if TYPE_CHECKING:
    from gptoss_infer.attention import Attended, Blocks
    from gptoss_infer.kernels import moe
    from gptoss_infer.kernels.cpu import Kernels
    from gptoss_infer.page_tables import Batch
    from gptoss_infer.sampling import Draws

MAX_TILED_SCALE = 128  # larger scale bytes have no place in tiles; it means weights of up to 12
_LOG = logging.getLogger(__name__)


def on_gpu(x: Tensor) -> bool:
    """Whether work on `x` goes the way of a GPU. That of a tensor without data (device meta) does, for planning."""
    return x.device.type != "cpu"


def runs_triton(x: Tensor) -> bool:
    """Whether Triton's kernels run where `x` is."""
    return why_no_triton(x) is None


def why_no_triton(x: Tensor) -> str | None:
    """Return why no kernel of Triton's runs where `x` is; None if they do."""
    if not x.is_cuda:
        return f"the model is on {x.device.type}"
    return None if has_triton() else "triton is not installed: pip install triton"


def decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Expand MXFP4; signature, values and errors are those of `gptoss_infer.mxfp4.decode`."""
    if dtype in (torch.bfloat16, torch.float32) and runs_triton(blocks):
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


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, blocks: Blocks, *, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attend over a packed batch; signature and results are those of `gptoss_infer.attention.packed_forward`."""
    forward, _ = _packed_attention(q)
    return forward(q, k, v, sinks, blocks, window=window)


def packed_backward(
    grad: Tensor, attended: Attended, blocks: Blocks, *, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give gradients; signature and results are those of `gptoss_infer.attention.packed_backward`."""
    _, backward = _packed_attention(attended.q)
    return backward(grad, attended, blocks, window=window)


def _packed_attention(q: Tensor) -> tuple[Callable, Callable]:
    """Return the forward and backward pass for tensors like `q`."""
    from gptoss_infer import attention

    if runs_triton(q):
        from gptoss_infer.kernels import packed_attention

        if packed_attention.fits(q.dtype, q.shape[2]):
            return packed_attention.packed_forward, packed_attention.packed_backward
        _say_once(f"attention has no kernel for heads of size {q.shape[2]} in {q.dtype}: plain PyTorch, more slowly")
    return attention.packed_forward, attention.packed_backward


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + delta, or x without one, and its RMSNorm, all (..., C); no gradients, and only where `runs_triton`."""
    from gptoss_infer.kernels import norm

    flat = None if delta is None else delta.reshape(-1, x.shape[-1])
    total, normed = norm.add_norm(x.reshape(-1, x.shape[-1]), flat, weight, eps)
    return total.view(x.shape), normed.view(x.shape)


def why_not_paged(keys: Tensor) -> str | None:
    """Return why `attend_paged` cannot work over pages like these, (pages, K, T, D); None if it can."""
    if (why := why_no_triton(keys)) is not None:
        return why
    from gptoss_infer.kernels import paged_attention

    _, _, tokens, d = keys.shape
    if not paged_attention.fits(keys.dtype, d, tokens):
        return f"there is no kernel for heads of size {d} in {keys.dtype}, in pages of {tokens} tokens"
    return None


def attend_paged(
    qkv: tuple[Tensor, Tensor, Tensor],
    angles: tuple[Tensor, Tensor],
    pages: tuple[Tensor, Tensor, Tensor],
    sinks: Tensor,
    batch: Batch,
    *,
    window: int | None,
) -> Tensor:
    """Rotate queries and keys, keep keys and values in their pages, and attend; (N, H, D), no gradients.

    Args:
        qkv: (N, H, D), (N, K, D), (N, K, D), as projected. angles: cosines and sines, (N, D/2) each.
        pages: keys and values, (pages, K, T, D) each, and where there each token belongs, int32 (N,): page T + slot.
        sinks: (H,). batch: the tables of the step. window: as in `gptoss_infer.page_tables.attend`.
    """
    from gptoss_infer.kernels import paged_attention, rope

    keys, values, places = pages
    q = rope.rotate_and_store(qkv, angles, keys, values, places)
    return paged_attention.paged_attention(q, keys, values, sinks, batch, window=window)


def sample(
    logits: Tensor, draws: Draws, allowed: Tensor | None = None, *, logprobs: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Draw the next id of every row; signature, ids and errors are those of `gptoss_infer.sampling.sample`."""
    if runs_triton(logits):
        from gptoss_infer.kernels import sampling as in_triton

        return in_triton.sample(logits, draws, allowed, logprobs=logprobs)
    from gptoss_infer import sampling

    return sampling.sample(logits, draws, allowed, logprobs=logprobs)


@functools.cache
def _say_once(text: str) -> None:
    _LOG.warning("%s", text)


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
        _say_once("triton is not installed: the GPU runs plain PyTorch instead of our kernels, more slowly")
    return found
