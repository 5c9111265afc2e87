"""MXFP4: 32 values share one power-of-two scale, each value is a 4-bit float. Exact decode, stated encode; plain torch.

Shapes: G blocks of 32 values along the last (input) dimension. `blocks` are uint8 (..., G, 16): byte k holds element 2k
in its low nibble and 2k+1 in its high one. `scales` are uint8 (..., G). This is the layout of openai/gpt-oss
checkpoints.

Rules (OCP Microscaling Formats v1.0, sections 5.3.3 and 5.4.1):
- **element** (E2M1): codes 0..7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign, so code 8 is -0.
- **scale** (E8M0): byte s means 2**(s - 127); byte 255 is NaN and makes its whole block NaN.
- **rounding**: to the nearest element, ties to the even code; magnitudes above 6 saturate to 6. The sign of zero is
  kept.
- **choice of scale**: of OCP's floor(log2 amax) - 2 and the next larger one (and the scale of `like`, if given), the
  one with the least squared error; on a tie that of `like`, then the smaller. This makes encoding lossless on decoded
  values.
- **zero**: an all-zero block gets scale byte 0 (or keeps that of `like`).
- **NaN and infinity** have no code, except that a NaN block would be byte 255: `encode` refuses them all.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32
# OCP MX v1.0, table 5 (FP4 E2M1).
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SCALE_BIAS, SCALE_NAN = 127, 255
CHUNK_BLOCKS = 32768  # blocks worked on at a time on a CPU: 4 MiB of fp32, so that the passes over them stay in cache


class _Float(NamedTuple):
    """How a float is laid out in an integer of its width."""

    word: torch.dtype
    mantissa_bits: int
    bias: int

    def bits(self, power: int) -> int:
        """Return the bits of 2**power."""
        return (self.bias + power) << self.mantissa_bits


_FLOATS = {torch.float32: _Float(torch.int32, 23, 127), torch.float64: _Float(torch.int64, 52, 1023)}


def scale_values(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Return (256,): the value of every scale byte, 2**(byte - 127) and NaN for 255, exact in fp32, bf16 and fp64."""
    exponents = torch.arange(256, dtype=torch.float64) - SCALE_BIAS
    values = torch.exp2(exponents)
    values[SCALE_NAN] = torch.nan
    return values.to(dtype).to(device)


