"""Launches of the expert kernels for the interpreter's worker, which takes and returns plain tensors."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import Tensor

from gptoss_infer.kernels import low_rank, moe, routing, tiles, tuning

ACTIVATION = moe.Swiglu(1.702, 7.0)


def linear(target: str, blocks: Tensor, scales: Tensor, bias: Tensor) -> moe.Linear:
    return moe.Linear(tiles.pack(blocks, scales, tuning.ORDERS[target]), bias)


def steps(
    target: str, block_m: int, top_k: int, x: Tensor, logits: Tensor, real: Tensor | None, *weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What up, down and combine return, each fed by the one before; what no kernel writes is NaN."""
    gate_up, down_proj = linear(target, *weights[:3]), linear(target, *weights[3:])
    routed = routing.route_ref(logits, top_k, block_m, real)

    new_empty = Tensor.new_empty

    def unwritten(like: Tensor, *shape: int, **options: object) -> Tensor:
        made = new_empty(like, *shape, **options)
        return (
            made.fill_(torch.nan) if made.dtype == torch.bfloat16 else made
        )  # the interpreter makes tensors of its own

    with patch.object(tuning, "target_of", lambda device: target), patch.object(Tensor, "new_empty", unwritten):
        hidden = moe.up(x, gate_up, routed, ACTIVATION)
        results = moe.down(hidden, down_proj, routed)
        return hidden, results, moe.combine(results, routed)


def product(target: str, block_m: int, rows: Tensor, *weights: Tensor) -> Tensor:
    """Rows (M, in) times one expert's weights, plus bias: (M, out)."""
    routed = routing.route_ref(torch.zeros(len(rows), 1), 1, block_m)
    with patch.object(tuning, "target_of", lambda device: target):
        return moe.down(rows, linear(target, *weights), routed).squeeze(1)


def moe_layer(top_k: int, x: Tensor, logits: Tensor, real: Tensor | None, *weights: Tensor) -> Tensor:
    gate_up, down_proj = linear("sm_90", *weights[:3]), linear("sm_90", *weights[3:])
    return moe.moe(x, logits, moe.Layer(gate_up, down_proj, ACTIVATION, top_k), real=real)


def moe_with_adapters(
    target: str, top_k: int, x: Tensor, logits: Tensor, adapters: Tensor, scaling: float, *tensors: Tensor
) -> Tensor:
    """`tensors` are six of weights, then A and B of gate_up and A and B of down for each adapter."""
    weights, factors = tensors[:6], tensors[6:]
    ups = [(*factors[i : i + 2], scaling) for i in range(0, len(factors), 4)]
    downs = [(*factors[i + 2 : i + 4], scaling) for i in range(0, len(factors), 4)]
    gate_up = linear(target, *weights[:3])._replace(low_rank=low_rank.join(ups))
    down_proj = linear(target, *weights[3:])._replace(low_rank=low_rank.join(downs))
    with patch.object(tuning, "target_of", lambda device: target):
        return moe.moe(x, logits, moe.Layer(gate_up, down_proj, ACTIVATION, top_k), adapters=adapters)
