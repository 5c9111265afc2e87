"""Experts in tiles, trained: forward, and exact gradients, on a GPU without a decoded weight in its memory.

The same function that `gptoss_infer.experts` runs in plain PyTorch, which is its reference: frozen MXFP4 weights and
biases, gradients to tokens, choices and LoRA factors. All rows of a layer are worked on at once, by the kernels of
`moe` and `moe_backward`. Kept for the backward pass are the pre-activations and the r-dimensional products, or with
`recompute` nothing but dropout's masks.

Legend: N tokens, k experts per token, M = N k rows, E experts, C hidden size, I intermediate size, R LoRA rank, filled
up to a power of two of at least 16.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from gptoss_infer.kernels import Adapted, low_rank, moe, tuning
from gptoss_infer.kernels.low_rank import LowRank, low_products
from gptoss_infer.kernels.moe_backward import factor_gradient, input_gradient, swiglu_backward
from gptoss_infer.kernels.routing import Routed, tile_table


class Rows(NamedTuple):
    """A routing whose counts the host knows, so that no tile is missing or empty."""

    slots: Tensor  # int32 (M,): the choice that each row is
    tokens: Tensor  # int64 (M,): the token of each row
    rows: Tensor  # int64 (N, k): the row of each choice
    chosen: Tensor  # int32 (N, k)
    tiles: Tensor  # int32 (3, P), see `Routed`
    starts: Tensor  # int32 (E + 1,): the first row of each expert, and M
    block_m: int

    def routed(self, weights: Tensor) -> Routed:
        """Return what the kernels take, with the weights (N, k) of the choices."""
        return Routed(self.chosen, weights.detach(), self.slots, self.tiles, self.block_m)


class Work(NamedTuple):
    """What a pass does, besides its differentiable tensors."""

    gate_up: Adapted
    down: Adapted
    activation: moe.Swiglu
    rows: Rows
    recompute: bool = False
    show: Callable[[Tensor, Tensor], None] | None = None


def rows_of(routing: tuple[Tensor, Tensor, Tensor, list[int], Tensor]) -> Rows:
    """Cut a `gptoss_infer.experts.Routing` into tiles, once for both passes."""
    slots, tokens, rows, counts, chosen = routing
    num_tokens, top_k = chosen.shape
    block_m = tuning.block_m(tuning.target_of(chosen.device), num_tokens, top_k, len(counts))
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(chosen.device)
    return Rows(slots.int(), tokens, rows, chosen.int(), tile_table(counts, block_m).to(chosen.device), starts, block_m)


def run(x: Tensor, weights: Tensor, work: Work) -> Tensor:
    """Return the weighted sum of each token's experts, bf16 (N, C); the host waits for nothing.

    Args:
        x: bf16 (N, C). weights: (N, k), the softmax over the chosen.
        work: its projections are in tiles.
    Raises: ValueError if `x` is not bf16.
    """
    factors = (work.gate_up.a, work.gate_up.b, work.down.a, work.down.b)
    return _RunTiled.apply(x, weights, work, *factors)


class _RunTiled(torch.autograd.Function):
    """See `run`."""

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, work: Work, *factors: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        routed = work.rows.routed(weights)
        gate_up, down = _Side(work.gate_up, routed, work.rows), _Side(work.down, routed, work.rows)
        masks = gate_up.dropout_mask(x), down.dropout_mask(x)
        low_in, pre, hidden = _up(x, gate_up, masks[0], work.activation)
        if work.show is not None:
            work.show(pre, hidden)
        low_out = down.low(hidden, masks[1], of_tokens=False)
        results = moe.down(hidden, down.linear, routed, low=down.added(low_out))
        if any(ctx.needs_input_grad):
            ctx.work = work
            kept = (None, None, None) if work.recompute else (low_in, pre, low_out)
            ctx.save_for_backward(x, weights, *factors, *masks, *kept)
        return moe.combine(results, routed)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, weights, *rest = ctx.saved_tensors
        work: Work = ctx.work
        masks, (low_in, pre, low_out) = rest[4:6], rest[6:]  # the first four tell autograd when a factor was changed
        routed = work.rows.routed(weights)
        gate_up, down = _Side(work.gate_up, routed, work.rows), _Side(work.down, routed, work.rows)
        if work.recompute:
            low_in, pre, hidden = _up(x, gate_up, masks[0], work.activation)
            low_out = down.low(hidden, masks[1], of_tokens=False)
            del hidden
        grad = grad.contiguous()
        back = down.back(grad, of_tokens=True)  # (M, R), not yet times the weights of the choices
        grad_hidden = down.grad_input(grad, back, masks[1], of_tokens=True, to_slots=False)  # (M, I), nor is this
        hidden, grad_pre, slopes = swiglu_backward(grad_hidden, pre, grad, down.linear.bias, routed, work.activation)
        of_rows = weights.reshape(-1)[work.rows.slots].unsqueeze(1)  # (M, 1)
        needed = ctx.needs_input_grad
        grad_a_down = down.grad_a(back, hidden, masks[1], of_rows, of_tokens=False) if needed[5] else None
        grad_b_down = down.grad_b(low_out, grad, of_rows, of_tokens=True) if needed[6] else None
        del grad_hidden, hidden
        back = gate_up.back(grad_pre, of_tokens=False)
        grad_x = None
        if needed[0]:
            by_slot = gate_up.grad_input(grad_pre, back, masks[0], of_tokens=False, to_slots=True)  # (N, k, C)
            grad_x = moe.combine(by_slot, routed._replace(weights=torch.ones_like(routed.weights)))
            del by_slot
        grad_a_up = gate_up.grad_a(back, x, masks[0], None, of_tokens=True) if needed[3] else None
        grad_b_up = gate_up.grad_b(low_in, grad_pre, None, of_tokens=False) if needed[4] else None
        return grad_x, slopes.to(weights.dtype), None, grad_a_up, grad_b_up, grad_a_down, grad_b_down


def _up(x: Tensor, side: _Side, mask: Tensor | None, activation: moe.Swiglu) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the LoRA products (M, R), pre-activations (M, 2 I) and what down_proj reads (M, I)."""
    low = side.low(x, mask, of_tokens=True)
    pre = x.new_empty(len(side.routed.slots), side.linear.tiles.out_features)
    return low, pre, moe.up(x, side.linear, side.routed, activation, low=side.added(low), pre=pre)


