"""Random steps over pages, and the attention in them written out: for the tests of tables and of kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gptoss_infer.page_tables import Held


class RandomStep(NamedTuple):
    """Queries of some sequences, and their keys and values in scattered pages; NaN in all pages that none holds."""

    held: list[Held]
    q: Tensor  # (N, H, D)
    keys: Tensor  # (pages, K, T, D)
    values: Tensor
    sinks: Tensor


def random_step(
    sequences: list[tuple[int, int]], *, heads: tuple[int, int], d: int, page: int, dtype: torch.dtype = torch.float32
) -> RandomStep:
    """Make one from (keys before the first new token, new tokens) of each sequence, and (query heads, kv heads)."""
    generator = torch.Generator().manual_seed(len(sequences) + heads[0])
    needed = [-(-(own + length) // page) for own, length in sequences]
    free = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    held, row = [], 0
    for count, (own, length) in zip(needed, sequences, strict=True):
        held.append(Held([free.pop() for _ in range(count)], own, row, length))
        row += length
    q = torch.randn(row, heads[0], d, generator=generator).to(dtype)
    keys, values = torch.randn(2, sum(needed) + 3, heads[1], page, d, generator=generator).to(dtype)
    for pool in (keys, values):
        pool[free] = torch.nan
    return RandomStep(held, q, keys, values, torch.randn(heads[0], generator=generator))


def dense_rows(step: RandomStep, window: int | None) -> Tensor:
    """The attention of every row in fp64, one row and head at a time."""
    out = torch.zeros(step.q.shape, dtype=torch.float64)
    group = step.q.shape[1] // step.keys.shape[1]
    for pages, own, row, length in step.held:
        keys, values = (pool[pages].double().transpose(0, 1).flatten(1, 2) for pool in (step.keys, step.values))
        for i in range(length):
            last = own + i
            seen = slice(0 if window is None else max(0, last - window + 1), last + 1)
            for head in range(step.q.shape[1]):
                scores = keys[head // group, seen] @ step.q[row + i, head].double() * step.q.shape[2] ** -0.5
                weights = torch.cat([scores, step.sinks[head : head + 1].double()]).softmax(0)[:-1]
                out[row + i, head] = weights @ values[head // group, seen]
    return out
