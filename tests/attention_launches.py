"""Whole attention passes for the interpreter's worker, from arguments that can be sent there."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import Tensor

from gptoss_infer import attention, kernels, page_tables
from gptoss_infer.attention import Blocks
from gptoss_infer.model import document_starts

CPU = torch.device("cpu")


def blocks_of(lengths: list[int], device: torch.device = CPU) -> Blocks:
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Blocks(document_starts(positions[None]), device)


def packed(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, grad: Tensor, lengths: list[int], window: int | None
) -> tuple[Tensor, ...]:
    """The output and the gradients to q, k, v and sinks, by autograd through the Triton kernels."""
    from gptoss_infer.kernels import packed_attention  # needs triton

    passes = packed_attention.packed_forward, packed_attention.packed_backward
    tensors = [x.requires_grad_(True) for x in (q, k, v, sinks)]
    with patch.object(kernels, "_packed_attention", lambda q: passes):  # fp32 too
        out = attention.packed_attention(*tensors, blocks_of(lengths), window=window)
        out.backward(grad)
    return out.detach(), *(x.grad for x in tensors)


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, lengths: list[int], window: int | None
) -> tuple[Tensor, Tensor]:
    from gptoss_infer.kernels import packed_attention

    return packed_attention.packed_forward(q, k, v, sinks, blocks_of(lengths), window=window)


def paged(
    q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, held: list[tuple], window: int | None, share: bool = False
) -> Tensor:
    """`held` are the fields of `page_tables.Held`; a negative `own` makes an empty slot."""
    from gptoss_infer.kernels import paged_attention

    page_tokens = keys.shape[2] if share else 0
    batch = page_tables.batch_of([page_tables.Held(*one) for one in held], q.device, page_tokens=page_tokens)
    return paged_attention.paged_attention(q, keys, values, sinks, batch, window=window)


def rotate_and_store(fused: Tensor, angles: Tensor, places: Tensor, kv: int, page: int) -> tuple[Tensor, ...]:
    """Rotated queries, and pages of keys and values that were 7, from heads (N, H + 2 K, D) that lie together."""
    from gptoss_infer.kernels import rope

    keys, values = torch.full((2, 4, kv, page, fused.shape[2]), 7, dtype=fused.dtype)
    qkv = fused.split([fused.shape[1] - 2 * kv, kv, kv], dim=1)
    return rope.rotate_and_store(qkv, (angles.cos(), angles.sin()), keys, values, places), keys, values


def sample(logits: Tensor, allowed: Tensor | None, *columns: Tensor) -> tuple[Tensor, Tensor]:
    """`columns` are the fields of `sampling.Draws`."""
    from gptoss_infer import sampling
    from gptoss_infer.kernels import sampling as kernel

    return kernel.sample(logits, sampling.Draws(*columns), allowed)


def sample_part(logits: Tensor, size: int, *columns: Tensor) -> tuple[Tensor, Tensor]:
    """As `sample`, of the first `size` ids of wider rows."""
    return sample(logits[:, :size], None, *columns)
