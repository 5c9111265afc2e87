"""Experts in tiles and labels in training, for the interpreter's worker, which takes and returns plain tensors."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gptoss_infer import kernels
from gptoss_infer.experts import Routing
from gptoss_infer.kernels import Adapted, cross_entropy, moe, moe_training, tiles, tuning
from gptoss_train.loss import Unembedding

ACTIVATION = moe.Swiglu(1.702, 7.0)


def experts_step(target: str, options: dict[str, Any], adapted: list[bool], *tensors: Tensor) -> list[Tensor]:
    """What `Experts.forward` makes of tiles, and every gradient.

    options: `scaling`, `dropout`, `merged`, `recompute` and `seed` of dropout; False for what is not there.
    tensors: x (N, C), weights (N, k), chosen (N, k), upstream (N, C); blocks, scales and bias of gate_up and of down;
        then A and B of each of both that is `adapted`.
    Returns: the result, and the gradients to x, to the weights and to the factors.
    """
    x, weights, chosen, upstream = tensors[:4]
    factors = [factor.requires_grad_(True) for factor in tensors[10:]]
    remaining = iter(factors)
    pairs = [(next(remaining), next(remaining)) if has else (None, None) for has in adapted]
    with patch.object(tuning, "target_of", lambda device: target):
        sides = [
            _projection(tuning.ORDERS[target], options, tensors[4 + 3 * i : 7 + 3 * i], *pairs[i]) for i in range(2)
        ]
        routing = Routing.of(chosen, len(tensors[4]))
        work = moe_training.Work(*sides, ACTIVATION, moe_training.rows_of(routing), options["recompute"])
        torch.manual_seed(options["seed"])
        leaves = [x.requires_grad_(True), weights.requires_grad_(True), *factors]
        out = moe_training.run(x, weights, work)
        out.backward(upstream)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _projection(
    order: Any, options: dict[str, Any], weight: tuple[Tensor, ...], a: Tensor | None, b: Tensor | None
) -> Adapted:
    constants = options["scaling"], options["dropout"], options["merged"]
    return Adapted(tiles.pack(*weight[:2], order), weight[2], a, b, *constants)


def label_loss(part_bytes: int, hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor) -> list[Tensor]:
    """Losses of labelled positions, and the gradient to `hidden`, the way that a GPU goes."""
    with patch.object(kernels, "on_gpu", lambda x: True), patch.object(cross_entropy, "PART_BYTES", part_bytes):
        unembedding = Unembedding.of(weight)
        assert unembedding.why_plain() is None
        leaf = hidden.requires_grad_(True)
        losses = unembedding.losses(leaf, targets)
        losses.backward(upstream)
        with torch.no_grad():
            assert torch.equal(unembedding.losses(hidden, targets), losses), "without a gradient losses are the same"
    assert leaf.grad is not None
    return [losses.detach(), leaf.grad]
