"""The checks that a GPU is to run, run in the interpreter's worker at toy sizes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gptoss_infer.config import published
from gptoss_infer.kernels.cases import checks
from gptoss_infer.kernels.check import error_of

TOY = replace(
    published("20b"), hidden_size=64, intermediate_size=64, num_local_experts=3, num_experts_per_tok=1,
    num_attention_heads=6, num_key_value_heads=2, head_dim=16, sliding_window=16, vocab_size=300,
)  # fmt: skip


def errors(*tokens: int) -> Tensor:
    """(checks, 2): each error, and the limit. With top-k, whose bisection takes seconds, one row stands for many."""
    all_of_them = checks(TOY, torch.device("cpu"), tokens)
    chosen = (check for check in all_of_them if "top-k" not in check.name or "sample 1 rows" in check.name)
    found = [(error_of(check), check.allowed) for check in chosen]
    return torch.tensor(found, dtype=torch.float64)
