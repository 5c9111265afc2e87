"""Softmax attention with sinks: over a packed batch in linear memory, and over a cache; plain PyTorch.

A sink is one learned logit per head that takes probability and gives no value. `packed_attention` is what training and
scoring run: documents lie one after another, a query sees the keys of its own document up to itself, on sliding layers
the last `window` of them. It works through blocks of queries and never holds more than one block's scores; backward
computes them again. `chunk_attention` and `cached_attention` are what generation runs: for prompts, and token by token.

The backward pass is flash attention's (Dao et al., arXiv 2205.14135), fed with the output and the normalizer that
include the sink. That makes the gradients to q, k and v exact as they stand, and the sink's is -sum(p_sink * D).

Legend: N tokens of all documents, H query heads, K key/value heads, R = H / K query heads per kv head, D head size, S
keys in a block's range.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gptoss_infer import kernels

BLOCK_QUERIES = 128  # on a CPU; the scores of a block, H x 128 x S, then stay near the cores
KEY_STEP = 64  # key ranges are multiples of it: products of a few sizes, which oneDNN compiles once each
SCORE_BYTES = 2**28  # on a GPU, where larger blocks mean fewer launches: fp32 scores of a block


class Blocks:
    """How a packed batch is worked through: blocks of queries, and the first key that each may see.

    Args:
        starts: int64 (N,), on the CPU: where the document of each token begins; not decreasing.
    """

    def __init__(self, starts: Tensor, device: torch.device) -> None:
        self.num_tokens, self.device = len(starts), device
        self.first_of = starts.tolist()
        self.starts = starts.to(device, torch.int32)
        # Where the document of each token ends: at the first start that is not the token's own.
        self.ends = torch.searchsorted(starts, starts, right=True).to(device, torch.int32)

    def ranges(self, window: int | None, num_heads: int) -> list[tuple[int, int, int]]:
        """Return (first query, end of queries, first key) of every block; its last key is its last query.

        The range may begin before the first key that is seen.
        """
        found, first = [], 0
        while first < self.num_tokens:
            document = self.first_of[first]
            size = BLOCK_QUERIES
            if kernels.on_gpu(self.starts):
                before = first - document if window is None else min(first - document, window)
                most = SCORE_BYTES // (4 * num_heads)  # size * (before + size) may be that many
                size = max(size, (math.isqrt(before**2 + 4 * most) - before) // 2 // size * size)
            end = min(first + size, self.num_tokens)
            key = document if window is None else max(document, first - window + 1)
            key = max(0, end - -(-(end - key) // KEY_STEP) * KEY_STEP)
            found.append((first, end, key))
            first = end
        return found

    def hidden(self, first: int, end: int, key: int, window: int | None) -> Tensor:
        """Return bool (n, S): True where a query of the block must not see a key."""
        queries = torch.arange(first, end, device=self.device).unsqueeze(1)
        keys = torch.arange(key, end, device=self.device)
        hidden = (keys > queries) | (keys < self.starts[first:end].unsqueeze(1))
        return hidden if window is None else hidden | (queries - keys >= window)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, blocks: Blocks, *, window: int | None) -> Tensor:
    """Attend within documents, causally, to the last `window` keys (the query's own included; None: to all).

    Args:
        q: (N, H, D). k, v: (N, K, D). sinks: (H,).
    Returns: (N, H, D), differentiable in all four tensors.
    """
    return _PackedAttention.apply(q, k, v, sinks, blocks, window)


class _PackedAttention(torch.autograd.Function):
    """See `packed_attention`."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, blocks: Blocks, window: int | None
    ) -> Tensor:
        out, normalizers = kernels.packed_forward(q, k, v, sinks, blocks, window=window)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, out, normalizers, sinks)
            ctx.blocks, ctx.window = blocks, window
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        *attended, sinks = ctx.saved_tensors
        *grads, products = kernels.packed_backward(grad, Attended(*attended), ctx.blocks, window=ctx.window)
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            shares = (sinks.to(products.dtype).unsqueeze(1) - attended[-1]).exp()  # (H, N)
            grad_sinks = -(shares * products).sum(1).to(sinks.dtype)
        return *grads, grad_sinks, None, None


class Attended(NamedTuple):
    """What the backward pass needs of the forward pass."""

    q: Tensor  # (N, H, D)
    k: Tensor  # (N, K, D)
    v: Tensor  # (N, K, D)
    out: Tensor  # (N, H, D)
    normalizers: Tensor  # fp32 or better (H, N): logarithms of the sums, sinks included


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, blocks: Blocks, *, window: int | None
) -> tuple[Tensor, Tensor]:
    """Return the output (N, H, D) and the normalizers (H, N); arguments as in `packed_attention`."""
    n, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    dtype = torch.promote_types(torch.float32, q.dtype)
    normalizers = torch.empty(heads, n, dtype=dtype, device=q.device)
    for first, end, key in blocks.ranges(window, heads):
        pair = k[key:end].transpose(0, 1), v[key:end].transpose(0, 1)  # (K, S, D)
        hidden = blocks.hidden(first, end, key, window)
        out[first:end], normalizers[:, first:end] = _attend(q[first:end], *pair, sinks, hidden)
    return out, normalizers


