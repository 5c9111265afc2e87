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
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.errors import MachineError

if TYPE_CHECKING:
    from gptoss_infer.attention import Attended, Blocks
    from gptoss_infer.kernels import moe
    from gptoss_infer.kernels.cpu import Kernels
    from gptoss_infer.kernels.tiles import Order, Tiles
    from gptoss_infer.page_tables import Batch
    from gptoss_infer.sampling import Draws

MAX_TILED_SCALE = 128  # larger scale bytes have no place in tiles; it means weights of up to 12
_LOG = logging.getLogger(__name__)


class Adapted(NamedTuple):
    """A projection of all experts of a layer, with an adapter's factors, as `run_trained` takes it."""

    tiles: Tiles
    bias: Tensor  # (E, out)
    a: Tensor | None = None  # (E, r, in)
    b: Tensor | None = None  # (E, out, r)
    scaling: float = 1.0
    dropout: float = 0.0  # on what A reads
    merged: bool = False  # the weights hold scaling B A already


def on_gpu(x: Tensor) -> bool:
    """Whether work on `x` goes the way of a GPU. That of a tensor without data (device meta) does, for planning."""
    return x.device.type != "cpu"


def runs_triton(x: Tensor) -> bool:
    """Whether Triton's kernels run where `x` is."""
    return why_no_triton(x) is None


def why_no_triton(x: Tensor) -> str | None:
    """Return why no kernel of Triton's runs where `x` is; None if they do, or would where `x` has no data."""
    if not on_gpu(x):
        return f"the model is on {x.device.type}"
    return None if has_triton() else "triton is not installed: pip install triton"


def decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Expand MXFP4; signature, values and errors are those of `gptoss_infer.mxfp4.decode`."""
    if dtype in (torch.bfloat16, torch.float32) and runs_triton(blocks):
        from gptoss_infer.kernels import mxfp4_decode

        return mxfp4_decode.decode(blocks, scales, dtype)
    return mxfp4.decode(blocks, scales, dtype)


def tile(blocks: Tensor, scales: Tensor) -> Tiles:
    """Bring MXFP4 weights, uint8 (E, out, G, 16) and (E, out, G), into the order that their GPU's kernels read.

    Raises: ValueError for a scale byte above `MAX_TILED_SCALE`.
    """
    from gptoss_infer.kernels import tiles, tuning

    return tiles.pack(blocks, scales, tuning.ORDERS[tuning.target_of(blocks.device)])


def untile(tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Return the blocks and scales that `tile` was given."""
    from gptoss_infer.kernels.tiles import unpack

    return unpack(tiles)


def tiles_of(words: Tensor, scales: Tensor, sizes: tuple[int, int], order: Order) -> Tiles:
    """Return tiles made of what `tile` returned, or of some experts of it; `sizes` are out and in."""
    from gptoss_infer.kernels.tiles import Tiles

    return Tiles(words, scales, *sizes, order)


def linear(tiles: Tiles, bias: Tensor, factors: tuple[Tensor, Tensor, float] | None = None) -> moe.Linear:
    """Return a projection of all experts of a layer as `run_tiled` takes it; needs a GPU's Triton.

    Args:
        bias: (E, out).
        factors: A (E, r, in), B (E, out, r) and scaling of an adapter that stays unmerged.
    """
    from gptoss_infer.kernels import low_rank, moe

    return moe.Linear(tiles, bias, None if factors is None else low_rank.join([factors]))


def run_tiled(
    x: Tensor,
    logits: Tensor,
    gate_up: moe.Linear,
    down: moe.Linear,
    *,
    activation: tuple[float, float],
    top_k: int,
    real: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of each token's experts from x bf16 (N, C) and router logits (N, E); no gradients.

    Args:
        activation: alpha and limit of the clamped SwiGLU. An adapter, if there is one, is every token's.
        real: bool (N,), False for tokens that are none; None if all are.
    """
    from gptoss_infer.kernels import moe

    adapted = gate_up.low_rank is not None or down.low_rank is not None
    adapters = x.new_zeros(len(x), dtype=torch.int32) if adapted else None
    layer = moe.Layer(gate_up, down, moe.Swiglu(*activation), top_k)
    return moe.moe(x, logits, layer, real=real, adapters=adapters)


def run_trained(
    x: Tensor,
    weights: Tensor,
    routing: tuple[Tensor, Tensor, Tensor, list[int], Tensor],
    projections: tuple[Adapted, Adapted],
    activation: tuple[float, float],
    *,
    recompute: bool = False,
    show: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Run experts in tiles with gradients, in Triton; the reference is `gptoss_infer.experts.run_plain`.

    Args:
        routing: a `gptoss_infer.experts.Routing`.
        projections: gate_up and down.
        show: is called with all rows' pre-activations (M, 2 I) and what down_proj reads (M, I).
    """
    from gptoss_infer.kernels import moe, moe_training

    rows = moe_training.rows_of(routing)
    work = moe_training.Work(*projections, moe.Swiglu(*activation), rows, recompute, show)
    return moe_training.run(x, weights, work)


def over_others(
    hidden: Tensor, rows: Tensor, log_counts: Tensor | None, targets: Tensor, without: Tensor, *, with_mean: bool
) -> tuple[Tensor, Tensor | None]:
    """Return logsumexp and mean row over all tokens but the target: `cross_entropy.over_others`, in Triton."""
    from gptoss_infer.kernels import cross_entropy

    return cross_entropy.over_others(hidden, rows, log_counts, targets, without, with_mean=with_mean)


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
