"""Kernels and launches that only tests need: to see that the tools that judge kernels can tell good from bad."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_infer.kernels import mxfp4_decode


@triton.jit
def arithmetic_kernel(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a * b)
    tl.store(out + SIZE + i, a + b)
    tl.store(out + 2 * SIZE + i, tl.where(a < b, a, b))
    tl.store(out + 3 * SIZE + i, (a.to(tl.float32) / 3).to(tl.bfloat16))
    tl.store(out + 4 * SIZE + i, (a.to(tl.float32) / 3).to(tl.bfloat16, fp_downcast_rounding="rtne"))


@triton.jit
def dot_kernel(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tile = i[:, None] * SIZE + i[None, :]
    tl.store(out + tile, tl.dot(tl.load(x + tile), tl.load(y + tile)))


def arithmetic(x: Tensor, y: Tensor) -> Tensor:
    """(5, N): x y, x + y, the smaller of both, and x / 3 rounded from fp32 by a cast and by a stated rounding mode."""
    out = torch.empty(5, len(x), dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, out, SIZE=len(x))
    return out


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The product of two square bf16 matrices, in fp32."""
    out = torch.empty(len(x), len(x))
    dot_kernel[(1,)](x, y, out, SIZE=len(x))
    return out


@triton.jit
def spilling_kernel(x, out, SIZE: tl.constexpr):
    """Holds SIZE values per warp at once, which no register file does for a large SIZE."""
    i = tl.arange(0, SIZE)
    values = tl.load(x + i)
    tl.debug_barrier()
    tl.store(out + i, values * tl.sum(values))


def decode_beside_canaries(blocks: Tensor, scales: Tensor) -> Tensor:
    """The decode kernel's words, int32 (G + 2 TILE, 16), of which it may write the first G rows; the others are 7."""
    words = torch.full((len(scales) + 2 * mxfp4_decode.TILE, 16), 7, dtype=torch.int32)
    grid = (triton.cdiv(len(scales), mxfp4_decode.TILE),)
    mxfp4_decode.decode_kernel[grid](
        blocks, scales, words.view(torch.uint32), len(scales), WORD_BITS=32, TILE=mxfp4_decode.TILE
    )
    return words
