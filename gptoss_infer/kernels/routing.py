"""Routing on the device: from router logits to the rows of every expert, cut into tiles, without the host looking.

Everything that later launches need has a size known before: `num_tiles` bounds the number of tiles, and those that turn
out not to exist say so. So a decode step can be captured in a CUDA graph. Sums are of integers, or in a fixed order:
the result of a token does not depend on the others, nor on which of the two ways below was taken.

Up to `ONE_BLOCK` tokens: one launch of one program. More: choose and count (a program per 32 tokens), prefix sums (one
program), place (a program per 32 tokens). Rows are placed by sorting each program's (expert, slot) numbers, not by
atomic counters, so their order is that of the slots.

Legend: N tokens, k chosen per token, M = N k slots, slot n k + j being token n's choice j, E experts, P tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_infer.config import ModelConfig
from gptoss_infer.kernels.cases import Case, Check

ONE_BLOCK = 64  # tokens that one program routes alone
BLOCK = 32  # tokens of a program if there are more
SCAN = 32  # blocks that the prefix sums take at a time
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


class Routed(NamedTuple):
    """Which experts a token goes to, and which rows an expert gets."""

    chosen: Tensor  # int32 (N, k): experts, best first, ties to the lowest; -1 for a slot that is not real
    weights: Tensor  # fp32 (N, k): softmax over the chosen; 0 where not real
    slots: Tensor  # int32 (M,): of each row; rows are sorted by expert, then slot; -1 behind the last
    tiles: Tensor  # int32 (3, P): expert, first row, number of rows; expert -1 where there is none
    block_m: int  # most rows of a tile


def num_tiles(num_tokens: int, top_k: int, num_experts: int, block_m: int) -> int:
    """Return the most tiles that routing can need: every expert with rows may have one that is not full."""
    slots = num_tokens * top_k
    experts = min(slots, num_experts)
    return experts + (slots - experts) // block_m


def tile_table(counts: Sequence[int], block_m: int) -> Tensor:
    """Return `Routed.tiles` for experts with so many rows, int32 (3, P) on the CPU, where the counts are known."""
    rows = torch.tensor(counts, dtype=torch.int64)
    number = (rows + (block_m - 1)) // block_m
    expert = torch.arange(len(rows)).repeat_interleave(number)
    before = (torch.arange(len(expert)) - (number.cumsum(0) - number)[expert]) * block_m  # rows in tiles before
    first = (rows.cumsum(0) - rows)[expert] + before
    return torch.stack([expert, first, (rows[expert] - before).clamp_max(block_m)]).int()


def route_ref(logits: Tensor, top_k: int, block_m: int, real: Tensor | None = None) -> Routed:
    """Plain PyTorch; see `route`."""
    _check(logits, top_k, real)
    num_tokens, num_experts = logits.shape
    values, order = logits.float().sort(dim=-1, descending=True, stable=True)
    chosen, weights = order[:, :top_k].int(), values[:, :top_k].softmax(-1)
    if real is not None:
        chosen = chosen.where(real.unsqueeze(1), -1)
        weights = weights.where(real.unsqueeze(1), 0.0)
    flat = chosen.flatten()
    slots = torch.where(flat >= 0, flat, num_experts).argsort(stable=True).int()
    counts = torch.bincount(flat[flat >= 0], minlength=num_experts)
    slots[int(counts.sum()) :] = -1
    tiles = torch.full((3, num_tiles(num_tokens, top_k, num_experts, block_m)), -1, dtype=torch.int32)
    known = tile_table(counts.tolist(), block_m)
    tiles[:, : known.shape[1]] = known
    return Routed(chosen, weights, slots, tiles.to(logits.device), block_m)


def route(logits: Tensor, top_k: int, block_m: int, real: Tensor | None = None) -> Routed:
    """Choose experts by the largest logits, weigh them by a softmax over the chosen, and list every expert's rows.

    A NaN counts as the largest, as in torch, and makes its token's weights NaN.

    Args:
        logits: (N, E), any floating dtype; compared as fp32.
        block_m: most rows of a tile.
        real: bool (N,), False for slots of a batch that hold no token: they are routed nowhere.
    Returns: `Routed`, on the device of `logits`. Of tiles that do not exist only the expert, -1, is defined.
    Raises: ValueError for k outside 1..min(E, 8) or shapes that disagree.
    """
    _check(logits, top_k, real)
    num_tokens, num_experts = logits.shape
    slots = num_tokens * top_k
    new = logits.new_empty
    result = Routed(
        new(num_tokens, top_k, dtype=torch.int32),
        new(num_tokens, top_k, dtype=torch.float32),
        new(slots, dtype=torch.int32),
        new(3, num_tiles(num_tokens, top_k, num_experts, block_m), dtype=torch.int32),
        block_m,
    )
    if num_tokens == 0:
        return result
    logits = logits.contiguous()
    shape = {"NUM_EXPERTS": num_experts, "K": top_k}
    is_real = logits if real is None else real.contiguous()
    with torch.cuda.device_of(logits):
        if num_tokens <= ONE_BLOCK:
            route_kernel[(1,)](
                logits, is_real, *result[:4], num_tokens, result.tiles.shape[1],
                BLOCK_M=block_m, BLOCK=_tokens(num_tokens), MASKED=real is not None, **shape, **OPTIONS,
            )  # fmt: skip
            return result
        blocks = triton.cdiv(num_tokens, BLOCK)
        counts, rows = new(2, blocks, num_experts, dtype=torch.int32)
        choose_kernel[(blocks,)](
            logits, is_real, result.chosen, result.weights, counts, num_tokens,
            BLOCK=BLOCK, MASKED=real is not None, **shape, **OPTIONS,
        )  # fmt: skip
        scan_kernel[(1,)](
            counts, rows, result.slots, result.tiles, blocks, slots, result.tiles.shape[1],
            BLOCK_M=block_m, NUM_EXPERTS=num_experts, SCAN=SCAN, **OPTIONS,
        )  # fmt: skip
        place_kernel[(blocks,)](result.chosen, rows, result.slots, num_tokens, BLOCK=BLOCK, **shape, **OPTIONS)
    return result


def _check(logits: Tensor, top_k: int, real: Tensor | None) -> None:
    if logits.dim() != 2 or not 1 <= top_k <= min(logits.shape[1], 8):
        raise ValueError(f"logits {tuple(logits.shape)}, k {top_k}: expected (N, E) and k of 1 to min(E, 8)")
    if real is not None and (real.shape != logits.shape[:1] or real.dtype != torch.bool):
        raise ValueError(f"real is {real.dtype} {tuple(real.shape)}, expected bool ({len(logits)},)")


def _tokens(num_tokens: int) -> int:
    """Return the tokens of the one program: few forms, and small ones for small batches."""
    return 16 if num_tokens <= 16 else ONE_BLOCK


@triton.jit
def choose(logits, real, tokens, num_tokens, NUM_EXPERTS: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return experts int32 and weights fp32 (T, k rounded up to a power of two), and counts int32 (E, rounded up)."""
    WIDTH: tl.constexpr = triton.next_power_of_2(NUM_EXPERTS)
    COLUMNS: tl.constexpr = triton.next_power_of_2(K)
    LEAST: tl.constexpr = -(2**31)
    inside = tokens < num_tokens
    expert = tl.arange(0, WIDTH)[None, :]
    column = tl.arange(0, COLUMNS)[None, :]
    exists = inside[:, None] & (expert < NUM_EXPERTS)
    x = tl.load(logits + tokens[:, None].to(tl.int64) * NUM_EXPERTS + expert, mask=exists, other=0.0).to(tl.float32)
    # Integers in the order of the values: the bits of a negative number are turned round. -0 is 0, NaN above all.
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    key = tl.where(expert < NUM_EXPERTS, key, LEAST)  # below -infinity's
    experts = tl.full((tokens.shape[0], COLUMNS), -1, tl.int32)
    weights = tl.zeros((tokens.shape[0], COLUMNS), tl.float32)
    taken = tl.zeros((tokens.shape[0], WIDTH), tl.int32)
    first = tl.zeros((tokens.shape[0],), tl.float32)
    total = tl.zeros((tokens.shape[0],), tl.float32)
    for j in tl.static_range(K):
        best = tl.max(key, axis=1)
        which = tl.min(tl.where(key == best[:, None], expert, WIDTH), axis=1)  # (T,)
        hit = expert == which[:, None]
        value = tl.sum(tl.where(hit, x, 0.0), axis=1)
        if j == 0:
            first = value
        power = tl.exp(value - first)
        total += power  # in the order of the choices, whatever the layout
        key = tl.where(hit, LEAST, key)
        taken += hit.to(tl.int32)
        experts = tl.where(column == j, which[:, None], experts)
        weights = tl.where(column == j, power[:, None], weights)
    weights = weights / total[:, None]
    here = inside
    if MASKED:
        here = inside & (tl.load(real + tokens, mask=inside, other=0) != 0)
    counts = tl.sum(tl.where(here[:, None], taken, 0), axis=0)
    return tl.where(here[:, None], experts, -1), tl.where(here[:, None], weights, 0.0), counts