class _Side:
    """One of the two projections during a pass."""

    def __init__(self, projection: Adapted, routed: Routed, rows: Rows) -> None:
        self.p, self.routed, self.rows = projection, routed, rows
        self.factors: LowRank | None = None
        if projection.a is not None and projection.b is not None:
            self.factors = low_rank.join([(projection.a.detach(), projection.b.detach(), projection.scaling)])
        added = None if projection.merged else self.factors
        self.linear = moe.Linear(projection.tiles, projection.bias.detach(), added)

    def added(self, low: Tensor | None) -> Tensor | None:
        """Return what a product is to add: nothing, if the weights hold it already."""
        return None if low is None or self.p.merged else low.unsqueeze(0)

    def dropout_mask(self, like: Tensor) -> Tensor | None:
        """Return a fresh mask (M, in) of 0 and 1 / (1 - p) for the input of the LoRA term; None without dropout."""
        if self.factors is None or self.p.dropout == 0:
            return None
        keep = 1 - self.p.dropout
        return like.new_empty(len(self.routed.slots), self.factors.a.shape[2]).bernoulli_(keep).div_(keep)

    def low(self, x: Tensor, mask: Tensor | None, *, of_tokens: bool) -> Tensor | None:
        """Return drop(x) A^T of each row, bf16 (M, R); None without factors."""
        if self.factors is None:
            return None
        x, of_tokens = self._dropped(x, mask, of_tokens)
        return self._products(x, self.factors, of_tokens)

    def back(self, grad: Tensor, *, of_tokens: bool) -> Tensor | None:
        """Return grad B of each row, bf16 (M, R); None without factors."""
        if self.factors is None:
            return None
        return self._products(grad, self.factors._replace(a=self.factors.b.mT.contiguous()), of_tokens)

    def grad_input(
        self, grad: Tensor, back: Tensor | None, mask: Tensor | None, *, of_tokens: bool, to_slots: bool
    ) -> Tensor:
        """Return the gradient to the input, `moe_backward.input_gradient`'s; a mask is not the kernel's to apply."""
        low = self.added(back) if mask is None else None
        result = input_gradient(grad, self.linear, self.routed, low=low, of_tokens=of_tokens, to_slots=to_slots)
        if mask is not None and (low := self.added(back)) is not None:
            term = input_gradient(None, self.linear, self.routed, low=low, of_tokens=False, to_slots=False).mul_(mask)
            result.add_(term[self.rows.rows] if to_slots else term)
        return result

    def grad_a(
        self, back: Tensor | None, x: Tensor, mask: Tensor | None, weights: Tensor | None, *, of_tokens: bool
    ) -> Tensor:
        """Return the gradient to A (E, r, in) from `back`, times the weights of its rows, and the input."""
        assert self.p.a is not None, "there are no factors"
        assert back is not None, "there are factors, and so their products"
        x, of_tokens = self._dropped(x, mask, of_tokens)
        left = back if weights is None else back * weights
        outer = factor_gradient(left, x, self.routed, self.rows.starts, of_tokens=of_tokens)  # (E, R, in)
        return outer[:, : self.p.a.shape[1]].to(self.p.a.dtype)

    def grad_b(self, low: Tensor | None, grad: Tensor, weights: Tensor | None, *, of_tokens: bool) -> Tensor:
        """Return the gradient to B (E, out, r) from the LoRA products, times the weights of their rows, and `grad`."""
        assert self.p.b is not None, "there are no factors"
        assert low is not None, "there are factors, and so their products"
        left = low if weights is None else low * weights
        outer = factor_gradient(left, grad, self.routed, self.rows.starts, of_tokens=of_tokens)  # (E, R, out)
        return outer[:, : self.p.b.shape[2]].mT.to(self.p.b.dtype).mul_(self.p.scaling)

    def _products(self, x: Tensor, factors: LowRank, of_tokens: bool) -> Tensor:
        everyone = x.new_zeros(len(self.routed.chosen), dtype=torch.int32)
        return low_products(x, factors, self.routed, everyone, of_tokens=of_tokens).sum(0).bfloat16()

    def _dropped(self, x: Tensor, mask: Tensor | None, of_tokens: bool) -> tuple[Tensor, bool]:
        """Return what factors read, and whether it is by token: with dropout, every row is another."""
        if mask is None:
            return x, of_tokens
        return (x.index_select(0, self.rows.tokens) if of_tokens else x) * mask, False