def pair_values(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Return (256, 2): the two elements of every byte, low nibble first."""
    codes = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    byte = torch.arange(256)
    return torch.stack([codes[byte & 15], codes[byte >> 4]], dim=-1).to(dtype).to(device)


def decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Expand MXFP4 to `dtype`: bf16, fp32 or fp64.

    Exact wherever `dtype` has the value: all of fp64; in bf16 and fp32 all but magnitudes of 2**128 and more, possible
    only with scale bytes 253 and 254, which become infinite. Scale byte 255 gives NaN.

    Args:
        blocks: uint8 (..., G, 16).
        scales: uint8 (..., G).
    Returns: (..., 32 G) in `dtype`, on the device of `blocks`.
    Raises: ValueError if shapes or dtypes disagree.
    """
    check_pair(blocks, scales)
    table = _decode_table(dtype, blocks.device)
    values = torch.empty(*scales.shape, BLOCK, dtype=dtype, device=blocks.device)
    count, half = scales.numel(), BLOCK // 2
    rows, numbers = blocks.reshape(count, half), scales.reshape(count, 1)
    pairs = values.view(table.dtype).view(count, half, *table.shape[1:])
    size = CHUNK_BLOCKS // 2 if blocks.device.type == "cpu" else max(count, 1)
    scratch = torch.empty(min(size, count), half, dtype=torch.int32, device=blocks.device)
    for start in range(0, count, size):
        part = slice(start, start + size)
        index = scratch[: len(rows[part])].copy_(rows[part]).add_(numbers[part].int(), alpha=256)
        torch.index_select(table, 0, index.view(-1), out=pairs[part].flatten(0, 1))
    return values.flatten(-2)


@functools.cache
def _decode_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the two values of byte b under scale byte s at 256 s + b, as one word if there is an integer as wide."""
    products = scale_values(torch.float64)[:, None, None] * pair_values(torch.float64)  # (256, 256, 2)
    values = products.to(dtype).to(device).view(-1, 2)
    word = {2: torch.int32, 4: torch.int64}.get(dtype.itemsize)
    return values if word is None else values.view(word).view(-1)


def encode(weights: Tensor, like: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Round to MXFP4 by the rules in the module docstring.

    Args:
        weights: floating (..., 32 G); every value finite. Computed in fp32 (fp64 if given fp64).
        like: blocks and scales of the tensor that `weights` came from: a block whose values all equal the decoded ones
            keeps its bytes, and its scale competes in the choice for the others.
    Returns: blocks uint8 (..., G, 16), scales uint8 (..., G).
    Raises: ValueError if the last dimension is no multiple of 32, a value is not finite, or `like` has another shape.
    """
    if weights.shape[-1] % BLOCK:
        raise ValueError(f"last dimension is {weights.shape[-1]}; MXFP4 needs a multiple of {BLOCK}")
    x = weights.detach().unflatten(-1, (-1, BLOCK))  # (..., G, 32)
    flat = x.reshape(-1, BLOCK)  # (N, 32)
    base: tuple[Tensor, Tensor] | None = None
    if like is not None:
        check_pair(*like)
        if like[1].shape != x.shape[:-1]:
            raise ValueError(f"`like` has scales of shape {tuple(like[1].shape)}, expected {tuple(x.shape[:-1])}")
        base = like[0].reshape(-1, BLOCK // 2), like[1].reshape(-1)
    blocks = torch.empty(flat.shape[0], BLOCK // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(flat.shape[0], dtype=torch.uint8, device=x.device)
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    scratch = torch.empty(4, min(len(flat), CHUNK_BLOCKS), BLOCK, dtype=dtype, device=x.device)
    for start in range(0, len(flat), CHUNK_BLOCKS):
        part = slice(start, start + CHUNK_BLOCKS)
        pair = None if base is None else (base[0][part], base[1][part])
        blocks[part], scales[part] = _encode_chunk(flat[part].to(dtype), pair, scratch[:, : len(flat[part])])
    # A block that holds NaN or infinity was given the byte of NaN, which nothing else is.
    if (scales == SCALE_NAN).any():
        bad = x.numel() - int(torch.isfinite(x).sum())
        raise ValueError(f"{bad} of {x.numel()} values are NaN or infinite; MXFP4 cannot hold them")
    return blocks.view(*x.shape[:-1], BLOCK // 2), scales.view(x.shape[:-1])


def _encode_chunk(x: Tensor, like: tuple[Tensor, Tensor] | None, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Encode (N, 32) values with scratch (4, N, 32); see `encode`. Blocks that are not finite get scale byte 255.

    What is as large as `x` goes to scratch: memory fresh from the system costs more than the arithmetic done on it.
    """
    layout = _FLOATS[x.dtype]
    # The bits of magnitudes are in the order of their values, infinity and NaN above all.
    magnitude, scratch = scratch[0], scratch[1:]
    bits = torch.bitwise_and(x.view(layout.word), torch.iinfo(layout.word).max, out=magnitude.view(layout.word))
    amax = bits.amax(-1)
    # OCP: floor(log2 amax) - 2.
    first = (amax >> layout.mantissa_bits).sub_(layout.bias + 2 - SCALE_BIAS).clamp_(0, SCALE_NAN - 1).to(torch.uint8)
    larger = (first + 1).clamp_max_(SCALE_NAN - 1)
    if like is None:
        # Up to 7, 1.75 * 4, the grid of `first` is as near to every value as the larger one, which lacks 0.5 and 1.5.
        scales = first.clone()
        mantissa = amax & layout.bits(1 - layout.bias) - 1
        rows = (mantissa > 3 << layout.mantissa_bits - 2).nonzero().squeeze(1)
        some = scratch[:, : len(rows)]
        torch.index_select(magnitude, 0, rows, out=some[0])
        scales[rows] = _least_error(some[0], [first[rows], larger[rows]], some)
        blocks = _round_to_blocks(x, magnitude, scales, scratch)
    else:
        scales = _least_error(magnitude, [like[1].clamp_max(SCALE_NAN - 1), first, larger], scratch)
        kept = (decode(*like, dtype=x.dtype).view_as(x) == x).all(-1)  # (N,)
        blocks = torch.where(kept.unsqueeze(-1), like[0], _round_to_blocks(x, magnitude, scales, scratch))
        scales = torch.where(kept, like[1], scales)
    return blocks, scales.masked_fill_(amax >= layout.bits(layout.bias + 1), SCALE_NAN)


def _round_magnitudes(magnitude: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    """Round non-negative values to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6; ties to the even code, above 6 to 6."""
    # The grid's step is 0.5 below 2, 1 below 4, then 2: half the power of two p below the value, kept within 1 and 4.
    # The last bit of a sum with p 2**22 (in fp64 2**51) is worth that step; it is rounded half to even, as are codes.
    layout = _FLOATS[magnitude.dtype]
    power = scratch.view(layout.word)
    torch.bitwise_and(magnitude.view(layout.word), layout.bits(layout.bias + 1), out=power)
    power.clamp_(layout.bits(0), layout.bits(2)).add_(layout.bits(layout.mantissa_bits - 1 - layout.bias))
    return torch.add(magnitude, scratch, out=out).sub_(scratch).clamp_max_(6.0)


def _round_to_blocks(x: Tensor, magnitude: Tensor, scales: Tensor, scratch: Tensor) -> Tensor:
    """Return the bytes (N, 16) of the codes nearest to x / scale; ties to even, saturating, sign of zero kept."""
    value, other = scratch[:2]
    code, sign, half = scratch[2].view(torch.int8).view(-1, *x.shape)[:3]
    word = _FLOATS[x.dtype].word
    sign.copy_(torch.bitwise_right_shift(x.view(word), x.itemsize * 8 - 1, out=other.view(word)))  # 0 or -1
    torch.mul(magnitude, _power(SCALE_BIAS - scales.to(x.dtype)), out=value)
    code.copy_(_round_magnitudes(value, value, other).mul_(2))
    # Twice the values are 0, 1, 2, 3, 4, 6, 8, 12: a code for every 1 up to 4, for every 2 up to 8, for every 4.
    torch.minimum(code, torch.bitwise_right_shift(code, 1, out=half).add_(2), out=half)
    torch.minimum(half, code.bitwise_right_shift_(2).add_(4), out=code)
    return pack(code.bitwise_or_(sign.bitwise_and_(8)), half)


def _least_error(magnitude: Tensor, candidates: list[Tensor], scratch: Tensor) -> Tensor:
    """Return, per block of magnitudes (N, 32), the first candidate with the least squared error; uint8 (N,)."""
    # Errors are in units of the last (largest) candidate, so that squares of tiny weights do not underflow.
    dtype = magnitude.dtype
    unit = torch.mul(magnitude, _power(SCALE_BIAS - candidates[-1].to(dtype)), out=scratch[0])
    best, best_error = candidates[0], torch.full(unit.shape[:-1], torch.inf, dtype=dtype, device=unit.device)
    for scales in candidates:
        exponent = scales.to(dtype) - candidates[-1].to(dtype)
        rounded = torch.mul(unit, _power(-exponent), out=scratch[1])
        _round_magnitudes(rounded, rounded, scratch[2]).mul_(_power(exponent))
        error = rounded.sub_(unit).square_().sum(-1)
        better = error < best_error
        best = torch.where(better, scales, best)
        best_error = torch.where(better, error, best_error)
    return best


def _power(exponents: Tensor) -> Tensor:
    """Return 2**exponents as a factor (..., 1) for values (..., 32)."""
    return torch.exp2(exponents).unsqueeze(-1)


def pack(codes: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Pack codes 0..15 of one byte each (..., 32) into bytes (..., 16), the even element in the low nibble."""
    pairs = codes.contiguous().view(torch.int16)  # little-endian: the even element is the low byte
    scratch = torch.empty_like(pairs) if scratch is None else scratch.view(torch.int16)
    return torch.bitwise_right_shift(pairs, 4, out=scratch).bitwise_or_(pairs).to(torch.uint8)


def check_pair(blocks: Tensor, scales: Tensor) -> None:
    """Raise ValueError unless these are uint8 (..., G, 16) and uint8 (..., G)."""
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"blocks and scales are {blocks.dtype} and {scales.dtype}, expected uint8")
    if blocks.shape != (*scales.shape, BLOCK // 2):
        raise ValueError(
            f"blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)} do not match: expected (..., G, 16) "
            "and (..., G)"
        )
