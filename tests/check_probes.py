"""The checks that a GPU is to run, run in the interpreter's worker at toy sizes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gptoss_infer.config import published
from gptoss_infer.kernels.cases import checks
from gptoss_infer.kernels.check import error_of

TOY = replace(published("20b"), hidden_size=64, intermediate_size=64, num_local_experts=3, num_experts_per_tok=1)


def errors(*tokens: int) -> Tensor:
    """(checks, 2): each error and what is allowed."""
    found = [(error_of(check), check.allowed) for check in checks(TOY, torch.device("cpu"), tokens)]
    return torch.tensor(found, dtype=torch.float64)
