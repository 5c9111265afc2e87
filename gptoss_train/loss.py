"""Cross-entropy at labelled positions only, in chunks, against a frozen unembedding: no full logits tensor ever exists.

201,088 logits a position are what fills a GPU in most trainers. Here hidden states of labelled tokens meet the
unembedding a chunk at a time, and since the unembedding is frozen, the gradient to the hidden states is taken in the
same pass. Used by the trainer and by the maker of the built-in model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = 2**28  # fp32 logits held at a time
DENSE_SHARE = 0.5  # with more distinct rows than this share, merging equal ones would not pay


@dataclass(frozen=True)
class Unembedding:
    """A frozen output matrix with equal rows merged: exact, and as much cheaper as there are repeated rows.

    Tokens whose rows are equal always have equal logits, so the softmax over all V rows is one over the U distinct
    ones, each counted as often as it occurs. In a published checkpoint nearly all rows differ and nothing is merged; in
    a small model that was taught a few hundred tokens this is what makes a step affordable on a CPU.
    """

    rows: Tensor  # (U, C)
    log_counts: Tensor | None  # (U,) fp32; None if every row counts once
    row_of_token: Tensor | None  # int64 (V,); None for the identity

    @classmethod
    def of(cls, weight: Tensor) -> Unembedding:
        """Merge the equal rows of a (V, C) matrix, if there are enough of them."""
        distinct, row_of_token, counts = _distinct_rows(weight)
        if len(distinct) > DENSE_SHARE * len(weight):
            return cls(weight, None, None)
        return cls(distinct, counts.float().log(), row_of_token)

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return -log p(target), fp32 (n,), differentiable in `hidden`.

        Args:
            hidden: (n, C) final hidden states, normalised. targets: int64 (n,) token ids.
        """
        rows = targets if self.row_of_token is None else self.row_of_token[targets]
        return _FrozenCrossEntropy.apply(hidden, self.rows, self.log_counts, rows)


def _distinct_rows(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return distinct rows (U, C), the distinct row of every token (V,), and how often each occurs (U,)."""
    words = weight.contiguous().view(torch.int16 if weight.dtype.itemsize == 2 else torch.int32)  # (V, C)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (weight.shape[1],), generator=generator).to(weight.device)
    hashes = torch.cat([(part.long() * factors).sum(-1) for part in words.split(8192)])  # (V,), wrapping around
    _, row_of_token, counts = hashes.unique(return_inverse=True, return_counts=True)
    first = torch.empty_like(counts).scatter_reduce_(
        0, row_of_token, torch.arange(len(weight), device=weight.device), "amin", include_self=False
    )
    distinct = weight[first]
    same = all(
        torch.equal(part, distinct[index])
        for part, index in zip(weight.split(8192), row_of_token.split(8192), strict=True)
    )
    assert same, "two different rows have the same 64-bit hash"
    return distinct, row_of_token, counts


class _FrozenCrossEntropy(torch.autograd.Function):
    """Per-row cross-entropy; the gradient to `hidden` is computed in forward, as the matrix has none."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        rows: Tensor,
        log_counts: Tensor | None,
        targets: Tensor,
    ) -> Tensor:
        """(n, C), (U, C), (U,), (n,) -> (n,) fp32."""
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        chunk = max(1, CHUNK_BYTES // (4 * len(rows)))
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ rows.T).float()  # (n', U)
            gold = logits.gather(1, targets[part, None])
            if log_counts is not None:
                logits += log_counts
            normalizer = logits.logsumexp(-1, keepdim=True)
            losses[part] = (normalizer - gold).squeeze(1)
            if slope is not None:
                probabilities = logits.sub_(normalizer).exp_()  # of all tokens that share a row together
                probabilities.scatter_add_(1, targets[part, None], torch.full_like(gold, -1.0))
                slope[part] = probabilities.to(rows.dtype) @ rows
        if slope is not None:
            ctx.save_for_backward(slope)
        return losses

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Scale the saved slope by each row's upstream gradient."""
        (slope,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return slope * grads[0].unsqueeze(1).to(slope.dtype), None, None, None
