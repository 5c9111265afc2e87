"""AdamW over the adapter's factors, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from gptoss_train.recipe import Optim


def make_optimizer(factors: Sequence[nn.Parameter], optim: Optim) -> torch.optim.AdamW:
    """Return AdamW with the recipe's constants; its learning rate is set before every step."""
    return torch.optim.AdamW(
        factors, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, foreach=False
    )


def learning_rate(step: int, total_steps: int, optim: Optim) -> float:
    """Return the rate of step 0..total_steps-1: linear warm-up to `lr`, then down to `lr * min_lr_ratio`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(total_steps - optim.warmup_steps, 1)
    share = 1 - progress if optim.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * share)