def packed_backward(
    grad: Tensor, attended: Attended, blocks: Blocks, *, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients to q, k and v, and the dot products of the rows of `out` and `grad`, (H, N).

    Args:
        grad: (N, H, D), to the output.
    """
    q, k, v, out, normalizers = attended
    heads, kv, dtype = q.shape[1], k.shape[1], normalizers.dtype
    grad_q = torch.empty_like(q)
    grad_k, grad_v = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    products = torch.linalg.vecdot(grad.to(dtype), out.to(dtype)).T.contiguous()  # (H, N)
    for first, end, key in blocks.ranges(window, heads):
        queries, upstream = _by_kv_head(q[first:end], kv), _by_kv_head(grad[first:end], kv)  # (K, R n, D)
        keys, values = k[key:end].transpose(0, 1), v[key:end].transpose(0, 1)  # (K, S, D)
        weights = _scores(queries, keys, blocks.hidden(first, end, key, window))
        weights.sub_(normalizers[:, first:end].reshape(kv, -1, 1)).exp_()  # (K, R n, S)
        grad_v[key:end] += torch.bmm(weights.to(v.dtype).mT, upstream).transpose(0, 1)
        slopes = torch.bmm(upstream, values.mT).to(dtype)  # (K, R n, S)
        slopes.sub_(products[:, first:end].reshape(kv, -1, 1)).mul_(weights).mul_(q.shape[2] ** -0.5)
        slopes = slopes.to(q.dtype)
        grad_q[first:end] = _by_token(torch.bmm(slopes, keys), heads)
        grad_k[key:end] += torch.bmm(slopes.mT, queries).transpose(0, 1)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), products


def _attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output (n, H, D) of a block of queries (n, H, D) on keys and values (K, S, D), and the normalizers.

    These are (H, n): the logarithms of the sums, sinks included. `hidden` is bool (n, S).
    """
    scores = _scores(_by_kv_head(q, len(k)), k, hidden)  # (K, R n, S)
    sink = _per_row(sinks.to(scores.dtype), len(q), len(k))  # (K, R n, 1)
    top = torch.maximum(scores.amax(-1, keepdim=True), sink)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True).add_((sink - top).exp_())
    result = torch.bmm(weights.div_(total).to(v.dtype), v)  # (K, R n, D)
    return _by_token(result, q.shape[1]), top.add_(total.log_()).view(q.shape[1], -1)


def _by_kv_head(x: Tensor, kv: int) -> Tensor:
    """(n, H, D) -> (K, R n, D)."""
    n, heads, d = x.shape
    return x.view(n, kv, heads // kv, d).permute(1, 2, 0, 3).reshape(kv, -1, d)


def _by_token(x: Tensor, heads: int) -> Tensor:
    """(K, R n, D) -> (n, H, D)."""
    return x.view(heads, -1, x.shape[2]).transpose(0, 1)


def _per_row(sinks: Tensor, n: int, kv: int) -> Tensor:
    """(H,) -> (K, R n, 1)."""
    return sinks.view(kv, -1, 1).expand(-1, -1, n).reshape(kv, -1, 1)


def _scores(queries: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
    """(K, R n, D), (K, S, D), bool (n, S) -> scaled scores (K, R n, S) in fp32 or better, -inf where hidden."""
    dtype = torch.promote_types(torch.float32, queries.dtype)
    scores = torch.bmm(queries, keys.mT).to(dtype).mul_(queries.shape[2] ** -0.5)
    by_query = scores.view(scores.shape[0], -1, *hidden.shape)  # (K, R, n, S)
    by_query.masked_fill_(hidden, -torch.inf)
    return scores


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, first: int, window: int | None) -> Tensor:
    """Attend from a run of tokens of one sequence to cached ones and to each other, block by block of queries.

    Args:
        q: (n, H, D). k, v: (K, S, D), the sequence's from some token on; what lies after the last query's is not seen.
        sinks: (H,). first: which key is the first query's own.
        window: how many keys a query sees, its own included; None for all before it.
    Returns: (n, H, D).
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    size = BLOCK_QUERIES
    if kernels.on_gpu(q):
        size = max(size, SCORE_BYTES // (4 * q.shape[1] * k.shape[1]) // size * size)
    for start in range(0, len(q), size):
        end = min(start + size, len(q))
        own = torch.arange(first + start, first + end, device=q.device).unsqueeze(1)
        low = 0 if window is None else max(0, first + start - window + 1) // KEY_STEP * KEY_STEP
        keys = slice(low, min(k.shape[1], -(-(first + end) // KEY_STEP) * KEY_STEP))
        distance = own - torch.arange(keys.start, keys.stop, device=q.device)  # (n, S)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        out[start:end], _ = _attend(q[start:end], k[:, keys], v[:, keys], sinks, hidden)
    return out


def cached_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, seen: Tensor) -> Tensor:
    """Attend from one new token of each of several sequences to their cached ones.

    Args:
        q: (B, H, D). k, v: (B, K, S, D). sinks: (H,). seen: bool (B, S), True where a query sees a key.
    Returns: (B, H, D).
    """
    b, kv, _, d = k.shape
    q = q.view(b, kv, -1, d)  # (B, K, R, D)
    dtype = torch.promote_types(torch.float32, q.dtype)
    scores = (q @ k.mT).to(dtype).mul_(d**-0.5)  # (B, K, R, S)
    scores.masked_fill_(~seen[:, None, None], -torch.inf)
    sink = sinks.to(dtype).view(1, kv, -1, 1).expand(b, -1, -1, 1)
    weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]  # (B, K, R, S); rows sum to less than 1
    return (weights.to(v.dtype) @ v).view(b, -1, d)
