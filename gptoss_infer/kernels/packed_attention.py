"""Attention over a packed batch in Triton, forward and backward; the reference is `gptoss_infer.attention`.

Flash attention (Dao et al., arXiv 2205.14135; Dao, arXiv 2307.08691) with three changes. The sink starts the running
maximum and the running sum, so that no row is ever empty and the stored normalizer includes it, which is all that
backward needs. Documents lie one after another: a row sees the keys from the first of its own document on. On sliding
layers it sees the last `window` of them. Every loop runs over the keys (or queries) that some row of its tile can see,
and compares positions only where not every pair is visible.

A program works on one tile of queries of one query head, or, for the gradients to keys and values, on one tile of keys
and all query heads that share it. So nothing is added up between programs, and results do not vary between runs.

Legend: N tokens, H query heads, K key/value heads, D head size; tiles of ROWS queries or keys meet COLS of the others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_infer.attention import Attended, Blocks
from gptoss_infer.kernels.plans import Tile, plan_for

LOG2_E = tl.constexpr(math.log2(math.e))


class Plan(NamedTuple):
    """Tiles of the three kernels."""

    forward: Tile
    grad_q: Tile
    grad_kv: Tile


# For bf16 and heads of 64. Not timed yet: chosen for no spills, warpgroup products on sm_90, and two blocks on a
# multiprocessor where that is possible.
PLANS: dict[str, Plan] = {
    "sm_80": Plan(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
    "sm_90": Plan(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    "sm_100": Plan(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    "gfx942": Plan(Tile(128, 64, 4, 2), Tile(128, 32, 4, 2), Tile(128, 32, 4, 1)),
}
INTERPRETED = Plan(Tile(32, 16, 1, 1), Tile(32, 16, 1, 1), Tile(16, 32, 1, 1))


@triton.jit(do_not_specialize=["num_tokens", "window"])
def forward_kernel(  # type: ignore[no-untyped-def]
    q, k, v, sinks, starts, out, normalizers, num_tokens, stride_q, stride_k, stride_v, window,
    WINDOWED: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write out (N, H, D) and normalizers fp32 (H, N), for a tile of queries of one head.

    q, k, v: (N, heads, D) with a stride between tokens; starts: int32 (N,), where the document of each token begins.
    """
    head, first = (
        tl.program_id(0),
        (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS,
    )  # the last see most: they go first
    heads = tl.num_programs(0)
    rows, d = tl.arange(0, ROWS), tl.arange(0, D)
    inside = first + rows < num_tokens
    queries = load_tile(q + head * D, first, stride_q, num_tokens, True, D, ROWS)  # (ROWS, D)
    begins = tl.load(starts + first + rows, mask=inside, other=0)  # (ROWS,)
    begin, whole, diagonal, end = key_ranges(first, starts, num_tokens, window, WINDOWED, ROWS, COLS)

    sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
    top, total = tl.zeros((ROWS,), tl.float32) + sink, tl.full((ROWS,), 1.0, tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    k += (head // GROUP) * D
    v += (head // GROUP) * D
    if not WINDOWED:
        acc, top, total = attend(
            acc, top, total, queries, k, v, whole, diagonal, diagonal, diagonal, first, begins, stride_k, stride_v,
            num_tokens, window, False, WINDOWED, D, ROWS, COLS,
        )  # fmt: skip
    acc, top, total = attend(
        acc, top, total, queries, k, v, begin, whole, diagonal, end, first, begins, stride_k, stride_v,
        num_tokens, window, True, WINDOWED, D, ROWS, COLS,
    )  # fmt: skip

    out += (first.to(tl.int64) * heads + head) * D
    acc = acc / total[:, None]
    tl.store(out + rows[:, None] * (heads * D) + d[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None])
    normalizers += head.to(tl.int64) * num_tokens + first
    tl.store(normalizers + rows, (top + tl.log2(total)) / LOG2_E, mask=inside)


@triton.jit
def key_ranges(  # type: ignore[no-untyped-def]
    first, starts, num_tokens, window, WINDOWED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Return four bounds of the keys that a tile of queries sees, all but the last multiples of COLS.

    Between the second and the third every row sees every key; before and after, positions are to be compared. Of a
    sliding layer all are to be compared.
    """
    last = tl.minimum(first + ROWS, num_tokens) - 1
    end = last + 1
    if WINDOWED:
        begin = tl.maximum(tl.load(starts + first), first - window + 1) // COLS * COLS
        whole = tl.cdiv(end, COLS) * COLS
        return begin, whole, whole, end
    begin = tl.load(starts + first) // COLS * COLS
    whole = tl.cdiv(tl.load(starts + last), COLS) * COLS  # from here on all rows' documents have begun
    diagonal = (first + 1) // COLS * COLS  # up to here no key is later than the first row
    return begin, whole, tl.maximum(whole, diagonal), end


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    acc, top, total, queries, k, v, begin, gap, resume, end, first, begins, stride_k, stride_v, num_tokens, window,
    COMPARE: tl.constexpr, WINDOWED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Take keys from `begin` to `gap` and from `resume` to `end` into the running maximum (in bits), sum and result.

    One loop for both ranges: it is compiled once, and held in flight without a break.
    """
    rows, cols = first + tl.arange(0, ROWS), tl.arange(0, COLS)
    for i in range(0, num_tiles(begin, gap, resume, end, COLS)):
        key = nth_tile(i, begin, gap, resume, COLS)
        keys = load_tile(k, key, stride_k, num_tokens, COMPARE, D, COLS)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (LOG2_E * D**-0.5)  # (ROWS, COLS)
        if COMPARE:
            seen = visible(rows[:, None], (key + cols)[None, :], begins[:, None], window, WINDOWED)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        values = load_tile(v, key, stride_v, num_tokens, COMPARE, D, COLS)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def num_tiles(begin, gap, resume, end, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many tiles two ranges have: `begin` to `gap`, multiples of SIZE, and `resume` to `end`."""
    return (gap - begin) // SIZE + tl.maximum(tl.cdiv(end - resume, SIZE), 0)


@triton.jit
def nth_tile(i, begin, gap, resume, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where tile i of the two ranges begins."""
    place = begin + i * SIZE
    return tl.where(place < gap, place, place - gap + resume)


@triton.jit
def visible(queries, keys, begins, window, WINDOWED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether a query sees a key, by their places in the batch and that where the query's document begins."""
    seen = (keys <= queries) & (keys >= begins)
    if WINDOWED:
        seen = seen & (queries - keys < window)
    return seen


@triton.jit
def load_tile(x, first, stride, num_tokens, COMPARE: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load (SIZE, D) of one head from token `first` on; zero behind the last token, which only COMPARE allows for."""
    rows = tl.arange(0, SIZE)
    pointers = x + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + tl.arange(0, D)[None, :])
    if COMPARE:
        return tl.load(pointers, mask=(first + rows < num_tokens)[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit(do_not_specialize=["num_tokens", "window"])
def grad_q_kernel(  # type: ignore[no-untyped-def]
    q, k, v, starts, out, grad, normalizers, grad_q, products, num_tokens, stride_q, stride_k, stride_v, window,
    WINDOWED: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write grad_q (N, H, D), and products fp32 (H, N): the dot product of every row of `out` and `grad`."""
    head, first = tl.program_id(0), (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    heads = tl.num_programs(0)
    rows = tl.arange(0, ROWS)
    inside = first + rows < num_tokens
    queries = load_tile(q + head * D, first, stride_q, num_tokens, True, D, ROWS)  # (ROWS, D)
    upstream = load_tile(grad + head * D, first, heads * D, num_tokens, True, D, ROWS)
    result = load_tile(out + head * D, first, heads * D, num_tokens, True, D, ROWS)
    product = tl.sum(upstream.to(tl.float32) * result.to(tl.float32), 1)  # (ROWS,)
    row_numbers = head.to(tl.int64) * num_tokens + first + rows
    tl.store(products + row_numbers, product, mask=inside)
    normalizer = tl.load(normalizers + row_numbers, mask=inside, other=0.0) * LOG2_E
    begins = tl.load(starts + first + rows, mask=inside, other=0)
    begin, whole, diagonal, end = key_ranges(first, starts, num_tokens, window, WINDOWED, ROWS, COLS)

    k += (head // GROUP) * D
    v += (head // GROUP) * D
    acc = tl.zeros((ROWS, D), tl.float32)
    if not WINDOWED:
        acc = slope_keys(
            acc, queries, upstream, normalizer, product, k, v, whole, diagonal, diagonal, diagonal, first, begins,
            stride_k, stride_v, num_tokens, window, False, WINDOWED, D, ROWS, COLS,
        )  # fmt: skip
    acc = slope_keys(
        acc, queries, upstream, normalizer, product, k, v, begin, whole, diagonal, end, first, begins,
        stride_k, stride_v, num_tokens, window, True, WINDOWED, D, ROWS, COLS,
    )  # fmt: skip
    place = (first.to(tl.int64) * heads + head) * D + (rows[:, None] * (heads * D) + tl.arange(0, D)[None, :])
    tl.store(grad_q + place, (acc * D**-0.5).to(grad_q.dtype.element_ty), mask=inside[:, None])


@triton.jit
def slope_keys(  # type: ignore[no-untyped-def]
    acc, queries, upstream, normalizer, product, k, v, begin, gap, resume, end, first, begins, stride_k, stride_v,
    num_tokens, window,
    COMPARE: tl.constexpr, WINDOWED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Add to the gradient of a tile of queries what the keys of two ranges give, without the scale."""
    rows, cols = first + tl.arange(0, ROWS), tl.arange(0, COLS)
    for i in range(0, num_tiles(begin, gap, resume, end, COLS)):
        key = nth_tile(i, begin, gap, resume, COLS)
        keys = load_tile(k, key, stride_k, num_tokens, COMPARE, D, COLS)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (LOG2_E * D**-0.5)  # (ROWS, COLS)
        weights = tl.exp2(scores - normalizer[:, None])
        if COMPARE:
            seen = visible(rows[:, None], (key + cols)[None, :], begins[:, None], window, WINDOWED)
            weights = tl.where(seen, weights, 0.0)
        values = load_tile(v, key, stride_v, num_tokens, COMPARE, D, COLS)
        slopes = weights * (tl.dot(upstream, tl.trans(values), input_precision="ieee") - product[:, None])
        acc = tl.dot(slopes.to(keys.dtype), keys, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_tokens", "window"])
def grad_kv_kernel(  # type: ignore[no-untyped-def]
    q, k, v, starts, ends, grad, normalizers, products, grad_k, grad_v, num_tokens, stride_q, stride_k, stride_v,
    window, WINDOWED: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write grad_k and grad_v (N, K, D) of a tile of keys, from all query heads that share it.

    starts, ends: int32 (N,), where the document of each token begins, and where the next one does.
    """
    kv, first = tl.program_id(0), tl.program_id(1) * ROWS  # the first tiles are seen by most: they go first
    heads = tl.num_programs(0)
    rows = tl.arange(0, ROWS)
    last = tl.minimum(first + ROWS, num_tokens) - 1
    keys = load_tile(k + kv * D, first, stride_k, num_tokens, True, D, ROWS)
    values = load_tile(v + kv * D, first, stride_v, num_tokens, True, D, ROWS)
    q += kv * GROUP * D
    grad += kv * GROUP * D
    normalizers += kv.to(tl.int64) * GROUP * num_tokens
    products += kv.to(tl.int64) * GROUP * num_tokens
    begin, end = first // COLS * COLS, tl.load(ends + last)
    if WINDOWED:
        end = tl.minimum(end, last + window)
        whole = tl.cdiv(end, COLS) * COLS
        cut = whole
    else:
        # Between these, queries come after all keys of the tile and belong to the document of the first of them.
        whole = tl.cdiv(last, COLS) * COLS
        cut = tl.maximum(whole, tl.load(ends + first) // COLS * COLS)

    acc_k, acc_v = tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS, D), tl.float32)
    if not WINDOWED:
        acc_k, acc_v = slope_queries(
            acc_k, acc_v, keys, values, q, grad, normalizers, products, starts, whole, cut, cut, cut, first,
            stride_q, heads * GROUP * D, num_tokens, window, False, WINDOWED, GROUP, D, ROWS, COLS,
        )  # fmt: skip
    acc_k, acc_v = slope_queries(
        acc_k, acc_v, keys, values, q, grad, normalizers, products, starts, begin, whole, cut, end, first,
        stride_q, heads * GROUP * D, num_tokens, window, True, WINDOWED, GROUP, D, ROWS, COLS,
    )  # fmt: skip
    place = (first.to(tl.int64) * heads + kv) * D + (rows[:, None] * (heads * D) + tl.arange(0, D)[None, :])
    inside = (first + rows < num_tokens)[:, None]
    tl.store(grad_k + place, (acc_k * D**-0.5).to(grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_v + place, acc_v.to(grad_v.dtype.element_ty), mask=inside)


@triton.jit
def slope_queries(  # type: ignore[no-untyped-def]
    acc_k, acc_v, keys, values, q, grad, normalizers, products, starts, begin, gap, resume, end, first, stride_q,
    stride_grad, num_tokens, window, COMPARE: tl.constexpr, WINDOWED: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of a tile of keys and values what the queries of two ranges give, head after head."""
    rows, cols = first + tl.arange(0, ROWS), tl.arange(0, COLS)
    count = num_tiles(begin, gap, resume, end, COLS)
    for i in range(0, count * GROUP):
        member = i // count
        query = nth_tile(i % count, begin, gap, resume, COLS)
        inside = query + cols < num_tokens
        queries = load_tile(q + member * D, query, stride_q, num_tokens, COMPARE, D, COLS)  # (COLS, D)
        upstream = load_tile(grad + member * D, query, stride_grad, num_tokens, COMPARE, D, COLS)
        place = tl.cast(member, tl.int64) * num_tokens + query
        normalizer = tl.load(normalizers + place + cols, mask=inside, other=0.0) * LOG2_E
        product = tl.load(products + place + cols, mask=inside, other=0.0)
        scores = tl.dot(keys, tl.trans(queries), input_precision="ieee") * (LOG2_E * D**-0.5)  # (ROWS, COLS)
        weights = tl.exp2(scores - normalizer[None, :])
        if COMPARE:
            begins = tl.load(starts + query + cols, mask=inside, other=2**31 - 1)  # no key is after that
            seen = visible((query + cols)[None, :], rows[:, None], begins[None, :], window, WINDOWED)
            weights = tl.where(seen, weights, 0.0)
        acc_v = tl.dot(weights.to(upstream.dtype), upstream, acc_v, input_precision="ieee")
        slopes = weights * (tl.dot(values, tl.trans(upstream), input_precision="ieee") - product[None, :])
        acc_k = tl.dot(slopes.to(queries.dtype), queries, acc_k, input_precision="ieee")
    return acc_k, acc_v


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, blocks: Blocks, *, window: int | None
) -> tuple[Tensor, Tensor]:
    """Return the output (N, H, D) and the normalizers (H, N); see `gptoss_infer.attention.packed_forward`."""
    q, k, v = (_heads_together(x) for x in (q, k, v))
    n, heads, d = q.shape
    out = torch.empty(n, heads, d, dtype=q.dtype, device=q.device)
    normalizers = torch.empty(heads, n, dtype=torch.float32, device=q.device)
    tile = plan_for(q.device, PLANS, INTERPRETED).forward
    if n:
        with torch.cuda.device_of(q):
            forward_kernel[(heads, triton.cdiv(n, tile.rows))](
                q, k, v, sinks, blocks.starts, out, normalizers, n, q.stride(0), k.stride(0), v.stride(0), window or 0,
                **constants(tile, window, heads // k.shape[1], d), **tile.options,
            )  # fmt: skip
    return out, normalizers


def packed_backward(
    grad: Tensor, attended: Attended, blocks: Blocks, *, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients to q, k and v, and the products (H, N); see `gptoss_infer.attention.packed_backward`."""
    q, k, v = (_heads_together(x) for x in attended[:3])
    grad, normalizers = grad.contiguous(), attended.normalizers
    n, heads, d = q.shape
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    products = torch.empty_like(normalizers)
    _, for_q, for_kv = plan_for(q.device, PLANS, INTERPRETED)
    strides, group = (q.stride(0), k.stride(0), v.stride(0)), heads // k.shape[1]
    if n:
        with torch.cuda.device_of(q):
            grad_q_kernel[(heads, triton.cdiv(n, for_q.rows))](
                q, k, v, blocks.starts, attended.out, grad, normalizers, grad_q, products, n, *strides, window or 0,
                **constants(for_q, window, group, d), **for_q.options,
            )  # fmt: skip
            grad_kv_kernel[(k.shape[1], triton.cdiv(n, for_kv.rows))](
                q, k, v, blocks.starts, blocks.ends, grad, normalizers, products, grad_k, grad_v, n, *strides,
                window or 0, **constants(for_kv, window, group, d), **for_kv.options,
            )  # fmt: skip
    return grad_q, grad_k, grad_v, products


def fits(dtype: torch.dtype, d: int) -> bool:
    """Whether there are kernels for heads of this dtype and size; fp32, not worth tuning, runs in tests alone."""
    return dtype == torch.bfloat16 and d in (16, 32, 64)


def _heads_together(x: Tensor) -> Tensor:
    """(N, heads, D) with the values of a token side by side; copied only if they are not."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def constants(tile: Tile, window: int | None, group: int, d: int) -> dict[str, int]:
    """Return the kernels' constants but for compile options."""
    return {"WINDOWED": window is not None, "GROUP": group, "D": d, "ROWS": tile.rows, "COLS": tile.cols}
