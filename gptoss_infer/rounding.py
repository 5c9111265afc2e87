"""Merging a delta into MXFP4 on the scales of the base, by rounding rules that need no data. What writes an export.

A fine-tune's delta is 10 to 100 times smaller than the steps of the grid, so the rule decides what is left of it:

- **nearest**: the nearest element, ties to the even code. Where the delta is under half a step, that is the base again.
- **stochastic**: one of the two elements around the value, drawn so that the value is the mean of what is written, each
  draw on its own. A weight may be off by a step, but no two weights err together, while a delta of low rank adds up.
- **systematic**: the same two elements with the same probabilities. The draws of a row share one number for the values
  that rise and one for those that fall, so that as many of each take a step as are expected to, give or take one.

Measured on normal weights, rows of 2,880, and deltas of rank 8 of 0.014% to 1.75% of the weights: the variance of
`systematic` as a share of that of `stochastic` is 1.0 for the error of a weight and of the output for inputs without a
mean, or of low rank, or with a mean of each column's own; 0.56 (smallest delta) to 0.26 for the output of inputs with a
mean in common; 0.94 to 0.85 for inputs in the row space of the delta; 0.72 to 0.36 for a row's projection on its delta.
Left out, since worse: carrying each error on to the next weight (it moves weights that had no reason to: the variance
of the output is 120 to 4 times as large), one number for what rises and falls together (projection: up to 24 times),
an order of the columns by how their inputs correlate (no gain on the inputs of a 135M model: 0.9 to 1.1 of the
variance). And what fits the weights to calibration inputs: coordinate descent on the error of the output over 64 to 256
kept inputs of each expert, its coherent part fed back (5 to 10 rounds). On the built-in model it kept 0.67 to 0.95 of
the gain at 0.5% where `systematic` kept 0.93 to 1.11, and 0.72 to 0.99 at 20% where that kept 1.00; there it also cost
other data 0.005 to 0.15 nats, `systematic` 0.001. Where a delta flips fewer codes of a row than its inputs have
dimensions, nothing that is unbiased can balance its errors over them.

Rules of all three:
- **scales** are the base's, never computed again. Magnitudes above 6 saturate.
- **no change, no new byte**: an element that keeps its value keeps its code, -0 included; so a block without a delta
  keeps its bytes. A block of scale byte 255 (NaN) keeps them whatever the delta.
- **zero**: what becomes zero keeps the sign it had.
- **clipping** (not of `nearest`): a delta that points outward from magnitude 6 is lost. The rest of its row is scaled
  up so that the written delta is expected to have projection 1 on the one asked for, by a factor of 2 at most: a row
  that loses more than half of its squared delta stays below 1, one that loses all keeps its bytes. The factor is
  exact unless a delta of 2 scales or more clips another element. It is 1 where squares of a row overflow or vanish
  in fp32 (deltas above 1e19, below 1e-19).
- **randomness** is a hash of seed, name and the index of the weight: the bytes are the same for any number of threads,
  size of chunks, order of matrices and device.
- **resolution**: deltas are taken to the nearest 2**-26 of a scale and numbers are drawn in 2**-26 of a step, so no
  probability is off by more than 2**-25, 0.03% of a delta of a ten-thousandth of a step.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gptoss_infer.mxfp4 import BLOCK, SCALE_BIAS, SCALE_NAN, check_pair, pair_values

Rounding = Literal["nearest", "stochastic", "systematic"]
# In `gptoss-train study` on the built-in model (3 tasks, 4 sizes of delta from 0.008% to 1.9% of |W|, 2 training seeds,
# 3 draws) it kept as much of the gain as `stochastic`, within the intervals, with 1 to 20% less divergence from the
# merge, and added a fifth as much loss on other data at 1.9% (0.00004 nats). Biases that take back the mean error take
# another 1 to 17% off the divergence. On a 135M model, see the README.
DEFAULT: Rounding = "systematic"
MAX_COMPENSATION = 2.0
CHUNK_VALUES = 2**19  # worked on at a time, in whole rows: 2 MiB of fp32, so that the passes over them stay in cache
BITS = 26  # of fixed point, which leaves int32 room for the largest number in play: 6 + 13
ONE = 2**BITS


class _Tables(NamedTuple):
    pairs: Tensor  # (256,): the two elements of a byte in fp32, as one word of 8 bytes
    scale: Tensor  # (256,): fp32 2**(byte - 127), and 0 for NaN
    inverse: Tensor  # (256,): fp32 2**(127 - byte), and 0 for NaN


def merge(base: tuple[Tensor, Tensor], delta: Tensor, rounding: Rounding, *, seed: int = 0, name: str = "") -> Tensor:
    """Return the blocks of base + delta on the base's scales, by the rules in the module docstring.

    Args:
        base: blocks uint8 (out, G, 16) and scales uint8 (out, G) of one matrix, such as one expert's.
        delta: floating (out, 32 G); every value finite. Taken in fp32.
        seed: of the run.
        name: of the matrix: one that no other matrix of the checkpoint has, so that it gets numbers of its own.
    Returns: uint8 (out, G, 16), on the device of the base. The scales to go with them are the base's.
    Raises: ValueError if shapes or dtypes disagree, or a delta is not finite.
    """
    blocks, scales = base
    check_pair(blocks, scales)
    if scales.dim() != 2 or delta.shape != (len(scales), scales.shape[1] * BLOCK):
        raise ValueError(
            f"delta has shape {tuple(delta.shape)} and scales {tuple(scales.shape)}; expected (out, 32 G) and (out, G)"
        )
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding is {rounding!r}; choose one of {', '.join(get_args(Rounding))}")
    columns = delta.shape[1]
    delta = delta.detach().unflatten(1, (-1, BLOCK))  # (out, G, 32)
    written = torch.empty_like(blocks)
    rows = max(1, CHUNK_VALUES // columns)
    scratch = torch.empty(4, min(rows, len(delta)), *delta.shape[1:], device=blocks.device)
    noise = _Noise(seed, name, scratch[0].numel(), blocks.device)
    for start in range(0, len(delta), rows):
        part = slice(start, start + rows)
        asked = delta[part].float()
        work = scratch[:, : len(asked)]
        if not torch.abs(asked, out=work[0]).amax().isfinite():
            bad = delta.numel() - int(torch.isfinite(delta).sum())
            raise ValueError(f"{bad} of {delta.numel()} values of the delta are NaN or infinite")
        position = _positions(blocks[part], scales[part], asked, rounding, work)
        if rounding == "nearest":
            half = torch.bitwise_right_shift(position, BITS, out=work[0].view(torch.int32)).bitwise_and_(1)
            position.add_(half).add_(ONE // 2 - 1)  # an odd code has its half rounded up
        elif rounding == "stochastic":
            position += noise.draw(start * columns, work[0].view(torch.int32), work[1].view(torch.int32))
        else:
            position += _shared_draws(position, asked, noise, start, work)
        written[part] = _pack(position.bitwise_right_shift_(BITS), blocks[part], work[0])
    return written


def _positions(blocks: Tensor, scales: Tensor, delta: Tensor, rounding: Rounding, scratch: Tensor) -> Tensor:
    """Return where on the line of codes -7..7 each base + delta lies: int32 (R, G, 32) in 2**-26 of a code.

    Between two codes, that is the probability of the upper one. For `nearest` a position is on a code or half-way
    between two only where the sum is so exactly. Uses all four of scratch (4, R, G, 32) and returns the third.
    """
    tables, number = _tables(blocks.device), scales.reshape(-1).int()
    words = scratch[1].view(torch.int64).view(-1)
    torch.index_select(tables.pairs, 0, blocks.reshape(-1).int(), out=words)
    element = scratch[1]  # in units of the block's scale, as is what follows
    moved = torch.mul(delta, tables.inverse.index_select(0, number).view(*scales.shape, 1), out=scratch[0])
    if rounding != "nearest":
        moved *= _compensation(
            moved, element, delta, tables.scale.index_select(0, number).view(*scales.shape, 1), scratch[2:]
        )
    moved.clamp_(-13, 13)  # more than from one end to the other, less than would overflow
    position, spare = scratch[2].view(torch.int32), scratch[3].view(torch.int32)
    if rounding == "nearest":
        # What is cut off leaves a 1 behind: below any tie, and above what the halving further down cuts off.
        floor = torch.floor(moved.mul_(ONE // 4), out=scratch[3])
        position.copy_(floor).mul_(2)
        position.add_(spare.copy_(moved.sub_(floor).ceil_())).mul_(2)
    else:
        position.copy_(moved.mul_(ONE).round_())
    position += spare.copy_(element.mul_(ONE))
    # Codes are 2 to the unit up to magnitude 2, then 1 up to 4, then 1/2 up to 6.
    position.clamp_(-6 * ONE, 6 * ONE)
    torch.clamp(position, -4 * ONE, 4 * ONE, out=spare).add_(position).bitwise_right_shift_(1)
    return position.clamp_(-2 * ONE, 2 * ONE).add_(spare)


def _compensation(moved: Tensor, element: Tensor, delta: Tensor, scale: Tensor, scratch: Tensor) -> Tensor:
    """Return the factor (R, 1, 1) on a row's delta that makes up for saturation; `scale` is (R, G, 1)."""
    lost, asked = scratch
    torch.add(moved, element, out=lost)
    lost.sub_(torch.clamp(lost, -6, 6, out=asked)).mul_(scale).mul_(delta)
    torch.mul(delta, delta, out=asked)
    sums = scratch.flatten(2)  # (2, R, 32 G)
    width = sums.shape[2]
    while width > 1:  # sums in an order that is the same on every device
        half = width // 2
        sums[..., :half] += sums[..., width - half : width]
        width -= half
    lost, asked = sums[..., :1].unsqueeze(-1)
    factor = asked / torch.maximum(asked - lost, asked / MAX_COMPENSATION)
    return factor.nan_to_num_(1.0)  # rows without a delta, or with one whose square overflows


