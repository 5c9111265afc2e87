"""The next id of every row of logits in Triton; what is computed, and how, is told in `gptoss_infer.sampling`.

    statistics   one pass over the logits: maximum and sum of powers of every block of 64 ids
    threshold    rows with filters alone: bisection, over the few blocks that can matter, for the lowest logit left
    statistics   again, those rows alone: sums of what is left
    select       noise for the blocks, the block, noise for its ids, the id; its log-probability

The random numbers are the reference's, bit for bit, and so the ids, but for near-ties that rounding decides. Nothing is
sorted, the host waits for nothing, and launches depend on shapes alone: a CUDA graph can hold them.

Legend: B rows, V ids, G = ceil(V / 64) blocks; a program of `statistics` takes a chunk of CHUNK blocks.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_infer import sampling
from gptoss_infer.kernels.plans import Tile
from gptoss_infer.sampling import Draws, check

BLOCK = tl.constexpr(sampling.BLOCK)
LOG2_E = tl.constexpr(sampling.LOG2_E)
BLOCK_BIT = tl.constexpr(sampling.BLOCK_BIT)
CHUNK = 64  # blocks: 16 KiB of logits
SEARCHED = 32  # blocks that `threshold` looks at at a time
STATISTICS, THRESHOLD, SELECT = Tile(1, 1, 4, 1), Tile(1, 1, 4, 1), Tile(1, 1, 8, 1)


@triton.jit
def load_ids(logits, allowed, ids, size):  # type: ignore[no-untyped-def]
    """Logits of one row in fp32: -inf where not allowed, and where there is no such id."""
    inside = ids < size
    if allowed is not None:
        words = tl.load(allowed + (ids >> 5), mask=inside, other=0)
        inside = inside & ((words >> (ids & 31)) & 1 == 1)
    return tl.load(logits + ids, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def finite(x):  # type: ignore[no-untyped-def]
    """x, or 0 for -inf, from which nothing could be subtracted."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def is_filtered(temperature, top_k, top_p, min_p, row):  # type: ignore[no-untyped-def]
    """Whether a row has a filter that acts."""
    some = (tl.load(top_k + row) > 0) | (tl.load(top_p + row) < 1) | (tl.load(min_p + row) > 0)
    return (tl.load(temperature + row) > 0) & some


@triton.jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    logits, allowed, temperature, top_k, top_p, min_p, lowest, last, tops, sums, raw_tops, raw_sums,
    size, stride_logits, stride_allowed, AGAIN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write tops and sums (B, G) of a chunk of blocks, and the same of all its ids, (B, chunks), for the normalizer.

    AGAIN: for rows with filters alone, and sums alone, of what `lowest` and `last` leave.
    """
    chunk, row = tl.program_id(0), tl.program_id(1)
    if AGAIN:  # noqa: SIM102 - decided when the kernel is compiled
        if not is_filtered(temperature, top_k, top_p, min_p, row):
            return
    logits += row.to(tl.int64) * stride_logits
    heat = tl.load(temperature + row)
    scale = LOG2_E / tl.where(heat == 0, 1.0, heat)
    block = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # (CHUNK, 64)
    num_blocks = tl.cdiv(size, BLOCK)
    place = row.to(tl.int64) * num_blocks + block
    values = load_ids(logits, None, ids, size)
    if not AGAIN:
        top = tl.max(tl.max(values, 1), 0)
        powers = tl.exp2((values - finite(top)) * LOG2_E)
        at = row * tl.num_programs(0) + chunk
        tl.store(raw_tops + at, top)
        tl.store(raw_sums + at, tl.sum(tl.sum(powers, 1), 0))
    if allowed is not None:
        values = load_ids(logits, allowed + row.to(tl.int64) * stride_allowed, ids, size)
    if AGAIN:
        top = tl.load(tops + place, mask=block < num_blocks, other=float("-inf"))  # (CHUNK,)
        floor = tl.load(lowest + row)
        kept = (values > floor) | ((values == floor) & (ids <= tl.load(last + row)))
        values = tl.where(kept, values, float("-inf"))
    else:
        top = tl.max(values, 1)
        tl.store(tops + place, top, mask=block < num_blocks)
    powers = tl.exp2((values - finite(top)[:, None]) * scale)
    tl.store(sums + place, tl.sum(powers, 1), mask=block < num_blocks)


@triton.jit
def key_of(values):  # type: ignore[no-untyped-def]
    """uint32 that ascend with fp32 values."""
    bits = (values + 0.0).to(tl.uint32, bitcast=True)  # + 0 turns -0 into 0
    return tl.where(bits >> 31 == 0, bits | 0x80000000, bits ^ 0xFFFFFFFF)


@triton.jit
def value_of(key):  # type: ignore[no-untyped-def]
    """The fp32 of a key."""
    return tl.where(key >> 31 == 1, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def kth_largest(values, k):  # type: ignore[no-untyped-def]
    """The k-th largest of a tile of values, k at most their number; -inf among them are the smallest."""
    keys = key_of(values)
    found = tl.max(keys * 0, 0)
    unit = found + 0x80000000
    for _ in range(0, 32):
        more = found | unit
        found = tl.where(tl.sum((keys >= more).to(tl.int32), 0) >= k, more, found)
        unit = unit >> 1
    return value_of(found)


@triton.jit
def nearby(logits, allowed, near, i, num_near, size, SEARCHED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The i-th SEARCHED blocks of a list: ids and logits, (SEARCHED * 64,) each."""
    n = tl.arange(0, SEARCHED * BLOCK)
    at = i * SEARCHED + n // BLOCK
    ids = tl.load(near + at, mask=at < num_near, other=0) * BLOCK + n % BLOCK
    ids = tl.where(at < num_near, ids, size)
    return ids, load_ids(logits, allowed, ids, size)


