"""The Triton attention over packed documents, in the interpreter: against a dense fp64 softmax, and the plain path."""

from __future__ import annotations

import pytest
import torch
from attention_launches import blocks_of
from interpreter import interpreted
from torch import Tensor

from gptoss_infer import attention

pytest.importorskip("triton", reason="Triton is not installed here (it comes with torch on Linux)")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and torch sees none")
# (query heads, kv heads, documents, window): groups of 3 and 8. Tiles are 32 and 16 long here, so documents and windows
# end on, before and behind their edges.
FEW = [
    (6, 2, [1], None), (6, 2, [1, 1, 1], 1), (6, 2, [16, 17, 15], None), (6, 2, [33], 16), (6, 2, [60], 18),
    (6, 2, [5, 40, 1], 7), (8, 1, [31, 1, 9], None),
]  # fmt: skip
MORE = [
    (3, 1, [150], None), (3, 1, [64, 64], 40), (3, 1, [1] * 70, None), (6, 2, [3, 1, 1, 60, 30], 33),
    (8, 1, [96, 2], 96),
]  # fmt: skip


def inputs(n: int, heads: int, kv: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, sinks and a gradient to the output."""
    generator = torch.Generator().manual_seed(n + heads)
    shapes = [(n, heads, d), (n, kv, d), (n, kv, d), (heads,), (n, heads, d)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x if x.ndim == 1 else x.to(dtype) for x in tensors]


def dense(tensors: list[Tensor], lengths: list[int], window: int | None) -> list[Tensor]:
    """The definition in fp64: one softmax per head over all keys and the sink. Returns output and gradients."""
    q, k, v, sinks, grad = (x.double() for x in tensors)
    q, k, v, sinks = (x.requires_grad_(True) for x in (q, k, v, sinks))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (document[:, None] == document) & (distance >= 0) & (distance < (window or len(q)))
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(group, 1)) * q.shape[2] ** -0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], dim=-1).softmax(-1)[..., :-1]
    out = torch.einsum("hts,shd->thd", weights, v.repeat_interleave(group, 1))
    out.backward(grad)
    return [out.detach(), *(x.grad for x in (q, k, v, sinks))]


def errors(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Relative to the norm of what is expected."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]


def plain(tensors: list[Tensor], lengths: list[int], window: int | None) -> list[Tensor]:
    q, k, v, sinks = (x.clone().requires_grad_(True) for x in tensors[:4])
    out = attention.packed_attention(q, k, v, sinks, blocks_of(lengths), window=window)
    out.backward(tensors[4])
    return [out.detach(), *(x.grad for x in (q, k, v, sinks))]


def limits(tensors: list[Tensor], lengths: list[int], window: int | None, expected: list[Tensor]) -> list[float]:
    """How far off a result may be. fp32: sums of some hundred terms, each rounded by 6e-8. bf16: the plain path rounds
    the same intermediates to 2^-9 and sums in fp32, in another order."""
    if tensors[0].dtype == torch.float32:
        return [2e-6] * 5
    return [max(1.2 * error, 2**-8) for error in errors(plain(tensors, lengths, window), expected)]


def check(heads: int, kv: int, d: int, lengths: list[int], window: int | None, dtype: torch.dtype) -> None:
    tensors = inputs(sum(lengths), heads, kv, d, dtype)
    expected = dense(tensors, lengths, window)
    got = interpreted("attention_launches", "packed", *tensors, lengths, window)
    assert [x.dtype for x in got] == [x.dtype for x in (*tensors[:1], *tensors[:4])]
    for error, limit in zip(errors(got, expected), limits(tensors, lengths, window, expected), strict=True):
        assert error <= limit


@pytest.mark.parametrize(("heads", "kv", "lengths", "window"), FEW, ids=str)
def test_output_and_gradients_equal_the_dense_softmax_of_each_document(
    heads: int, kv: int, lengths: list[int], window: int | None
) -> None:
    check(heads, kv, 16, lengths, window, torch.float32)


def test_in_bf16_they_are_as_near_to_it_as_the_plain_path() -> None:
    check(8, 1, 64, [5, 30, 1], 16, torch.bfloat16)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv", "lengths", "window"), MORE, ids=str)
def test_longer_batches_in_both_precisions(
    heads: int, kv: int, lengths: list[int], window: int | None, dtype: torch.dtype
) -> None:
    check(heads, kv, 32, lengths, window, dtype)


@pytest.mark.parametrize("window", [None, 9])
def test_the_stored_normalizer_includes_the_sink(window: int | None) -> None:
    lengths = [20, 1, 30]
    tensors = inputs(sum(lengths), 6, 2, 16, torch.float32)[:4]
    _, got = interpreted("attention_launches", "packed_forward", *tensors, lengths, window)
    _, expected = attention.packed_forward(*(x.double() for x in tensors), blocks_of(lengths), window=window)
    assert torch.allclose(got.double(), expected, atol=1e-5, rtol=0)  # of numbers up to 5, in bits and back


def test_a_sink_that_takes_all_probability_leaves_nothing_and_one_that_takes_none_leaves_all() -> None:
    q, k, v, _, _ = inputs(3, 2, 1, 16, torch.float32)
    for sink, expected in ((1e4, torch.zeros(2, 16)), (-1e4, v[0].expand(2, 16))):
        out, _ = interpreted("attention_launches", "packed_forward", q, k, v, torch.full((2,), sink), [1, 2], None)
        assert torch.allclose(out[0], expected, atol=1e-6)  # a document of one token: its value, or nothing


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv", "lengths", "window"), [*FEW, *MORE, (64, 8, [700, 1, 300, 47], 128), (64, 8, [999], None)], ids=str
)
def test_on_a_gpu_output_and_gradients_equal_the_dense_softmax(
    heads: int, kv: int, lengths: list[int], window: int | None, dtype: torch.dtype
) -> None:
    tensors = inputs(sum(lengths), heads, kv, 64, dtype)
    expected = dense(tensors, lengths, window)
    allowed = limits(tensors, lengths, window, expected)
    blocks = blocks_of(lengths, torch.device("cuda"))
    q, k, v, sinks = (x.cuda().requires_grad_(True) for x in tensors[:4])
    out = attention.packed_attention(q, k, v, sinks, blocks, window=window)
    out.backward(tensors[4].cuda())
    got = [x.cpu() for x in (out.detach(), q.grad, k.grad, v.grad, sinks.grad)]
    for error, limit in zip(errors(got, expected), allowed, strict=True):
        assert error <= limit
