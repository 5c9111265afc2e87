"""Adapters that stay unmerged while they are served: A x for the rows of every expert, in Triton.

The expert kernels add B (A x) to their own sums (`products.add_low_rank`), so nothing is rounded in between and a small
delta is carried whole. Several adapters are served in one batch by lying beside each other: their ranks are joined, and
a row keeps the ranks of its token's adapter and zeros in the others, which add exactly nothing.

A row's sum over columns is cut into parts of `PART` columns, one program each, which the reader adds up in order: for a
few rows, one program after another would take longer than the expert's own product.

Legend: M rows, E experts, R joined ranks, N tokens, k chosen per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from gptoss_infer.config import ModelConfig
from gptoss_infer.kernels import tuning
from gptoss_infer.kernels.cases import Case, Check
from gptoss_infer.kernels.products import tile_rows
from gptoss_infer.kernels.routing import Routed, route

PART = 512


class LowRank(NamedTuple):
    """The factors of one or several adapters for one projection of all experts."""

    a: Tensor  # bf16 (E, R, in), R a power of two of at least 16
    b: Tensor  # bf16 (E, out, R), times each adapter's scaling
    owners: Tensor  # int32 (R,): the adapter that each rank belongs to; -1 for what fills up


def join(factors: Sequence[tuple[Tensor, Tensor, float]]) -> LowRank:
    """Join adapters given as A (E, r, in), B (E, out, r) and scaling; adapter i of a batch is the i-th of them."""
    ranks = [a.shape[1] for a, _, _ in factors]
    missing = max(16, triton.next_power_of_2(sum(ranks))) - sum(ranks)
    a = torch.cat([a.bfloat16() for a, _, _ in factors], dim=1)
    b = torch.cat([(b * scaling).bfloat16() for _, b, scaling in factors], dim=2)
    owners = torch.full((sum(ranks) + missing,), -1, dtype=torch.int32, device=a.device)
    for i, end in enumerate(accumulate(ranks)):
        owners[end - ranks[i] : end] = i  # made on the device: nothing waits for a copy
    return LowRank(F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing)), owners)


def num_parts(in_features: int) -> int:
    """Return into how many parts the sums over columns are cut."""
    return triton.cdiv(in_features, PART)


def low_products_ref(x: Tensor, low_rank: LowRank, routed: Routed, adapters: Tensor, *, of_tokens: bool) -> Tensor:
    """Plain PyTorch, in fp32; see `low_products`."""
    rows, top_k = len(routed.slots), routed.chosen.shape[1]
    parts = x.new_zeros(num_parts(x.shape[1]), rows, low_rank.a.shape[1], dtype=torch.float32)
    for expert, first, count in routed.tiles.T.tolist():
        if expert >= 0:
            which = slice(first, first + count)
            tokens = routed.slots[which].long() // top_k
            mine = adapters[tokens].unsqueeze(1) == low_rank.owners
            values = (x[tokens] if of_tokens else x[which]).float()
            for i, part in enumerate(values.split(PART, dim=1)):
                y = part @ low_rank.a[expert, :, i * PART : (i + 1) * PART].float().T
                parts[i, which] = y.where(mine, 0.0)
    return parts


def low_products(x: Tensor, low_rank: LowRank, routed: Routed, adapters: Tensor, *, of_tokens: bool) -> Tensor:
    """Return A x of every routed row, fp32 (parts, M, R) to be summed over the parts; 0 where a rank is another's.

    Args:
        x: bf16 (N, in) with `of_tokens`, else (M, in), in the order of the rows.
        adapters: int32 (N,): the adapter of each token; -1 for none.
    Rows behind the last routed one are not written.
    """
    num_parts_, rank = num_parts(x.shape[1]), low_rank.a.shape[1]
    parts = x.new_empty(num_parts_, len(routed.slots), rank, dtype=torch.float32)
    num_tiles = routed.tiles.shape[1]
    if num_tiles and not x.is_meta:
        with torch.cuda.device_of(x):
            low_rank_kernel[(num_tiles * num_parts_,)](
                x.contiguous(), low_rank.a, low_rank.owners, adapters, routed.slots, routed.tiles, parts,
                num_tiles, len(routed.slots),
                K=routed.chosen.shape[1], IN=x.shape[1], RANK=rank, BLOCK_M=routed.block_m, PART=PART,
                OF_TOKENS=of_tokens, **_options(tuning.target_of(x.device)),
            )  # fmt: skip
    return parts


def _options(target: str) -> dict[str, object]:
    return tuning.options(target, num_warps=4, num_stages=2 if target.startswith("gfx") else 4)


@triton.jit(do_not_specialize=["num_tiles", "num_rows"])
def low_rank_kernel(  # type: ignore[no-untyped-def]
    x, a, owners, adapters, slots, tiles, parts, num_tiles, num_rows,
    K: tl.constexpr, IN: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, PART: tl.constexpr,
    OF_TOKENS: tl.constexpr,
):  # fmt: skip
    """One tile of rows by one part of the columns. The ranks are the left operand, so that their number alone decides
    which matrix instruction it is, and with it the order of the sums.
    """
    PARTS: tl.constexpr = (IN + PART - 1) // PART
    tile, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    row, inside = tile_rows(tiles, num_tiles, tile, BLOCK_M)
    token = tl.load(slots + row, mask=inside, other=0) // K
    rank = tl.arange(0, RANK)
    k = tl.arange(0, 64)
    of_row = token if OF_TOKENS else row
    x += of_row.to(tl.int64)[None, :] * IN + (part * PART + k)[:, None]
    a += (expert.to(tl.int64) * RANK + rank)[:, None] * IN + (part * PART + k)[None, :]
    sums = tl.zeros((RANK, BLOCK_M), tl.float32)
    for start in range(0, PART, 64):
        there = part * PART + start + k < IN
        values = tl.load(x + start, mask=inside[None, :] & there[:, None], other=0.0)
        sums = tl.dot(tl.load(a + start, mask=there[None, :], other=0.0), values, sums)
    owner = tl.load(owners + rank)[:, None]
    adapter = tl.load(adapters + token, mask=inside, other=-1)[None, :]
    at = (part * num_rows.to(tl.int64) + row)[None, :] * RANK + rank[:, None]
    tl.store(parts + at, tl.where((owner == adapter) & (owner >= 0), sums, 0.0), mask=inside[None, :])


def cases(target: str) -> list[Case]:
    """Return the forms that are launched for 20b and 120b, for ranks of up to 16 and of 64 in all."""
    pointers = dict.fromkeys(("x", "a"), "*bf16")
    pointers |= dict.fromkeys(("owners", "adapters", "slots", "tiles"), "*i32") | {"parts": "*fp32"}
    return [
        Case(
            f"low rank {rank}, {block_m}",
            low_rank_kernel,
            pointers | {"num_tiles": "i32", "num_rows": "i32"},
            {"K": 4, "IN": 2880, "RANK": rank, "BLOCK_M": block_m, "PART": PART, "OF_TOKENS": True},
            aligned=tuple(pointers),
            options=_options(target),
            tensor_cores="any",
            blocks=2,
        )
        for rank, block_m in ((16, 16), (16, 64), (64, 16), (64, 64))
    ]


def checks(config: ModelConfig, device: torch.device, tokens: Sequence[int]) -> Iterator[Check]:
    """Yield A x for two adapters of rank 8, fp32 sums whose order is another than the reference's."""
    generator = torch.Generator(device).manual_seed(0)
    target = tuning.target_of(device)
    experts, width, top_k = config.num_local_experts, config.hidden_size, config.num_experts_per_tok
    factor = torch.randn(experts, 8, width, device=device, generator=generator)
    factors = join([(factor, factor.mT, 1.0)] * 2)
    for count in tokens:
        x = torch.randn(count, width, device=device, generator=generator).bfloat16()
        logits = torch.randn(count, experts, device=device, generator=generator)
        routed = route(logits, top_k, tuning.block_m(target, count, top_k, experts))
        adapters = (torch.arange(count, device=device) % 3 - 1).int()
        yield Check(
            f"low rank, {count} tokens",
            [partial(low_products, x, factors, routed, adapters, of_tokens=True)],
            partial(low_products_ref, x, factors, routed, adapters, of_tokens=True),
            2**-16,
        )