@triton.jit
def weigh(  # type: ignore[no-untyped-def]
    logits, allowed, near, num_near, size, low, last, best, scale, keys, COUNT: tl.constexpr, SEARCHED: tl.constexpr
):
    """How much those ids weigh whose logits' keys reach each of `keys`, (4,); of those that `low` and `last` keep.

    COUNT: an id weighs 1; otherwise its power.
    """
    total = tl.zeros((4,), tl.float32)
    for i in range(0, tl.cdiv(num_near, SEARCHED)):
        ids, values = nearby(logits, allowed, near, i, num_near, size, SEARCHED)
        kept = (values > low) | ((values == low) & (ids <= last))
        weights = kept.to(tl.float32) if COUNT else tl.where(kept, tl.exp2((values - best) * scale), 0.0)
        reached = key_of(values)[:, None] >= keys[None, :]  # (ids, 4)
        total += tl.sum(tl.where(reached, weights[:, None], 0.0), 0)
    return total


@triton.jit
def cut(  # type: ignore[no-untyped-def]
    logits, allowed, near, num_near, size, low, last, best, scale, target, COUNT: tl.constexpr, SEARCHED: tl.constexpr
):
    """The lowest of the fewest largest logits that weigh `target`, and the last id of those equal to it."""
    step = tl.arange(0, 4).to(tl.uint32)
    found = tl.max(step * 0, 0)
    unit = found + (1 << 30)
    for _ in range(0, 16):  # two bits at a time, highest first
        keys = found + step * unit
        weights = weigh(logits, allowed, near, num_near, size, low, last, best, scale, keys, COUNT, SEARCHED)
        found = tl.max(tl.where((weights >= target) | (step == 0), keys, 0), 0)
        unit = unit >> 2
    floor = tl.where(found == 0, low, value_of(found))  # 0 if all together do not reach it: then all are kept
    above = weigh(
        logits, allowed, near, num_near, size, low, last, best, scale, (found + 1) + 0 * step, COUNT, SEARCHED
    )
    above = tl.max(above, 0)
    each = 1.0 if COUNT else tl.exp2((floor - best) * scale)
    wanted = tl.maximum(tl.ceil((target - above) / each), 1.0).to(tl.int32)
    until = tl.where(floor > low, size, last)  # where the last filter ended among equal ones
    seen, place = wanted * 0, wanted * 0 - 1
    for i in range(0, tl.cdiv(num_near, SEARCHED)):
        ids, values = nearby(logits, allowed, near, i, num_near, size, SEARCHED)
        equal = (values == floor) & (ids <= until)
        number = seen + tl.cumsum(equal.to(tl.int32), 0)
        place = tl.maximum(place, tl.max(tl.where(equal & (number <= wanted), ids, -1), 0))
        seen += tl.sum(equal.to(tl.int32), 0)
    return floor, tl.where(found == 0, last, place)


