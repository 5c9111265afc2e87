"""The next id of every row of logits: greedy, temperature, top-k, top-p, min-p; plain PyTorch, nothing sorted.

`sample` is the sampler of a CPU and the reference of `kernels.sampling`. What a row draws depends on its logits and
its own parameters alone, so neither on the batch nor on the row's place in it: the random numbers are Philox's, a
function of (seed, request, sample, position, id) without state. Logits that differ by a rounding draw the same but for
rare near-ties.

A draw is the id with the largest sum of logit / temperature and Gumbel noise, found in two steps that together have the
exact distribution: over blocks of 64 ids by their log-sum-exp, then over the ids of the block that won. That takes one
random number for 64 ids where the usual way takes 64. Filters apply in this order, each to what the one before it
left: temperature, top_k, top_p (the smallest set of likeliest ids whose probability reaches it), min_p (a share of the
largest probability). Of equal logits the lower id comes first, also where a filter cuts through them.

Legend: B rows, V ids, G = ceil(V / 64) blocks. Powers and logarithms are of base 2, which cost least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64
LOG2_E = math.log2(math.e)
# Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
PHILOX_ROUNDS = 10
PHILOX_FACTORS = (0xD2511F53, 0xCD9E8D57)
PHILOX_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
BLOCK_BIT = 1 << 31  # in the counter of a block's noise; absent in that of an id's
RADIX_DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, bits) of a 32-bit key, highest first


@dataclass(frozen=True)
class Draws:
    """How each row is sampled: tensors (B,) on the device of the logits. Values are used unchecked."""

    temperature: Tensor  # fp32, >= 0; 0 takes the likeliest id, whatever the filters
    top_k: Tensor  # int64; 0 keeps all
    top_p: Tensor  # fp32 in (0, 1]; 1 keeps all
    min_p: Tensor  # fp32 in [0, 1]; 0 keeps all
    seed: Tensor  # int64
    request: Tensor  # int64; of this and the next two, the low 32 bits count
    sample: Tensor  # int64
    position: Tensor  # int64


class _Limits(NamedTuple):
    """The filters of one row."""

    top_k: int
    top_p: float
    min_p: float
    scale: float  # log2(e) / temperature


def sample(
    logits: Tensor, draws: Draws, allowed: Tensor | None = None, *, logprobs: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return the next id of every row, int64 (B,), and the log of its probability, fp32 (B,).

    Args:
        logits: (B, V), fp32 or narrower; computed in fp32.
        allowed: int32 (B, ceil(V / 32)), or (1, ...) for all rows: bit i of word w is set if id 32 w + i may be drawn
            (the layout of llguidance's and xgrammar's token masks). None allows all.
        logprobs: whether probabilities are wanted; if not, None is returned in their place, which saves time.
    The probability is the raw one: of the softmax over all V logits, before `allowed`, temperature and filters.
    A row that allows nothing, or holds a NaN, yields an arbitrary id.
    Raises: ValueError if shapes disagree.
    """
    check(logits, draws, allowed)
    mask = None if allowed is None else _packed(allowed)
    greedy = draws.temperature == 0
    scale = LOG2_E / draws.temperature.where(~greedy, 1.0)  # (B,), bits per unit of logit
    tops, sums, normalizers = _statistics(logits, mask, draws.temperature.tolist(), logprobs=logprobs)
    lowest, last = torch.full_like(scale, -torch.inf), torch.full_like(draws.seed, logits.shape[1])
    filtered = ~greedy & ((draws.top_k > 0) | (draws.top_p < 1) | (draws.min_p > 0))
    for row in filtered.nonzero().flatten().tolist():
        limits = _Limits(int(draws.top_k[row]), *(float(x[row]) for x in (draws.top_p, draws.min_p, scale)))
        lowest[row], last[row] = _filter(_blocks(logits, mask, row), limits, tops[row], sums[row])

    scale, best, sampled = scale[:, None], tops.amax(-1, keepdim=True), not bool(greedy.all())
    scores = tops
    if sampled:
        noise = gumbel(draws, torch.zeros_like(draws.seed), tops.shape[1], BLOCK_BIT)  # (B, G)
        scores = tops.where(greedy[:, None], scale * (tops - best) + sums.log2() + noise)
    block = scores.argmax(-1)  # (B,), the first of equal ones
    ids = block[:, None] * BLOCK + torch.arange(BLOCK, device=logits.device)  # (B, 64)
    scores = values = _take(logits, mask, ids)
    if sampled:
        kept = (values > lowest[:, None]) | (values == lowest[:, None]) & (ids <= last[:, None])
        scores = scale * (values - best).masked_fill(~kept, -torch.inf) + gumbel(draws, block * BLOCK, BLOCK)
        scores = values.where(greedy[:, None], scores)
    chosen = ids.gather(1, scores.argmax(-1, keepdim=True))  # (B, 1)
    if normalizers is None:
        return chosen.squeeze(1), None
    return chosen.squeeze(1), logits.gather(1, chosen).squeeze(1).float() - normalizers


