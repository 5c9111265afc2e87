"""MXFP4 decode in Triton: one byte in, one word of two values out. The reference is `gptoss_infer.mxfp4.decode`.

Legend: G blocks of 32 values in all, 16 bytes each; a program decodes a tile of TILE blocks. Reads 17 bytes and writes
64 (bf16) or 128 (fp32) per block, so memory is the limit, and every value is made in registers without a table.

Imported on the first use of a GPU, by `gptoss_infer.kernels`; with TRITON_INTERPRET=1 it runs on CPU tensors (tests).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.config import ModelConfig
from gptoss_infer.kernels.cases import Case, Check

TILE = 128  # blocks per program: 16 bytes, one load, for each of its 128 threads
# Fusing would change nothing in two lone multiplications; said because Triton's default depends on its version.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def decode_kernel(blocks, scales, words, num_blocks, WORD_BITS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write words (G, 16) from blocks uint8 (G, 16) and scales uint8 (G,).

    A word holds both values of a byte, the low nibble's first in memory: uint32 for bf16, uint64 for fp32.
    """
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # (TILE,) int64: 120b has more than 2**31 bytes
    inside = rows < num_blocks
    offsets = rows[:, None] * 16 + tl.arange(0, 16)[None, :]  # (TILE, 16)
    byte = tl.load(blocks + offsets, mask=inside[:, None], other=0).to(tl.uint32)
    scale = tl.load(scales + rows, mask=inside, other=0).to(tl.uint32)  # (TILE,)
    # The byte is an fp32's exponent. 0 and 255 would be 0 and infinity: bit 22 makes them 2**-127 and NaN.
    special = (scale == 0) | (scale == 255)
    factor = ((scale << 23) | tl.where(special, 1 << 22, 0).to(tl.uint32)).to(tl.float32, bitcast=True)[:, None]
    low = scaled_bits((byte & 7) << 22 | (byte & 8) << 28, factor)
    high = scaled_bits((byte & 0x70) << 18 | (byte & 0x80) << 24, factor)
    # Every value is a bf16: the lower half of its fp32 is zero.
    word = (low >> 16 | high & 0xFFFF0000) if WORD_BITS == 32 else (low.to(tl.uint64) | high.to(tl.uint64) << 32)
    tl.store(words + offsets, word, mask=inside[:, None])


@triton.jit
def scaled_bits(bits, factor):  # type: ignore[no-untyped-def]
    """Return the fp32 bits of an E2M1 value times `factor`, from its sign at bit 31 and its other bits at 24..22.

    There they are an fp32 2**-126 as large: exponent and fraction fall into place, and 0.5 is the subnormal 2**-127.
    Two exact multiplications, because one factor of up to 2**253 has no fp32; neither may flush subnormals (a test
    reads the compiled code).
    """
    value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2**126
    return (value * factor).to(tl.uint32, bitcast=True)


def decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Expand MXFP4 to bf16 or fp32 with the values of `gptoss_infer.mxfp4.decode`, bit for bit but for NaN's bits.

    Args:
        blocks: uint8 (..., G, 16), on a GPU.
        scales: uint8 (..., G).
    Returns: (..., 32 G) in `dtype`, on the device of `blocks`.
    Raises: ValueError if shapes or dtypes disagree, or `dtype` is another.
    """
    mxfp4.check_pair(blocks, scales)
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dtype is {dtype}; this kernel writes bfloat16 or float32, mxfp4.decode others")
    values = torch.empty(*scales.shape, mxfp4.BLOCK, dtype=dtype, device=blocks.device)
    words = values.view(torch.uint32 if dtype == torch.bfloat16 else torch.uint64)  # (..., G, 16)
    num_blocks = scales.numel()
    if num_blocks:
        with torch.cuda.device_of(blocks):
            decode_kernel[(triton.cdiv(num_blocks, TILE),)](
                blocks.contiguous(), scales.contiguous(), words, num_blocks,
                WORD_BITS=16 * dtype.itemsize, TILE=TILE, **OPTIONS,
            )  # fmt: skip
    return values.flatten(-2)


def cases(target: str) -> list[Case]:
    """Return the forms that are launched."""
    return [
        Case(
            f"mxfp4_decode {dtype}",
            decode_kernel,
            {"blocks": "*u8", "scales": "*u8", "words": f"*u{bits}", "num_blocks": "i64"},
            {"WORD_BITS": bits, "TILE": TILE},
            aligned=("blocks", "scales", "words"),
            options=OPTIONS,
            blocks=4 if target.startswith("gfx") else 8,  # half of the threads that fit on a multiprocessor
        )
        for dtype, bits in (("bf16", 32), ("fp32", 64))
    ]


def checks(config: ModelConfig, device: torch.device, tokens: Sequence[int]) -> Iterator[Check]:
    """Yield the decoding of eight experts' gate_up_proj, as training does it at a time."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (8, 2 * config.intermediate_size, config.hidden_size // mxfp4.BLOCK)
    blocks = torch.empty(*shape, 16, dtype=torch.uint8, device=device).random_(generator=generator)
    scales = torch.empty(shape, dtype=torch.uint8, device=device).random_(0, 253, generator=generator)  # finite
    for dtype in (torch.bfloat16, torch.float32):
        yield Check(
            f"mxfp4_decode {str(dtype).removeprefix('torch.')}",
            [partial(decode, blocks, scales, dtype)],
            partial(mxfp4.decode, blocks, scales, dtype),
            0,
            moved_bytes=blocks.nbytes * (1 + 2 * dtype.itemsize) + scales.nbytes,
        )
