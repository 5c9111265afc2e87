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

import torch
from torch import Tensor

BLOCK = 32
# OCP MX v1.0, table 5 (FP4 E2M1).
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SCALE_BIAS, SCALE_NAN = 127, 255
CHUNK_BLOCKS = 16384  # blocks encoded at a time: 2 MiB of fp32, so that the passes over them stay in cache


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
    table, scale_table = _decode_tables(dtype, blocks.device)
    # One gather of an 8-byte word per byte (fp32: two elements) or per two bytes (bf16: four).
    if dtype.itemsize == 2:
        words = table.index_select(0, blocks.view(torch.int16).reshape(-1).int().add_(2**15))
    elif dtype.itemsize == 4:
        words = table.index_select(0, blocks.reshape(-1).int())
    else:
        words = table[blocks.int()]  # (..., G, 16, 2)
    values = words.view(dtype).view(*scales.shape, BLOCK)  # (..., G, 32)
    values = values.mul_(scale_table[scales.int()].unsqueeze(-1))
    return values.flatten(-2)


@functools.cache
def _decode_tables(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what a byte, or two, decode to, as words of 8 bytes if `dtype` is 2 or 4 bytes wide, and scale values."""
    pairs = pair_values(dtype, device)  # (256, 2)
    scale_table = scale_values(dtype, device)
    if dtype.itemsize == 4:
        return pairs.view(torch.int64).view(-1), scale_table
    if dtype.itemsize != 2:
        return pairs, scale_table
    number = torch.arange(-(2**15), 2**15, device=device)  # two bytes, little-endian, as a signed integer
    four = torch.cat([pairs[number & 255], pairs[(number >> 8) & 255]], dim=1)  # (65536, 4)
    return four.contiguous().view(torch.int64).view(-1), scale_table


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
    x = weights.detach().to(torch.float64 if weights.dtype == torch.float64 else torch.float32)
    x = x.unflatten(-1, (-1, BLOCK))  # (..., G, 32)
    bad = x.numel() - int(torch.isfinite(x).sum())
    if bad:
        raise ValueError(f"{bad} of {x.numel()} values are NaN or infinite; MXFP4 cannot hold them")
    flat = x.reshape(-1, BLOCK)  # (N, 32)
    base: tuple[Tensor, Tensor] | None = None
    if like is not None:
        check_pair(*like)
        if like[1].shape != x.shape[:-1]:
            raise ValueError(f"`like` has scales of shape {tuple(like[1].shape)}, expected {tuple(x.shape[:-1])}")
        base = like[0].reshape(-1, BLOCK // 2), like[1].reshape(-1)
    blocks = torch.empty(flat.shape[0], BLOCK // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(flat.shape[0], dtype=torch.uint8, device=x.device)
    for start in range(0, flat.shape[0], CHUNK_BLOCKS):
        part = slice(start, start + CHUNK_BLOCKS)
        blocks[part], scales[part] = _encode_chunk(flat[part], None if base is None else (base[0][part], base[1][part]))
    return blocks.view(*x.shape[:-1], BLOCK // 2), scales.view(x.shape[:-1])


def _encode_chunk(x: Tensor, like: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Encode (N, 32) values; see `encode`."""
    first = ocp_scales(x)
    larger = (first.int() + 1).clamp_max(SCALE_NAN - 1).to(torch.uint8)
    if like is None:
        scales = _least_error(x, [first, larger])
        return pack(round_to_codes(x, scales)), scales
    scales = _least_error(x, [like[1].clamp_max(SCALE_NAN - 1), first, larger])
    blocks = pack(round_to_codes(x, scales))
    kept = (decode(*like, dtype=x.dtype).view_as(x) == x).all(-1)  # (N,)
    return torch.where(kept.unsqueeze(-1), like[0], blocks), torch.where(kept, like[1], scales)


def ocp_scales(x: Tensor) -> Tensor:
    """Return the OCP scale bytes of (..., 32) blocks: floor(log2 amax) - 2, clamped to bytes 0..254; uint8 (...)."""
    amax = x.abs().amax(-1)
    _, exponent = torch.frexp(amax)  # amax = m 2**exponent with m in [0.5, 1): floor(log2) = exponent - 1
    byte = torch.where(amax > 0, exponent - 3 + SCALE_BIAS, 0)
    return byte.clamp(0, SCALE_NAN - 1).to(torch.uint8)


def round_magnitudes(magnitude: Tensor) -> Tensor:
    """Round non-negative values to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6; ties to the even code, above 6 to 6."""
    # The step is 0.5 below 2, 1 below 4, 2 above; half-to-even multiples of it are exactly the even codes.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0)).to(magnitude.dtype)
    return torch.round(magnitude / step).mul_(step).clamp_max_(6.0)


def round_to_codes(x: Tensor, scales: Tensor) -> Tensor:
    """Return the uint8 codes 0..15 nearest to x / scale, (..., 32); ties to even, saturating, sign of zero kept."""
    value = round_magnitudes((x * _power(SCALE_BIAS - scales.to(x.dtype))).abs())
    # 0, .5, 1, 1.5 are codes 0..3; 2, 3 are 4, 5; 4, 6 are 6, 7.
    code = torch.where(value < 2, value * 2, torch.where(value < 4, value + 2, value / 2 + 4)).to(torch.uint8)
    return code | torch.signbit(x).to(torch.uint8) << 3


def _least_error(x: Tensor, candidates: list[Tensor]) -> Tensor:
    """Return, per block of (N, 32), the first candidate scale with the least squared rounding error; uint8 (N,)."""
    # Errors are in units of the last (largest) candidate, so that squares of tiny weights do not underflow.
    unit = x * _power(SCALE_BIAS - candidates[-1].to(x.dtype))
    magnitude = unit.abs()
    best, best_error = candidates[0], torch.full(x.shape[:-1], torch.inf, dtype=x.dtype, device=x.device)
    for scales in candidates:
        ratio = _power(scales.to(x.dtype) - candidates[-1].to(x.dtype))
        error = (round_magnitudes(magnitude / ratio) * ratio - magnitude).square_().sum(-1)
        better = error < best_error
        best = torch.where(better, scales, best)
        best_error = torch.where(better, error, best_error)
    return best


def _power(exponents: Tensor) -> Tensor:
    """Return 2**exponents as a factor (..., 1) for values (..., 32)."""
    return torch.exp2(exponents).unsqueeze(-1)


def pack(codes: Tensor) -> Tensor:
    """Pack uint8 codes (..., 32) into bytes (..., 16), the even element in the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def check_pair(blocks: Tensor, scales: Tensor) -> None:
    """Raise ValueError unless these are uint8 (..., G, 16) and uint8 (..., G)."""
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"blocks and scales are {blocks.dtype} and {scales.dtype}, expected uint8")
    if blocks.shape != (*scales.shape, BLOCK // 2):
        raise ValueError(
            f"blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)} do not match: expected (..., G, 16) "
            "and (..., G)"
        )
