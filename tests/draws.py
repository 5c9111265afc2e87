"""Rows of logits, how they are sampled, and masks: for the tests of the plain sampler and of the kernels."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from gptoss_infer.sampling import Draws

V = 201  # four blocks of 64, the last of 9


def draws(num_rows: int, **given: object) -> Draws:
    """One value for all rows or one each; the request's number is the row's unless given."""
    defaults: dict = {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3, "request": torch.arange(num_rows),
        "sample": 0, "position": 7,
    }  # fmt: skip
    kinds = dict.fromkeys(("temperature", "top_p", "min_p"), torch.float32)
    columns = {
        name: torch.as_tensor(value, dtype=kinds.get(name, torch.int64)).expand(num_rows)
        for name, value in (defaults | given).items()
    }
    return Draws(**columns)


def rows_of(all_draws: Draws, rows: Tensor) -> Draws:
    return Draws(*(getattr(all_draws, field.name)[rows] for field in fields(Draws)))


def logits_of(num_rows: int, size: int = V, spread: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed)) * spread


def mask_of(allowed: Tensor) -> Tensor:
    """bool (n, V) -> int32 (n, ceil(V / 32)), spelled out bit by bit."""
    words = torch.zeros(len(allowed), -(-allowed.shape[1] // 32), dtype=torch.int64)
    for row, token in allowed.nonzero().tolist():
        words[row, token // 32] |= 1 << token % 32
    return words.where(words < 2**31, words - 2**32).int()
