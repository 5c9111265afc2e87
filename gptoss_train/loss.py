"""Cross-entropy at labelled positions only, in tiles, against a frozen unembedding: no full logits tensor ever exists.

201,088 logits a position are what fills a GPU in most trainers. Here labelled hidden states meet the unembedding a
tile at a time: some rows by some of the vocabulary, small enough for a CPU's cache. Sums over the vocabulary go from
tile to tile relative to a running maximum (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018;
Dao et al., "FlashAttention", 2022), and since the unembedding is frozen, the gradient to the hidden states is taken
in the same pass. Used by the trainer and by the maker of the built-in model. On a GPU the same is done in Triton, with
no logits in memory at all (`gptoss_infer.kernels.cross_entropy`); this path is its reference.

With l the logits, t the target and q the softmax over all tokens but t,

    d = logsumexp(l_j, j != t) - l_t;  loss = softplus(d);  d loss / d hidden = sigmoid(d) (sum_j q_j W_j - W_t)

where sigmoid(d) is 1 - p_t, found without subtracting p_t from 1. So neither loss nor gradient loses digits where the
model is sure of the target: as p_t tends to 1, the usual sum_j p_j W_j - W_t becomes a difference of equal numbers.
The maximum starts at l_t and is taken off within the matrix product, before its result is rounded, so that in bf16
it is a logit's distance from the likeliest ones that is rounded, and not the logit itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from gptoss_infer import kernels

# Logits held at a time, in fp32 (fp64 for fp64 input); a copy in `hidden`'s dtype, if it is another, comes on top, and
# some (TILE_ROWS, C) sums. A CPU's tile should stay in its cache; a GPU's should give every unit enough to do.
CPU_TILE_BYTES = 2**23
GPU_TILE_BYTES = 2**28
TILE_ROWS = 1024  # with fewer, reading the unembedding costs more than multiplying by it
TILE_COLUMNS = 64  # a tile's width is a multiple of this, and never less: odd widths slow the products down
DENSE_SHARE = 0.5  # with more distinct rows than this share, merging equal ones would not pay
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Unembedding:
    """A frozen output matrix with equal rows merged: exact, and as much cheaper as there are repeated rows.

    Tokens whose rows are equal always have equal logits, so the softmax over all V rows is one over the U distinct
    ones, each counted as often as it occurs. In a published checkpoint nearly all rows differ and nothing is merged; in
    a small model that was taught a few hundred tokens this is what makes a step affordable on a CPU.
    """

    rows: Tensor  # (U, C)
    log_counts: Tensor | None  # (U,) fp32, fp64 for fp64 rows; None if every row counts once
    row_of_token: Tensor | None  # int64 (V,); None for the identity

    @classmethod
    def of(cls, weight: Tensor) -> Unembedding:
        """Merge the equal rows of a (V, C) matrix, if there are enough of them."""
        row_of_token, counts = _equal_rows(weight)
        if len(counts) > DENSE_SHARE * len(weight):
            return cls(weight, None, None)
        return cls(
            _representatives(weight, row_of_token, len(counts)), counts.to(_sum_dtype(weight)).log(), row_of_token
        )

    def why_plain(self) -> str | None:
        """Return why the loss runs in plain PyTorch; None if it runs in Triton, on a GPU."""
        if (why := kernels.why_no_triton(self.rows)) is not None:
            return why
        if self.rows.dtype != torch.bfloat16:
            return f"the model computes in {self.rows.dtype}, the kernels in torch.bfloat16"
        return None

    def without(self, rows: Tensor) -> Tensor:
        """Return what is added to the logit of a target's row, in bits (n, 1), to leave the target out of its count.

        That is log((c - 1) / c) if c tokens share the row, so minus infinity if c is 1.
        """
        if self.log_counts is None:
            return torch.full((len(rows), 1), -math.inf, dtype=_sum_dtype(self.rows), device=rows.device)
        return self.log_counts.index_select(0, rows).neg_().exp_().neg_().log1p_().unsqueeze(1) * LOG2_E

    def row_of(self, tokens: Tensor) -> Tensor:
        """Return which of `rows` each token has, int64 (n,)."""
        return tokens if self.row_of_token is None else self.row_of_token.index_select(0, tokens)

    def of_one(self, log_p: Tensor, rows: Tensor) -> Tensor:
        """Return log p of a single token, from that of all the tokens which have its row."""
        return log_p if self.log_counts is None else log_p - self.log_counts[rows]

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return -log p(target), (n,) in fp32 (fp64 for fp64 input), differentiable once in `hidden`; n may be 0.

        Args:
            hidden: (n, C) final hidden states, normalised, in the dtype of `rows`.
            targets: int64 (n,) token ids in [0, V): there is no id that means "ignore".
        """
        rows = self.row_of(targets)
        # Under no_grad, too, a Function is told that hidden requires a gradient.
        return _FrozenCrossEntropy.apply(hidden if torch.is_grad_enabled() else hidden.detach(), self, rows)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums and losses: fp32, or fp64 for fp64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _equal_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Number the distinct rows of (V, C): return the number of every token's (V,), and how often each occurs (U,)."""
    words = weight.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.dtype.itemsize])  # (V, C)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (weight.shape[1],), generator=generator).to(weight.device)
    # The low half of an fp64 is often all zeros, and zeros at the end of a factor are lost from its product.
    parts = (part.long() ^ part.long() >> 32 if part.itemsize == 8 else part.long() for part in words.split(1024))
    hashes = torch.cat([(part * factors).sum(-1) for part in parts])  # (V,), wrapping around
    _, row_of_token, counts = hashes.unique(return_inverse=True, return_counts=True)
    return row_of_token, counts


