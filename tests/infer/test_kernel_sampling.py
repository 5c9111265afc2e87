"""The Triton sampler, in the interpreter: the very ids that the plain sampler draws, and its log-probabilities."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from draws import draws, logits_of, mask_of, rows_of
from interpreter import interpreted
from torch import Tensor

from gptoss_infer import sampling
from gptoss_infer.sampling import Draws

pytest.importorskip("triton", reason="Triton is not installed here (it comes with torch on Linux)")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and torch sees none")


def run(logits: Tensor, given: Draws, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    columns = (getattr(given, field.name) for field in fields(Draws))
    return interpreted("attention_launches", "sample", logits, allowed, *columns)


def every_kind(num_rows: int) -> Draws:
    """Greedy, warm and hot rows, and every filter alone and with others, in turn."""

    def column(values: list) -> list:
        return (values * num_rows)[:num_rows]

    return draws(
        num_rows,
        temperature=column([0.0, 1.0, 0.7, 1.0, 1.3, 1.0, 1.0, 0.5, 1.0]),
        top_k=column([0, 0, 0, 5, 1, 0, 0, 40, 300]),
        top_p=column([1.0, 1.0, 1.0, 1.0, 1.0, 0.7, 1.0, 0.8, 0.999]),
        min_p=column([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.02, 0.0]),
    )


def assert_same(logits: Tensor, given: Draws, allowed: Tensor | None = None) -> None:
    """The ids are equal unless two sums in fp32 fall on both sides of a tie, which no row here is near to."""
    ids, logprobs = sampling.sample(logits, given, allowed)
    got, got_logprobs = run(logits, given, allowed)
    assert torch.equal(got, ids)
    assert torch.allclose(got_logprobs, logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 64, 70, 201, 5000])
def test_it_draws_what_the_plain_sampler_draws(size: int) -> None:
    assert_same(logits_of(9, size), every_kind(9))


@pytest.mark.parametrize("rows", [1, 9])
def test_so_it_does_under_masks_for_all_rows_or_each(rows: int) -> None:
    allowed = torch.rand(rows, 201, generator=torch.Generator().manual_seed(rows)) < 0.3
    allowed[:, 64:128] = False  # a whole block
    assert_same(logits_of(9, 201), every_kind(9), mask_of(allowed))


def test_among_equal_logits_it_cuts_at_the_same_ids() -> None:
    logits = (logits_of(9, 500) * 2).round() / 2  # about 20 values in all
    logits[:, ::50] = -0.0  # equal to 0
    assert_same(logits, every_kind(9))
    assert_same(torch.zeros(9, 500), every_kind(9))
    assert_same(torch.zeros(20, 5), draws(20, top_p=0.5))  # the first three


def test_bf16_logits_with_rows_apart_are_sampled_as_fp32() -> None:
    wide = logits_of(9, 400).bfloat16()
    assert_same(wide[:, :201].contiguous(), every_kind(9))
    got = interpreted(
        "attention_launches", "sample_part", wide, 201, *(getattr(every_kind(9), f.name) for f in fields(Draws))
    )
    assert torch.equal(got[0], sampling.sample(wide[:, :201], every_kind(9))[0])


def test_a_row_alone_and_among_others_yields_the_same_bits() -> None:
    logits, given = logits_of(9, 300), every_kind(9)
    together = run(logits, given)
    for row in (0, 2, 5, 7):
        alone = run(logits[row, None], rows_of(given, torch.tensor([row])))
        assert alone[0][0] == together[0][row]
        assert alone[1][0] == together[1][row]


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_batches_of_any_size_and_the_vocabulary_of_harmony(rows: int) -> None:
    size = 201_088 if rows == 2 else 300
    assert_same(logits_of(rows, size, spread=3.0), every_kind(rows))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_on_a_gpu_it_draws_what_the_plain_sampler_draws_on_a_cpu(spread: float, masked: bool) -> None:
    from gptoss_infer.kernels import sampling as kernel

    logits, given = logits_of(64, 201_088, spread), every_kind(64)
    allowed = torch.full((1, 6284), -1, dtype=torch.int32) if masked else None
    if allowed is not None:
        allowed[:, 6250:] = 0
    ids, logprobs = sampling.sample(logits, given, allowed)
    on_gpu = Draws(*(getattr(given, field.name).cuda() for field in fields(Draws)))
    got, got_logprobs = kernel.sample(logits.cuda(), on_gpu, None if allowed is None else allowed.cuda())
    assert (got.cpu() == ids).double().mean() >= 63 / 64  # one near-tie may fall otherwise
    same = got.cpu() == ids
    assert torch.allclose(got_logprobs.cpu()[same], logprobs[same], atol=1e-4)
