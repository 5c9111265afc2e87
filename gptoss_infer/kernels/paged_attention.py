"""Attention of generation in Triton, over keys and values in pages: prompts in chunks, then token by token.

    prefill   several new tokens of each of several sequences; a program takes a tile of them and one query head
    decode    one new token of each; a program takes all query heads of a kv head and a part of the keys
    shared    decode of sequences with a beginning in common: its keys are read once for all of them
    merge     adds up the parts, and the sink, once

What a sequence yields does not depend, to the bit, on what else is in the batch: the cuts between parts follow from its
own length. (Parts that are shared are computed in larger products, whose sums a GPU may take in another order.) Layers
with a window need no parts: decode finishes there. Tables and reference are in `gptoss_infer.page_tables`.

Legend: N rows of a step, H query heads, K key/value heads, D head size, T tokens of a page; B sequences of P pages.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_infer.kernels.plans import Tile, plan_for
from gptoss_infer.page_tables import MAX_SPLITS, SPLIT_TOKENS, Batch

LOG2_E = tl.constexpr(math.log2(math.e))
MERGE = Tile(1, 1, 4, 1)
CUTS = {"MAX_SPLITS": MAX_SPLITS, "SPLIT_TOKENS": SPLIT_TOKENS}


class Plan(NamedTuple):
    """Tiles of the kernels. A tile of keys is a page, whatever `cols` says."""

    prefill: Tile
    decode: Tile
    shared: Tile


# Not timed yet. Prefill: no spills, and warpgroup products on sm_90. Decode waits for memory: pages in flight count. A
# page's number is loaded before the page, so that of 5 stages 2 hold pages.
PLANS: dict[str, Plan] = {
    "sm_80": Plan(Tile(128, 64, 8, 5), Tile(16, 64, 4, 5), Tile(64, 64, 4, 5)),
    "sm_90": Plan(Tile(128, 64, 8, 5), Tile(16, 64, 4, 5), Tile(64, 64, 4, 5)),
    "sm_100": Plan(Tile(128, 64, 8, 5), Tile(16, 64, 4, 5), Tile(64, 64, 4, 5)),
    "gfx942": Plan(Tile(128, 64, 4, 2), Tile(16, 64, 4, 2), Tile(64, 64, 4, 2)),
}
INTERPRETED = Plan(Tile(32, 16, 1, 1), Tile(16, 16, 1, 1), Tile(16, 16, 1, 1))


@triton.jit
def split_tokens_of(length, MAX_SPLITS: tl.constexpr, SPLIT_TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """`split_tokens` on the GPU, up to 2^15 times the smallest."""
    size = SPLIT_TOKENS + 0 * length
    for _ in tl.static_range(15):
        size = tl.where(size * MAX_SPLITS < length, size * 2, size)
    return size


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    acc, top, total, queries, keys, values, pages, begin, end, own, stride_page, window,
    COMPARE: tl.constexpr, WINDOWED: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Take keys from `begin`, where a page begins, to `end` into the running maximum (in bits), sum and result.

    keys, values: of one kv head. pages: of the sequence. own: (rows,), each row's own key, the last that it sees.
    Without COMPARE every row sees every key; with it, nothing is read from `end` on.
    """
    cols = tl.arange(0, PAGE)
    inner = cols[:, None] * D + tl.arange(0, D)[None, :]
    for first in range(begin, end, PAGE):
        page = tl.load(pages + first // PAGE).to(tl.int64) * stride_page
        inside = (first + cols < end)[:, None]
        key = tl.load(keys + page + inner, mask=inside, other=0.0) if COMPARE else tl.load(keys + page + inner)
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * (LOG2_E * D**-0.5)  # (rows, PAGE)
        if COMPARE:
            distance = own[:, None] - (first + cols)[None, :]
            seen = distance >= 0
            if WINDOWED:
                seen = seen & (distance < window)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        value = tl.load(values + page + inner, mask=inside, other=0.0) if COMPARE else tl.load(values + page + inner)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["max_pages", "window"])
