"""How a mixture of experts is doing while it is tuned: load of the experts, saturated clamps, drift of the router.

Here: what is collected during forward passes, and the numbers made of it. Used by the training loop.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gptoss_infer.adapter import Factors, Target
from gptoss_infer.config import ModelConfig
from gptoss_infer.experts import Shown

SAMPLED_ROWS = 16  # of so many rows of pre-activations one is looked at


class Watch:
    """Collects from forward passes: give it to `GptOss.hidden`."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.limit = config.swiglu_limit
        self.counts = torch.zeros(config.num_hidden_layers, config.num_local_experts, dtype=torch.float64)
        self.clamped = torch.zeros(2, dtype=torch.float64, device=device)  # saturated values, values looked at

    def routed(self, layer: int, chosen: Tensor, counts: list[int]) -> None:
        """Add one forward pass' tokens per expert."""
        self.counts[layer] += torch.tensor(counts)

    def computed(self, layer: int, shown: Shown) -> None:
        """Count pre-activations beyond the clamps, in a sample of the rows."""
        gate, up = shown.gate[::SAMPLED_ROWS], shown.up[::SAMPLED_ROWS]
        saturated = (gate > self.limit).sum() + (up.abs() > self.limit).sum()
        self.clamped += torch.stack([saturated, saturated.new_tensor(gate.numel() + up.numel())])

    def sums(self) -> Tensor:
        """Everything collected as one fp64 vector, so that processes can add theirs."""
        return torch.cat([self.counts.flatten(), self.clamped.cpu()])

    def values(self, sums: Tensor) -> dict[str, float]:
        """Return the metrics of the (added) sums."""
        counts, (saturated, looked_at) = sums[:-2].view_as(self.counts), sums[-2:].tolist()
        variation = counts.std(1, correction=0) / counts.mean(1).clamp_min(1e-9)
        return {
            "moe/load_cv": float(variation.mean()),
            "moe/dead_experts": float((counts == 0).double().mean()),
            "moe/clamped_share": saturated / max(looked_at, 1),
        }


class Choices:
    """Remembers which experts were chosen: int16 (N, k) per layer and forward pass."""

    def __init__(self) -> None:
        self.chosen: list[Tensor] = []

    def routed(self, layer: int, chosen: Tensor, counts: list[int]) -> None:
        """Keep one layer's choices."""
        self.chosen.append(chosen.to(torch.int16).cpu())

    def computed(self, layer: int, shown: Shown) -> None:
        """Pre-activations are not kept."""

    def gone(self, later: Choices) -> float:
        """Return the share of these choices that a later pass over the same tokens did not make."""
        kept = [
            (before.unsqueeze(2) == after.unsqueeze(1)).any(2).double().mean()
            for before, after in zip(self.chosen, later.chosen, strict=True)
        ]
        return 1 - float(torch.stack(kept).mean())


def adapter_norms(factors: Iterable[tuple[Target, Factors]], scaling: float) -> dict[str, float]:
    """Return |scaling B A| (Frobenius, over all adapted weights) per layer, from r x r products alone."""
    squares: dict[int, float] = {}
    for target, (a, b) in factors:
        a, b = a.detach().float(), b.detach().float()
        square = ((a @ a.mT) * (b.mT @ b)).sum()  # |B A|^2 = <A A^T, B^T B>
        squares[target.layer] = squares.get(target.layer, 0.0) + scaling**2 * float(square)
    return {f"adapter/norm_layer_{layer:02d}": max(square, 0.0) ** 0.5 for layer, square in sorted(squares.items())}