def _shared_draws(position: Tensor, delta: Tensor, noise: _Noise, start: int, scratch: Tensor) -> Tensor:
    """Return what `systematic` adds: the sum so far in the row, per direction, from a start drawn for each row."""
    rise, fall, falls = scratch[0].view(torch.int32), scratch[1].view(torch.int32), scratch[3].view(torch.int32)
    torch.bitwise_right_shift(delta.view(torch.int32), 31, out=falls)  # -1 where the delta is negative, else 0
    # Only the fractions of the sums matter, and the base's own positions are whole numbers: int32 may wrap.
    rows = (len(delta), -1)
    torch.bitwise_and(position, falls, out=rise)
    torch.cumsum(rise.view(rows), 1, dtype=torch.int32, out=fall.view(rows))
    torch.cumsum(position.view(rows), 1, dtype=torch.int32, out=rise.view(rows))
    first, second = noise.draw_per_row(start, len(delta))
    rise.sub_(fall).add_(first)
    fall.add_(second).sub_(rise).bitwise_and_(falls)
    return rise.add_(fall).sub_(position).bitwise_and_(ONE - 1)


def _pack(code: Tensor, base: Tensor, scratch: Tensor) -> Tensor:
    """Return the bytes (R, G, 16) of int32 codes -7..7; a zero takes its sign from the base."""
    pairs = scratch.view(torch.int8).view(-1)[: code.numel()].view_as(code).copy_(code).view(torch.int16)
    byte = (pairs & 0x0F).bitwise_or_((pairs >> 4).bitwise_and_(0xF0)).to(torch.uint8)
    # Nibble by nibble from two's complement to sign and magnitude: where negative, -n = ~n + 1.
    negative = byte & 0x88
    one = negative >> 3
    byte.bitwise_xor_(one * 15).add_(one).bitwise_or_(negative)
    zero = (byte & 0x77).add_(0x77).bitwise_not_().bitwise_and_(0x88)
    return byte.bitwise_or_(zero.bitwise_and_(base))