def _representatives(weight: Tensor, row_of_token: Tensor, num_rows: int) -> Tensor:
    """Return the distinct rows (U, C), after comparing every row with the one that stands for it."""
    first = torch.full((num_rows,), len(weight), device=weight.device).scatter_reduce_(
        0, row_of_token, torch.arange(len(weight), device=weight.device), "amin"
    )
    distinct = weight[first]
    same = all(
        torch.equal(part, distinct[index])
        for part, index in zip(weight.split(8192), row_of_token.split(8192), strict=True)
    )
    assert same, "two different rows have the same 64-bit hash"
    return distinct


class _FrozenCrossEntropy(torch.autograd.Function):
    """Per-row cross-entropy; the gradient to `hidden` is computed in forward, as the matrix has none."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, unembedding: Unembedding, targets: Tensor
    ) -> Tensor:
        """(n, C), targets as rows of `unembedding` int64 (n,) -> (n,)."""
        dtype = _sum_dtype(hidden)
        losses = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        # Rounded to hidden's dtype only once it is scaled, in backward.
        slope = torch.empty_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        for start in range(0, len(hidden), TILE_ROWS):
            part = slice(start, start + TILE_ROWS)
            target_rows = unembedding.rows.index_select(0, targets[part]).to(dtype)  # (n', C)
            gold = (hidden[part] * target_rows).sum(-1, keepdim=True)  # (n', 1)
            over = _over_others if unembedding.why_plain() else _over_others_in_triton
            normalizer, mean = over(hidden[part], unembedding, targets[part], gold, with_mean=slope is not None)
            odds = normalizer - gold  # (n', 1), log of (1 - p) / p
            losses[part] = softplus(odds, threshold=40).squeeze(1)  # log(1 + e^40) is 40 in fp64 too
            if slope is not None and mean is not None:
                slope[part] = mean.sub_(target_rows).mul_(odds.sigmoid())
        if slope is not None:
            ctx.save_for_backward(slope)
            ctx.dtype = hidden.dtype  # type: ignore[attr-defined]
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Scale the saved slope by each row's upstream gradient."""
        (slope,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return (slope * grads[0].unsqueeze(1)).to(ctx.dtype), None, None  # type: ignore[attr-defined]


def _over_others_in_triton(
    hidden: Tensor, unembedding: Unembedding, targets: Tensor, gold: Tensor, *, with_mean: bool
) -> tuple[Tensor, Tensor | None]:
    """As `_over_others`, its reference: on a GPU, with logits that are never rounded and never in memory."""
    rows, log_counts, without = unembedding.rows, unembedding.log_counts, unembedding.without(targets)
    return kernels.over_others(hidden, rows, log_counts, targets, without, with_mean=with_mean)


def _over_others(
    hidden: Tensor, unembedding: Unembedding, targets: Tensor, gold: Tensor, *, with_mean: bool
) -> tuple[Tensor, Tensor | None]:
    """Over all tokens but the target, return the logits' logsumexp (n, 1) and the mean row by softmax (n, C).

    Args:
        hidden: (n, C), n > 0.
        unembedding: Its U rows make the vocabulary.
        targets: int64 (n,), rows of `unembedding`.
        gold: (n, 1) the targets' logits, in the dtype of sums.
        with_mean: Whether the mean row is wanted; if not, it is None.
    """
    n, dtype, rows, log_counts = len(hidden), gold.dtype, unembedding.rows, unembedding.log_counts
    tile_bytes = GPU_TILE_BYTES if kernels.on_gpu(hidden) else CPU_TILE_BYTES
    width = min(len(rows), max(1, tile_bytes // (dtype.itemsize * n * TILE_COLUMNS)) * TILE_COLUMNS)
    without_target = unembedding.without(targets)
    tile = torch.empty(n * width, dtype=dtype, device=hidden.device)
    rounded = tile if hidden.dtype == dtype else torch.empty_like(tile, dtype=hidden.dtype)
    # In bits, as exp2 is several times as fast as exp. The maximum is kept as a number that hidden's dtype can hold. It
    # starts no lower than 0, so that nothing that matters is further from it than from 0.
    top = (gold * LOG2_E).clamp_min_(0).to(hidden.dtype)  # (n, 1)
    total = torch.zeros_like(gold)  # of 2^(logit in bits - top)
    weighted = torch.zeros_like(hidden, dtype=dtype) if with_mean else None  # (n, C), rows times the same
    for start in range(0, len(rows), width):
        block = rows[start : start + width]  # (v, C)
        products, logits = (buffer[: n * len(block)].view(n, len(block)) for buffer in (rounded, tile))
        torch.addmm(-top, hidden, block.T, alpha=LOG2_E, out=products)
        if products.dtype != dtype:
            logits.copy_(products)
        if log_counts is not None:
            logits.add_(log_counts[start : start + width], alpha=LOG2_E)
        column = targets.unsqueeze(1) - start  # (n, 1)
        here = (column >= 0) & (column < len(block))
        logits.scatter_add_(1, column.clamp_(0, len(block) - 1), without_target.where(here, 0.0))
        new_top = (logits.amax(-1, keepdim=True).clamp_min_(0) + top).to(hidden.dtype)
        rise = new_top.to(dtype) - top  # (n, 1)
        logits.sub_(rise).exp2_()
        shrink = rise.neg_().exp2_()
        top, total = new_top, total.mul_(shrink).add_(logits.sum(-1, keepdim=True))
        if weighted is not None:
            if products.dtype != dtype:
                products.copy_(logits)
            weighted.mul_(shrink).add_(products @ block)
    mean = None if weighted is None else weighted.div_(total.clamp_min(torch.finfo(dtype).tiny))  # 0 if V is 1
    return (total.log2() + top) / LOG2_E, mean