@triton.jit
def threshold_kernel(  # type: ignore[no-untyped-def]
    logits, allowed, temperature, top_k, top_p, min_p, tops, sums, near, lowest, last,
    size, stride_logits, stride_allowed, BLOCKS: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    """Write what the filters of a row leave: the lowest logit, and the last id with it. near: int32 (B, G), scratch."""
    row = tl.program_id(0)
    tl.store(lowest + row, float("-inf"))
    tl.store(last + row, size)
    if not is_filtered(temperature, top_k, top_p, min_p, row):
        return
    wide = row.to(tl.int64)
    logits += wide * stride_logits
    if allowed is not None:
        allowed += wide * stride_allowed
    num_blocks = tl.cdiv(size, BLOCK)
    scale = LOG2_E / tl.load(temperature + row)
    k, p, m = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    block = tl.arange(0, BLOCKS)
    top = tl.load(tops + wide * num_blocks + block, mask=block < num_blocks, other=float("-inf"))  # (BLOCKS,)
    best = tl.max(top, 0)
    if best == float("-inf"):
        return
    weight = tl.exp2((top - best) * scale)
    total = tl.sum(weight * tl.load(sums + wide * num_blocks + block, mask=block < num_blocks, other=0.0), 0)

    # A logit below which nothing is left; see `gptoss_infer.sampling`.
    bound = best + tl.log2(m) / scale
    if p < 1:
        bound = best + tl.log2(total * (1 - p) / (2 * BLOCK * num_blocks)) / scale
    if k > 0:
        bound = tl.where(k <= num_blocks, kth_largest(top, tl.minimum(k, num_blocks)), float("-inf"))
    is_near = (top >= bound) & (top > float("-inf"))
    near += wide * num_blocks
    tl.store(near + tl.cumsum(is_near.to(tl.int32), 0) - 1, block, mask=is_near)
    num_near = tl.sum(is_near.to(tl.int32), 0)
    tl.debug_barrier()  # what other threads stored is read from here on

    floor, place = best * 0 + float("-inf"), num_near * 0 + size
    if k > 0:
        floor, place = cut(
            logits, allowed, near, num_near, size, floor, place, best, scale, k.to(tl.float32), True, SEARCHED
        )
    if p < 1:
        if k > 0:
            every = tl.zeros((4,), tl.uint32)
            left = weigh(logits, allowed, near, num_near, size, floor, place, best, scale, every, False, SEARCHED)
            total = tl.max(left, 0)
        floor, place = cut(logits, allowed, near, num_near, size, floor, place, best, scale, p * total, False, SEARCHED)
    if m > 0:
        share = best + tl.log2(m) / scale
        place = tl.where(share > floor, size, place)
        floor = tl.maximum(share, floor)
    tl.store(lowest + row, floor)
    tl.store(last + row, place)


@triton.jit
def gumbel(first, seed, request, sample, position, BIT: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gumbel noise in bits for COUNT ids from `first` on, both multiples of 4: `gptoss_infer.sampling.gumbel`."""
    quad = (first // 4 + tl.arange(0, COUNT // 4)).to(tl.uint32) | BIT
    zero = quad * 0
    w0, w1, w2, w3 = tl.philox(
        seed, quad, zero + position.to(tl.uint32), zero + sample.to(tl.uint32), zero + request.to(tl.uint32)
    )
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (COUNT,))  # w0 w1 w2 w3 of every quad, in turn
    uniform = tl.minimum(words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 1 - 2.0**-24)
    rest = 1 - uniform
    # log1p by the quotient that makes up for the rounding of `rest`: exact for a small number, which is large noise.
    variate = tl.where(rest == 1, uniform, -tl.log(rest) * (uniform / (1 - rest)))
    return -tl.log2(variate)


@triton.jit
def select_kernel(  # type: ignore[no-untyped-def]
    logits, allowed, temperature, seed, request, sample, position, lowest, last, tops, sums, raw_tops, raw_sums,
    chosen, logprobs, size, stride_logits, stride_allowed, num_chunks, BLOCKS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Write the id of a row, int64 (B,), and its log-probability, fp32 (B,), if that is wanted."""
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    logits += wide * stride_logits
    if allowed is not None:
        allowed += wide * stride_allowed
    heat = tl.load(temperature + row)
    greedy = heat == 0
    scale = LOG2_E / tl.where(greedy, 1.0, heat)
    seed, request, sample, position = (
        tl.load(seed + row), tl.load(request + row), tl.load(sample + row), tl.load(position + row)
    )  # fmt: skip
    num_blocks = tl.cdiv(size, BLOCK)
    block = tl.arange(0, BLOCKS)
    inside = block < num_blocks
    top = tl.load(tops + wide * num_blocks + block, mask=inside, other=float("-inf"))  # (BLOCKS,)
    best = finite(tl.max(top, 0))
    total = tl.load(sums + wide * num_blocks + block, mask=inside, other=0.0)
    noise = gumbel(0, seed, request, sample, position, BLOCK_BIT, BLOCKS)
    scores = tl.where(greedy, top, scale * (top - best) + tl.log2(total) + noise)
    won = tl.argmax(tl.where(inside, scores, float("-inf")), 0)  # the first of equal ones

    ids = won * BLOCK + tl.arange(0, BLOCK)
    values = load_ids(logits, allowed, ids, size)
    floor = tl.load(lowest + row)
    kept = (values > floor) | ((values == floor) & (ids <= tl.load(last + row)))
    noise = gumbel(won * BLOCK, seed, request, sample, position, 0, BLOCK)
    scores = tl.where(kept, scale * (values - best) + noise, float("-inf"))
    token = won * BLOCK + tl.argmax(tl.where(greedy, values, scores), 0)
    tl.store(chosen + row, token.to(tl.int64))
    if logprobs is not None:
        chunk = tl.arange(0, CHUNKS)
        at = row * num_chunks + chunk
        top = tl.load(raw_tops + at, mask=chunk < num_chunks, other=float("-inf"))
        best = tl.max(top, 0)
        total = tl.load(raw_sums + at, mask=chunk < num_chunks, other=0.0)
        total = tl.sum(total * tl.exp2((top - best) * LOG2_E), 0)
        tl.store(logprobs + row, tl.load(logits + token).to(tl.float32) - best - tl.log(total))


def sample(
    logits: Tensor, draws: Draws, allowed: Tensor | None = None, *, logprobs: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return the next id of every row, int64 (B,), and its log-probability, fp32 (B,): `gptoss_infer.sampling.sample`.

    Args:
        logits: (B, V), bf16 or fp32, with ids side by side.
    """
    check(logits, draws, allowed)
    assert logits.stride(1) == 1, f"ids lie apart: strides {logits.stride()}"
    num_rows, size = logits.shape
    num_blocks, device = triton.cdiv(size, sampling.BLOCK), logits.device
    num_chunks = triton.cdiv(num_blocks, CHUNK)
    tops, sums = torch.empty(2, num_rows, num_blocks, dtype=torch.float32, device=device)
    raw_tops, raw_sums = torch.empty(2, num_rows, num_chunks, dtype=torch.float32, device=device)
    lowest, last = torch.empty(num_rows, device=device), torch.empty(num_rows, dtype=torch.int32, device=device)
    near = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=device)
    chosen = torch.empty(num_rows, dtype=torch.int64, device=device)
    found = torch.empty(num_rows, dtype=torch.float32, device=device) if logprobs else None
    if allowed is not None:
        allowed = allowed.contiguous().expand(num_rows, -1)  # one row for all has no stride
    strides = logits.stride(0), 0 if allowed is None else allowed.stride(0)
    columns = [getattr(draws, field.name).contiguous() for field in fields(Draws)]
    filters, counters = columns[:4], columns[4:]
    blocks = triton.next_power_of_2(num_blocks)

    def statistics(again: bool) -> None:
        statistics_kernel[(num_chunks, num_rows)](
            logits, allowed, *filters, lowest, last, tops, sums, raw_tops, raw_sums, size, *strides,
            AGAIN=again, CHUNK=CHUNK, **STATISTICS.options,
        )  # fmt: skip

    with torch.cuda.device_of(logits):
        statistics(again=False)
        threshold_kernel[(num_rows,)](
            logits, allowed, *filters, tops, sums, near, lowest, last, size, *strides,
            BLOCKS=blocks, SEARCHED=SEARCHED, **THRESHOLD.options,
        )  # fmt: skip
        statistics(again=True)
        select_kernel[(num_rows,)](
            logits, allowed, filters[0], *counters, lowest, last, tops, sums, raw_tops, raw_sums,
            chosen, found, size, *strides, num_chunks,
            BLOCKS=max(4, blocks), CHUNKS=triton.next_power_of_2(num_chunks), **SELECT.options,
        )  # fmt: skip
    return chosen, found