class _Noise:
    """Numbers 0..2**26 - 1 by the index of a weight, hashed with keys: the same for any split of the work."""

    def __init__(self, seed: int, name: str, count: int, device: torch.device) -> None:
        digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=12).digest()
        self.keys = [_int32(int.from_bytes(digest[at : at + 4], "little")) for at in (0, 4, 8)]
        # 2**32 / golden ratio: indices far apart from the start. int32 products and sums wrap on every device.
        self.steps = torch.arange(count, dtype=torch.int32, device=device) * _int32(0x9E3779B9)

    def draw(self, start: int, out: Tensor, spare: Tensor) -> Tensor:
        """Return numbers for indices `start` and on in `out`, int32; `spare` is scratch of its shape."""
        torch.add(self.steps[: out.numel()].view_as(out), _int32(start * 0x9E3779B9 + self.keys[0]), out=out)
        return self._hash(out, spare, self.keys[1])

    def draw_per_row(self, start: int, rows: int) -> Tensor:
        """Return two numbers for each row from `start` on: int32 (2, rows, 1, 1)."""
        index = torch.arange(start, start + rows, dtype=torch.int32, device=self.steps.device)
        both = torch.stack([2 * index, 2 * index + 1]).mul_(_int32(0x9E3779B9)).add_(self.keys[0])
        return self._hash(both, torch.empty_like(both), self.keys[2])[..., None, None]

    def _hash(self, x: Tensor, spare: Tensor, key: int) -> Tensor:
        """Mix int32 in place. Multipliers and shifts: lowbias32 of Wellons' hash-prospector, with a key between."""
        for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            torch.bitwise_right_shift(x, shift, out=spare).bitwise_and_(2 ** (32 - shift) - 1)  # >> repeats the sign
            x.bitwise_xor_(spare).mul_(_int32(multiplier)).bitwise_xor_(key)
        return x.bitwise_right_shift_(32 - BITS).bitwise_and_(ONE - 1)  # the upper bits are the best mixed


def _int32(number: int) -> int:
    """Wrap into -2**31..2**31 - 1."""
    return (number + 2**31) % 2**32 - 2**31


@functools.cache
def _tables(device: torch.device) -> _Tables:
    exponents = torch.arange(256, dtype=torch.float64) - SCALE_BIAS
    powers = torch.stack([exponents.exp2(), (-exponents).exp2()]).float()
    powers[:, SCALE_NAN] = 0
    return _Tables(pair_values(torch.float32, device).view(torch.int64).view(-1), *powers.to(device))