def prefill_kernel(  # type: ignore[no-untyped-def]
    q, keys, values, sinks, pages, own, rows, lengths, out, max_pages, stride_page, window,
    WINDOWED: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write a tile of new tokens of one sequence and one head. q, out: (N, H, D)."""
    head, sequence = tl.program_id(0), tl.program_id(2)
    tile = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS  # the last see most: they go first
    length = tl.load(lengths + sequence)
    if tile >= length:
        return
    heads = tl.num_programs(0)
    r = tl.arange(0, ROWS)
    place = r[:, None] * (heads * D) + tl.arange(0, D)[None, :]
    base = ((tl.load(rows + sequence) + tile).to(tl.int64) * heads + head) * D
    inside = (tile + r < length)[:, None]
    queries = tl.load(q + base + place, mask=inside, other=0.0)  # (ROWS, D)
    first = tl.load(own + sequence) + tile  # the first row's own key
    end = first + tl.minimum(length - tile, ROWS)
    keys += (head // GROUP) * (PAGE * D)
    values += (head // GROUP) * (PAGE * D)
    pages += sequence * max_pages

    top = tl.zeros((ROWS,), tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2_E
    total, acc = tl.full((ROWS,), 1.0, tl.float32), tl.zeros((ROWS, D), tl.float32)
    begin = first * 0
    if WINDOWED:
        begin = tl.maximum(first - window + 1, 0) // PAGE * PAGE
    else:
        diagonal = (first + 1) // PAGE * PAGE  # every row sees every key before it
        acc, top, total = attend(
            acc, top, total, queries, keys, values, pages, begin, diagonal, first + r, stride_page, window,
            False, WINDOWED, D, PAGE,
        )  # fmt: skip
        begin = diagonal
    acc, top, total = attend(
        acc, top, total, queries, keys, values, pages, begin, end, first + r, stride_page, window,
        True, WINDOWED, D, PAGE,
    )  # fmt: skip
    tl.store(out + base + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["max_pages", "window"])
def decode_kernel(  # type: ignore[no-untyped-def]
    q, keys, values, sinks, pages, own, rows, done, out, parts, sums, max_pages, stride_page, window,
    WINDOWED: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    MAX_SPLITS: tl.constexpr, SPLIT_TOKENS: tl.constexpr,
):  # fmt: skip
    """Attend from a sequence's one new token: to its window, and finish; or to a part of its keys.

    Of a part, the result goes to parts fp32 (B, H, splits, D) and the log of the sum, in bits, to sums (B, H, splits).
    done: (B,), how many tokens `shared_kernel` does, or None.
    """
    kv, split, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(own + sequence)
    heads = tl.num_programs(0) * GROUP
    if WINDOWED:
        begin, end = tl.maximum(position - window + 1, 0) // PAGE * PAGE, position + 1
    else:
        size = split_tokens_of(position + 1, MAX_SPLITS, SPLIT_TOKENS)
        begin = split * size
        end = tl.minimum(begin + size, position + 1)
        if begin >= end:
            return
        if done is not None:  # noqa: SIM102 - decided when the kernel is compiled
            if begin < tl.load(done + sequence):
                return
    r, d = tl.arange(0, ROWS), tl.arange(0, D)
    inside = (r < GROUP)[:, None]
    head = kv * GROUP + r
    place = (tl.load(rows + sequence).to(tl.int64) * heads + head)[:, None] * D + d[None, :]
    queries = tl.load(q + place, mask=inside, other=0.0)  # (ROWS, D)
    keys += kv * (PAGE * D)
    values += kv * (PAGE * D)
    acc = tl.zeros((ROWS, D), tl.float32)
    if WINDOWED:
        top = tl.load(sinks + head, mask=r < GROUP, other=0.0).to(tl.float32) * LOG2_E
        total = tl.full((ROWS,), 1.0, tl.float32)
    else:
        top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    acc, top, total = attend(
        acc, top, total, queries, keys, values, pages + sequence * max_pages, begin, end, position + 0 * r, stride_page,
        window, True, WINDOWED, D, PAGE,
    )  # fmt: skip
    if WINDOWED:
        tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
    else:
        part = (sequence * heads + head) * tl.num_programs(1) + split
        tl.store(parts + part.to(tl.int64)[:, None] * D + d[None, :], acc / total[:, None], mask=inside)
        tl.store(sums + part, top + tl.log2(total), mask=r < GROUP)


@triton.jit(do_not_specialize=["max_pages", "max_members", "tiles"])
def shared_kernel(  # type: ignore[no-untyped-def]
    q, keys, values, pages, tokens, members, own, rows, parts, sums, max_pages, max_members, tiles, stride_page,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    MAX_SPLITS: tl.constexpr, SPLIT_TOKENS: tl.constexpr,
):  # fmt: skip
    """Attend from the new tokens of several sequences to a part of the keys that they share; see `decode_kernel`.

    own, rows: of the decoding sequences. tiles: of members per group, each of ROWS // GROUP.
    """
    kv, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2) // tiles
    r, d = tl.arange(0, ROWS), tl.arange(0, D)
    PER_TILE: tl.constexpr = ROWS // GROUP
    place = tl.program_id(2) % tiles * PER_TILE + r // GROUP  # in the list of members
    inside = (r < PER_TILE * GROUP) & (place < max_members)
    member = tl.load(members + group * max_members + place, mask=inside, other=-1)
    inside = inside & (member >= 0)
    size = split_tokens_of(tl.load(own + tl.load(members + group * max_members)) + 1, MAX_SPLITS, SPLIT_TOKENS)
    begin = split * size
    if begin >= tl.load(tokens + group):
        return
    heads = tl.num_programs(0) * GROUP
    head = kv * GROUP + r % GROUP
    row = tl.load(rows + member, mask=inside, other=0).to(tl.int64) * heads + head
    queries = tl.load(q + row[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)  # (ROWS, D)
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    acc, top, total = attend(
        tl.zeros((ROWS, D), tl.float32), top, total, queries, keys + kv * (PAGE * D), values + kv * (PAGE * D),
        pages + group * max_pages, begin, begin + size, r, stride_page, 0, False, False, D, PAGE,
    )  # fmt: skip
    part = (member * heads + head) * tl.num_programs(1) + split
    tl.store(parts + part.to(tl.int64)[:, None] * D + d[None, :], acc / total[:, None], mask=inside[:, None])
    tl.store(sums + part, top + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(  # type: ignore[no-untyped-def]
    parts,
    sums,
    sinks,
    own,
    rows,
    out,
    num_splits,
    D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
):
    """Write out (N, H, D) of one sequence and head from its parts and the sink."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(0)
    length = tl.load(own + sequence) + 1
    splits, d = tl.arange(0, MAX_SPLITS), tl.arange(0, D)
    inside = splits * split_tokens_of(length, MAX_SPLITS, SPLIT_TOKENS) < length
    part = (sequence * heads + head).to(tl.int64) * num_splits + splits
    logs = tl.load(sums + part, mask=inside, other=float("-inf"))
    sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
    top = tl.maximum(tl.max(logs, 0), sink)
    weights = tl.exp2(logs - top)  # (MAX_SPLITS,)
    results = tl.load(parts + part[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
    result = tl.sum(results * weights[:, None], 0) / (tl.sum(weights, 0) + tl.exp2(sink - top))
    place = (tl.load(rows + sequence).to(tl.int64) * heads + head) * D
    tl.store(out + place + d, result.to(out.dtype.element_ty))


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, batch: Batch, *, window: int | None
) -> Tensor:
    """Attend from the new tokens of a step to their sequences' keys, which are in pages, their own included.

    Args:
        q: (N, H, D), contiguous. keys, values: (pages, K, T, D), contiguous. sinks: (H,).
        window: how many keys a token sees, its own included; None for all before it.
    Returns: (N, H, D); rows that belong to no sequence are not written.
    """
    out = torch.empty_like(q)
    tile = plan_for(q.device, PLANS, INTERPRETED).prefill
    with torch.cuda.device_of(q):
        if batch.prefill is not None:
            pages, own, rows, lengths = batch.prefill
            prefill_kernel[(q.shape[1], triton.cdiv(batch.max_new, tile.rows), len(own))](
                q, keys, values, sinks, pages, own, rows, lengths, out, pages.shape[1], keys.stride(0), window or 0,
                **_sizes(q, keys, tile), WINDOWED=window is not None, **tile.options,
            )  # fmt: skip
        if batch.decode is not None:
            _decode(q, keys, values, sinks, out, batch=batch, window=window)
    return out


def _decode(
    q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, out: Tensor, *, batch: Batch, window: int | None
) -> None:
    """Write the rows of the sequences that decode into `out`."""
    assert batch.decode is not None, "nothing to decode"
    pages, own, rows, _ = batch.decode
    kv, plan, shared = keys.shape[1], plan_for(q.device, PLANS, INTERPRETED), batch.shared
    num_splits = 1 if window is not None else min(MAX_SPLITS, triton.cdiv(batch.max_keys, SPLIT_TOKENS))
    parts = torch.empty(len(own), q.shape[1], num_splits, q.shape[2], dtype=torch.float32, device=q.device)
    sums = torch.empty(parts.shape[:3], dtype=torch.float32, device=q.device)
    decode_kernel[(kv, num_splits, len(own))](
        q, keys, values, sinks, pages, own, rows, None if shared is None else shared.done, out, parts, sums,
        pages.shape[1], keys.stride(0), window or 0,
        **_sizes(q, keys, plan.decode), WINDOWED=window is not None, **CUTS, **plan.decode.options,
    )  # fmt: skip
    if window is not None:
        return
    if shared is not None:
        sizes = _sizes(q, keys, plan.shared)
        tiles = triton.cdiv(shared.members.shape[1], sizes["ROWS"] // sizes["GROUP"])
        shared_kernel[(kv, num_splits, len(shared.tokens) * tiles)](
            q, keys, values, shared.pages, shared.tokens, shared.members, own, rows, parts, sums,
            shared.pages.shape[1], shared.members.shape[1], tiles, keys.stride(0),
            **sizes, **CUTS, **plan.shared.options,
        )  # fmt: skip
    merge_kernel[(q.shape[1], len(own))](
        parts, sums, sinks, own, rows, out, num_splits, D=q.shape[2], **CUTS, **MERGE.options
    )


def fits(dtype: torch.dtype, d: int, page_tokens: int) -> bool:
    """Whether there are kernels for heads of this dtype and size, and pages of this size."""
    return dtype == torch.bfloat16 and d in (16, 32, 64) and page_tokens in (16, 32, 64)


def _sizes(q: Tensor, keys: Tensor, tile: Tile) -> dict[str, int]:
    return constants(q.shape[1] // keys.shape[1], q.shape[2], keys.shape[2], tile)


def constants(group: int, d: int, page: int, tile: Tile) -> dict[str, int]:
    """Return the kernels' constants that follow from shapes."""
    rows = max(tile.rows, triton.next_power_of_2(group))
    return {"GROUP": group, "D": d, "PAGE": page, "ROWS": rows}