@triton.jit
def sorted_slots(experts, first_token, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sort the slots of T tokens by expert: return slots and experts (T times k rounded up), -1 behind the last."""
    TOKENS: tl.constexpr = experts.shape[0]
    COLUMNS: tl.constexpr = experts.shape[1]
    SLOTS: tl.constexpr = TOKENS * COLUMNS
    local = tl.arange(0, TOKENS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    number = tl.where(experts >= 0, experts * SLOTS + local, 0x7FFFFFFF)
    number = tl.sort(tl.reshape(number, (SLOTS,)))
    exists = number != 0x7FFFFFFF
    local = number % SLOTS
    slots = (first_token + local // COLUMNS) * K + local % COLUMNS
    return tl.where(exists, slots, -1), tl.where(exists, number // SLOTS, -1)


@triton.jit
def write_tiles(counts, tiles, num_tiles, BLOCK_M: tl.constexpr, NUM_EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the table from the rows of each expert (E rounded up); return each expert's first row."""
    expert = tl.arange(0, counts.shape[0])
    first_row = tl.cumsum(counts, axis=0) - counts
    number = (counts + (BLOCK_M - 1)) // BLOCK_M
    first_tile = tl.cumsum(number, axis=0) - number
    for i in range(tl.max(number, axis=0)):
        at = tiles + first_tile + i
        mine = i < number
        tl.store(at, expert, mask=mine)
        tl.store(at + num_tiles, first_row + i * BLOCK_M, mask=mine)
        tl.store(at + 2 * num_tiles, tl.minimum(counts - i * BLOCK_M, BLOCK_M), mask=mine)
    for start in range(tl.sum(number, axis=0), num_tiles, 128):
        rest = start + tl.arange(0, 128)
        tl.store(tiles + rest, -1, mask=rest < num_tiles)
    return first_row


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def route_kernel(  # type: ignore[no-untyped-def]
    logits, real, chosen, weights, slots, tiles, num_tokens, num_tiles,
    NUM_EXPERTS: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Everything, for up to BLOCK tokens."""
    tokens = tl.arange(0, BLOCK)
    experts, powers, counts = choose(logits, real, tokens, num_tokens, NUM_EXPERTS, K, MASKED)
    column = tl.arange(0, experts.shape[1])[None, :]
    inside = (tokens < num_tokens)[:, None] & (column < K)
    tl.store(chosen + tokens[:, None] * K + column, experts, mask=inside)
    tl.store(weights + tokens[:, None] * K + column, powers, mask=inside)
    order, _ = sorted_slots(tl.where(column < K, experts, -1), 0, K)
    row = tl.arange(0, order.shape[0])
    tl.store(slots + row, order, mask=row < num_tokens * K)
    write_tiles(counts, tiles, num_tiles, BLOCK_M, NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_tokens"])
def choose_kernel(  # type: ignore[no-untyped-def]
    logits, real, chosen, weights, counts, num_tokens,
    NUM_EXPERTS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Choose for BLOCK tokens, and count them per expert: counts (blocks, E)."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    experts, powers, count = choose(logits, real, tokens, num_tokens, NUM_EXPERTS, K, MASKED)
    column = tl.arange(0, experts.shape[1])[None, :]
    inside = (tokens < num_tokens)[:, None] & (column < K)
    tl.store(chosen + tokens[:, None] * K + column, experts, mask=inside)
    tl.store(weights + tokens[:, None] * K + column, powers, mask=inside)
    expert = tl.arange(0, count.shape[0])
    tl.store(counts + tl.program_id(0) * NUM_EXPERTS + expert, count, mask=expert < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_blocks", "num_slots", "num_tiles"])
def scan_kernel(  # type: ignore[no-untyped-def]
    counts, rows, slots, tiles, num_blocks, num_slots, num_tiles,
    NUM_EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """From counts (blocks, E), write the tiles and rows (blocks, E): of each block's first slot of each expert.

    A row is less by that slot's place in the block's sorted order, so that the place has only to be added.
    """
    WIDTH: tl.constexpr = triton.next_power_of_2(NUM_EXPERTS)
    expert = tl.arange(0, WIDTH)
    block = tl.arange(0, SCAN)[:, None]
    total = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, num_blocks, SCAN):
        exists = (start + block < num_blocks) & (expert < NUM_EXPERTS)[None, :]
        total += tl.sum(tl.load(counts + (start + block) * NUM_EXPERTS + expert[None, :], mask=exists, other=0), axis=0)
    row = write_tiles(total, tiles, num_tiles, BLOCK_M, NUM_EXPERTS)
    for start in range(0, num_blocks, SCAN):
        exists = (start + block < num_blocks) & (expert < NUM_EXPERTS)[None, :]
        at = (start + block) * NUM_EXPERTS + expert[None, :]
        count = tl.load(counts + at, mask=exists, other=0)
        before = tl.cumsum(count, axis=0) - count  # in the blocks before
        place = tl.cumsum(count, axis=1) - count  # in the block's own order
        tl.store(rows + at, row[None, :] + before - place, mask=exists)
        row += tl.sum(count, axis=0)
    for start in range(tl.sum(total, axis=0), num_slots, 128):
        rest = start + tl.arange(0, 128)
        tl.store(slots + rest, -1, mask=rest < num_slots)


@triton.jit(do_not_specialize=["num_tokens"])
def place_kernel(chosen, rows, slots, num_tokens, NUM_EXPERTS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the slots of BLOCK tokens to their rows; rows (blocks, E) are `scan_kernel`'s."""
    COLUMNS: tl.constexpr = triton.next_power_of_2(K)
    first = tl.program_id(0) * BLOCK
    tokens = first + tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (tokens < num_tokens)[:, None] & (column < K)
    experts = tl.load(chosen + tokens[:, None] * K + column, mask=inside, other=-1)
    order, of = sorted_slots(experts, first, K)
    exists = order >= 0
    row = tl.load(rows + tl.program_id(0) * NUM_EXPERTS + of, mask=exists, other=0) + tl.arange(0, order.shape[0])
    tl.store(slots + row, order, mask=exists)


def cases(target: str) -> list[Case]:
    """Return the forms that are launched for 20b and 120b."""
    tables = {"chosen": "*i32", "weights": "*fp32"}
    found = []
    for name, experts in (("20b", 32), ("120b", 128)):
        shape: dict[str, object] = {"NUM_EXPERTS": experts, "K": 4}
        logits = {"logits": "*bf16", "real": "*i1"}
        sizes = {"num_tokens": "i32", "num_tiles": "i32"}
        found += [
            Case(
                f"route {name} {block}",
                route_kernel,
                logits | tables | {"slots": "*i32", "tiles": "*i32"} | sizes,
                shape | {"BLOCK_M": 16, "BLOCK": block, "MASKED": True},
                aligned=("logits", "real", "chosen", "weights", "slots", "tiles"),
                options=OPTIONS,
            )
            for block in (16, ONE_BLOCK)
        ]
        found += [
            Case(
                f"route choose {name}",
                choose_kernel,
                logits | tables | {"counts": "*i32", "num_tokens": "i32"},
                shape | {"BLOCK": BLOCK, "MASKED": False},
                aligned=("logits", "real", "chosen", "weights", "counts"),
                options=OPTIONS,
            ),
            Case(
                f"route scan {name}",
                scan_kernel,
                dict.fromkeys(("counts", "rows", "slots", "tiles"), "*i32")
                | {"num_blocks": "i32", "num_slots": "i32", "num_tiles": "i32"},
                {"NUM_EXPERTS": experts, "BLOCK_M": 64, "SCAN": SCAN},
                aligned=("counts", "rows", "slots", "tiles"),
                options=OPTIONS,
            ),
            Case(
                f"route place {name}",
                place_kernel,
                dict.fromkeys(("chosen", "rows", "slots"), "*i32") | {"num_tokens": "i32"},
                shape | {"BLOCK": BLOCK},
                aligned=("chosen", "rows", "slots"),
                options=OPTIONS,
            ),
        ]
    return found


def checks(config: ModelConfig, device: torch.device, tokens: Sequence[int]) -> Iterator[Check]:
    """Yield everything that is an integer, and must be equal; weights show in the results of the experts."""
    generator = torch.Generator(device).manual_seed(0)
    top_k = config.num_experts_per_tok

    for count in tokens:
        for what, real in (("", None), (", a third not real", torch.arange(count, device=device) % 3 != 1)):
            logits = torch.randn(count, config.num_local_experts, device=device, generator=generator).bfloat16()
            yield Check(
                f"route {count} tokens{what}",
                [partial(route, logits, top_k, 16, real)],
                partial(route_ref, logits, top_k, 16, real),
                0,
                compared=_integers,
            )


def _integers(routed: Routed) -> Tensor:
    tiles = routed.tiles.where(routed.tiles[0] >= 0, -1)
    return torch.cat([routed.chosen.flatten(), routed.slots, tiles.flatten()])