def check(logits: Tensor, draws: Draws, allowed: Tensor | None) -> None:
    """Raise ValueError unless the shapes are those `sample` takes."""
    num_rows, vocabulary = logits.shape
    if len(draws.temperature) != num_rows:
        raise ValueError(f"draws are for {len(draws.temperature)} rows, but logits have {num_rows}")
    words = -(-vocabulary // 32)
    if allowed is not None and (allowed.dtype != torch.int32 or allowed.shape not in ((num_rows, words), (1, words))):
        raise ValueError(
            f"allowed is {allowed.dtype} {tuple(allowed.shape)}; expected int32 ({num_rows} or 1, {words}), "
            f"one bit for each of {vocabulary} ids"
        )


def _packed(allowed: Tensor) -> Tensor:
    """Words of int32 (n, words) -> int64 (n, G), a block of ids each: -1 allows all of it, 0 none."""
    return torch.nn.functional.pad(allowed, (0, allowed.shape[1] % 2)).contiguous().view(torch.int64)


def _bits(blocks: Tensor) -> Tensor:
    """Unpack int64 (g,) to bool (g, 64)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    bits = blocks.contiguous().view(torch.uint8).view(-1, 8)[:, :, None] >> shifts & 1  # bytes go by lowest first
    return bits.view(torch.bool).flatten(1)


def _statistics(
    logits: Tensor, mask: Tensor | None, temperatures: list[float], *, logprobs: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return each block's largest allowed logit, its sum of powers relative to that, and the rows' normalizers.

    Row by row, so that a row stays in the cache from one step to the next. A mask costs only where it cuts a block.
    Returns: fp32 (B, G); fp32 (B, G), anything for greedy rows; fp32 (B,), in nats and over all ids, or None.
    """
    num_rows, vocabulary = logits.shape
    tops = logits.new_empty(num_rows, -(-vocabulary // BLOCK), dtype=torch.float32)
    sums = torch.ones_like(tops)
    normalizers = logits.new_empty(num_rows, dtype=torch.float32) if logprobs else None
    for row, temperature in enumerate(temperatures):
        values = _blocks(logits, None, row)  # (G, 64)
        torch.amax(values, -1, out=tops[row])
        if normalizers is not None:
            sums[row] = _sums(values, tops[row], LOG2_E)
            best = tops[row].amax()
            normalizers[row] = best + (sums[row] * ((tops[row] - best) * LOG2_E).exp2()).sum().log()
        if temperature != 0 and (normalizers is None or temperature != 1):
            sums[row] = _sums(values, tops[row], LOG2_E / temperature)
        if mask is not None:
            blocks = mask[row % len(mask)]
            tops[row, blocks == 0], sums[row, blocks == 0] = -torch.inf, 0.0
            cut = ((blocks != 0) & (blocks != -1)).nonzero().flatten()
            values = values[cut].where(_bits(blocks[cut]), -torch.inf)
            tops[row, cut] = values.amax(-1)
            if temperature != 0:
                sums[row, cut] = _sums(values, tops[row, cut], LOG2_E / temperature)
    return tops, sums, normalizers


def _blocks(logits: Tensor, mask: Tensor | None, row: int) -> Tensor:
    """Return one row as fp32 (G, 64), -inf where not allowed and behind the last id; it may share logits' memory."""
    values = logits[row].float()
    short = -len(values) % BLOCK
    values = (torch.nn.functional.pad(values, (0, short), value=-torch.inf) if short else values).view(-1, BLOCK)
    return values if mask is None else values.where(_bits(mask[row % len(mask)]), -torch.inf)


def _sums(values: Tensor, tops: Tensor, scale: float) -> Tensor:
    """Sums of 2^(scale (value - top)) of blocks: (G, 64), (G,) -> (G,); 0 for a block of -inf."""
    tops = tops.where(tops > -torch.inf, 0.0)
    return (values - tops[:, None]).mul_(scale).exp2_().sum(-1)


def _take(logits: Tensor, mask: Tensor | None, ids: Tensor) -> Tensor:
    """Return fp32 (B, n) logits at `ids` (B, n): -inf where not allowed, and where there is no such id."""
    inside = ids < logits.shape[1]
    ids = ids.where(inside, 0)
    if mask is not None:
        inside = inside & (mask.expand(len(logits), -1).gather(1, ids // BLOCK) >> ids % BLOCK & 1).bool()
    return logits.gather(1, ids).float().masked_fill(~inside, -torch.inf)


def _filter(blocks: Tensor, limits: _Limits, tops: Tensor, sums: Tensor) -> tuple[Tensor, int]:
    """Apply the filters to one row, (G, 64), and write the sums of what they leave into `sums`, (G,).

    Returns: the lowest logit that is left, and the last id that is left among those with this logit.
    """
    best = tops.amax()
    if not best.isfinite():  # nothing is allowed, or the row holds a NaN
        return best.new_tensor(-torch.inf), len(blocks) * BLOCK
    near = (tops >= _bound(limits, tops, sums)).nonzero().flatten()  # (g,), few unless the distribution is flat
    values = blocks[near] if len(near) < len(blocks) else blocks  # (g, 64)
    powers = ((values - best) * limits.scale).exp2_()
    lowest, last = best.new_tensor(-torch.inf), values.numel()  # the latter counts within `values`
    if limits.top_k > 0:
        lowest, last = _cut(values, values > -torch.inf, limits.top_k)
        powers.masked_fill_(~_kept(values, lowest, last), 0)
    if limits.top_p < 1:
        total = powers if limits.top_k > 0 else ((tops - best) * limits.scale).exp2_() * sums
        lowest, last = _cut(values, powers, limits.top_p * float(total.double().sum()))
    if limits.min_p > 0:
        floor = best + math.log2(limits.min_p) / limits.scale
        lowest, last = (floor, values.numel()) if floor > lowest else (lowest, last)
    sums.zero_()[near] = _sums(values.where(_kept(values, lowest, last), -torch.inf), tops[near], limits.scale)
    place = min(last, values.numel() - 1)
    return lowest, int(near[place // BLOCK]) * BLOCK + place % BLOCK


def _bound(limits: _Limits, tops: Tensor, sums: Tensor) -> float:
    """Return a logit below which nothing is left of a row with block maxima and sums (G,)."""
    best = float(tops.amax())
    if limits.top_k > 0:  # at least k values reach the k-th largest maximum
        return float(tops.topk(limits.top_k).values[-1]) if limits.top_k <= len(tops) else -math.inf
    if limits.top_p < 1:  # ids below (1 - p) / V together weigh less than what is left out; half of it for rounding
        total = float((((tops - best) * limits.scale).exp2_() * sums).sum())
        return best + math.log2(total * (1 - limits.top_p) / (2 * BLOCK * len(tops))) / limits.scale
    return best + math.log2(limits.min_p) / limits.scale


def _cut(values: Tensor, weights: Tensor, target: float) -> tuple[Tensor, int]:
    """Find the fewest largest values whose weights reach `target`, of equal values the first ones.

    By radix: the histogram of weights over a digit says in which bucket the target is reached, and only that is looked
    into further.

    Args:
        values: fp32 (..., 64), not NaN.
        weights: >= 0 in the same shape, some above 0.
        target: > 0; if the weights do not reach it, all that weigh anything are taken.
    Returns: the lowest value, and the flat index of the last one taken among those equal to it.
    """
    values, weights = values.flatten(), weights.flatten().double()
    keys = (values + 0.0).view(torch.int32)  # + 0 turns -0 into 0
    keys = keys ^ (keys >> 31 & 0x7FFFFFFF)  # ascend with the values
    left: Tensor | None = None
    for shift, bits in RADIX_DIGITS:
        key, weight = (keys, weights) if left is None else (keys[left], weights[left])
        digit = (key >> shift) + (1 << 10) if left is None else key >> shift & (1 << bits) - 1
        from_top = torch.bincount(digit, weight, 1 << bits).flip(0).cumsum(0)
        target = min(target, float(from_top[-1]))
        place = int(torch.searchsorted(from_top, target))
        target -= float(from_top[place - 1]) if place else 0.0  # stays above 0: what is taken off is less
        here = (digit == len(from_top) - 1 - place).nonzero().flatten()
        left = here if left is None else left[here]
    assert left is not None, "no digits"
    number = math.ceil(target / float(weights[left[0]]))
    return values[left[0]], int(left[min(number, len(left)) - 1])


def _kept(values: Tensor, lowest: Tensor, last: int) -> Tensor:
    """Return bool like `values`: those above `lowest`, and of those equal to it all up to flat index `last`."""
    kept = values >= lowest
    kept.view(-1)[last + 1 :] &= values.view(-1)[last + 1 :] > lowest
    return kept


def gumbel(draws: Draws, first: Tensor, count: int, bit: int = 0) -> Tensor:
    """Return Gumbel noise in bits for `count` ids from `first` on, fp32 (B, count).

    Args:
        first: int64 (B,), multiples of 4: ids, or blocks with `bit` BLOCK_BIT.
    """
    quads = torch.arange(-(-count // 4), device=first.device)
    counters = (
        (first[:, None] >> 2) + quads | bit,
        *(x[:, None] & WORD for x in (draws.position, draws.sample, draws.request)),
    )
    words = torch.stack(philox(counters, (draws.seed[:, None] & WORD, draws.seed[:, None] >> 32 & WORD)), -1)
    uniform = (words.flatten(1)[:, :count].float() * 2**-32 + 2**-33).clamp_(max=1 - 2**-24)  # in (0, 1)
    return -(-torch.log1p(-uniform)).log2()  # of an exponential variate, whose small values, large noise, are exact


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Return four random 32-bit words per counter of four words and key of two, by Philox4x32-10; all int64."""
    first, second, third, fourth = torch.broadcast_tensors(*counter)
    even, odd = torch.stack([first, third]), torch.stack([second, fourth])
    shape = (2, *[1] * first.ndim)
    factors = torch.tensor(PHILOX_FACTORS, device=even.device).view(shape)
    steps, keys = torch.tensor(PHILOX_STEPS, device=even.device).view(shape), torch.stack(key)
    for _ in range(PHILOX_ROUNDS):
        product = (even * factors).flip(0)  # 64 bits, as a negative number from 2**63 on
        even, odd = (product >> 32 & WORD).bitwise_xor_(odd).bitwise_xor_(keys), product & WORD
        keys = keys + steps & WORD
    return [even[0], odd[0], even[1], odd[1]]
