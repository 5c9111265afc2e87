"""Packed attention against a softmax over the whole score matrix in fp64, with the gradients to q, k, v and sinks."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptoss_infer import attention
from gptoss_infer.attention import Blocks, packed_attention
from gptoss_infer.model import document_starts

HEADS, KV, D = 6, 2, 8


def positions_of(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def inputs(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    shapes = [(n, HEADS, D), (n, KV, D), (n, KV, D), (HEADS,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_(True) for s in shapes]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, lengths: list[int], window: int):
    """The definition: one (T, T) softmax per head and document, the sink as one more column that gives no value."""
    parts = []
    for qd, kd, vd in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        distance = torch.arange(len(qd)).unsqueeze(1) - torch.arange(len(qd))
        seen = (distance >= 0) & (distance < window)
        kd, vd = (x.repeat_interleave(HEADS // KV, dim=1) for x in (kd, vd))
        scores = torch.einsum("thd,shd->hts", qd, kd) * D**-0.5
        scores = scores.masked_fill(~seen, -torch.inf)
        weights = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, len(qd), 1)], dim=-1).softmax(-1)[..., :-1]
        parts.append(torch.einsum("hts,shd->thd", weights, vd))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 1, 16, 128])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [16, 17, 15], [300], [128, 128], [5, 260, 1, 140]])
def test_output_and_all_gradients_equal_the_dense_softmax_of_each_document(
    lengths: list[int], window: int | None
) -> None:
    n = sum(lengths)
    upstream = torch.randn(n, HEADS, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    results = []
    for formulation in ("packed", "dense"):
        tensors = inputs(n)
        if formulation == "packed":
            blocks = Blocks(document_starts(positions_of(lengths)[None]), torch.device("cpu"))
            out = packed_attention(*tensors, blocks, window=window)
        else:
            out = dense(*tensors, lengths, window or n)
        out.backward(upstream)
        results.append([out, *(tensor.grad for tensor in tensors)])
    for got, expected in zip(*results, strict=True):
        # Sums of at most a few hundred fp64 terms of about 1.
        assert (got - expected).norm() <= 1e-12 * expected.norm()


def test_scores_of_one_block_of_queries_are_all_that_exists_at_a_time() -> None:
    largest = 0

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    n = 8 * attention.BLOCK_QUERIES
    tensors = inputs(n)
    blocks = Blocks(document_starts(positions_of([n])[None]), torch.device("cpu"))
    with Recorder():
        packed_attention(*tensors, blocks, window=None).sum().backward()
    assert HEADS * n * n > largest > 0
    assert largest <= HEADS * attention.BLOCK_QUERIES * n


@pytest.mark.parametrize("positions", [[[1, 2, 3]], [[0, 1, 3]], [[0, 1], [2, 3]]])
def test_positions_that_are_no_whole_documents_are_refused(positions: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="whole documents"):
        document_starts(torch.tensor(positions))
