"""AdamW over the adapter's factors, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from gptoss_train.recipe import Optim


def make_optimizer(factors: Mapping[str, nn.Parameter], optim: Optim) -> torch.optim.AdamW:
    """Return AdamW with the recipe's constants over named factors; `set_learning_rate` before every step."""
    sides = [(".lora_A.", 1.0), (".lora_B.", optim.lora_plus_ratio)]
    groups = [
        {"params": [(name, p) for name, p in factors.items() if side in name], "ratio": ratio} for side, ratio in sides
    ]
    constants = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    return torch.optim.AdamW(groups, lr=optim.lr, fused=True, **constants)  # type: ignore[arg-type]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of A, and of B in its ratio (LoRA+)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]


def learning_rate(step: int, total_steps: int, optim: Optim) -> float:
    """Return the rate of step 0..total_steps-1: linear warm-up to `lr`, then down to `lr * min_lr_ratio`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(total_steps - optim.warmup_steps, 1)
    share = 1 - progress if optim.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * share)
