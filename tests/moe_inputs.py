"""Random experts, tokens and adapters of about unit effect, for the tests of the expert kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def random_weights(num_experts: int, hidden: int, units: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Blocks, scales and bias of gate_up, then of down; values of about unit effect."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for rows, columns in ((2 * units, hidden), (hidden, units)):
        blocks = torch.randint(0, 256, (num_experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 125, (num_experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        found += [blocks, scales, torch.randn(num_experts, rows, generator=generator).bfloat16()]
    return tuple(found)


def random_inputs(num_tokens: int, num_experts: int, hidden: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden, generator=generator).bfloat16()
    return x, torch.randn(num_tokens, num_experts, generator=generator)


def random_factors(num_experts: int, hidden: int, units: int, rank: int, seed: int) -> list[Tensor]:
    """A and B of gate_up, then of down, whose product is about as large as the weights."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows, columns in ((2 * units, hidden), (hidden, units)):
        found.append(torch.randn(num_experts, rank, columns, generator=generator) * columns**-0.5)
        found.append(torch.randn(num_experts, rows, rank, generator=generator) * rank**-0.5)
    return found
