"""The label-only loss in Triton's interpreter against torch's cross-entropy over the full vocabulary in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from interpreter import interpreted
from torch import Tensor

from gptoss_train.loss import Unembedding

pytest.importorskip("triton", reason="Triton is not installed here (it comes with torch on Linux)")
C = 72  # no multiple of a step of 64


def inputs(n: int, vocab: int, scale: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, an unembedding, targets and upstream gradients."""
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, C, generator=generator).bfloat16()
    weight = (torch.randn(vocab, C, generator=generator) * scale).bfloat16()
    targets = torch.randint(0, vocab, (n,), generator=generator)
    return hidden, weight, targets, torch.rand(n, generator=generator)


def assert_equal_full_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, part_bytes: int = 2**27
) -> tuple[Tensor, Tensor]:
    leaf = hidden.double().requires_grad_(True)
    logits = leaf @ weight.double().T
    expected = F.cross_entropy(logits, targets, reduction="none")
    expected.backward(upstream.double())
    losses, grad = interpreted("training_probes", "label_loss", part_bytes, hidden, weight, targets, upstream)
    assert losses.dtype == torch.float32
    # Logits are fp32 sums of C terms. Relative to 1 - p, as neither loses digits where the model is sure of the target.
    sure = 1 - (-expected.detach()).exp()
    error = 4 * C * 2**-24 * float(logits.detach().abs().max())
    assert ((losses - expected.detach()).abs() <= (2 * error + 1e-6) * expected.detach() + 1e-9).all()
    # |p - onehot| sums to 2 (1 - p) at most; powers and the result are rounded to bf16.
    bound = 2 * (2 * error + 2 * 2**-8) * weight.abs().max().double() * sure * upstream
    assert leaf.grad is not None
    assert ((grad - leaf.grad).abs() <= bound.unsqueeze(1) + 2**-8 * leaf.grad.abs()).all()
    return losses, grad


@pytest.mark.parametrize(("n", "vocab"), [(1, 1000), (7, 129), (130, 300), (3, 2)])
def test_losses_and_gradients_equal_full_cross_entropy(n: int, vocab: int) -> None:
    assert_equal_full_cross_entropy(*inputs(n, vocab))


def test_a_vocabulary_in_parts_gives_what_it_gives_at_once() -> None:
    given = inputs(5, 1000, scale=3.0)  # logits of up to 80: a part's maximum is far from the next one's
    in_parts = assert_equal_full_cross_entropy(*given, part_bytes=2 * 5 * 128 * 3)
    at_once = assert_equal_full_cross_entropy(*given)
    torch.testing.assert_close(in_parts[0], at_once[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(in_parts[1], at_once[1], rtol=2**-7, atol=1e-4)


def test_a_target_that_is_all_but_certain_keeps_the_digits_of_loss_and_gradient() -> None:
    hidden, weight, targets, upstream = inputs(6, 500)
    others = (hidden.double() @ weight.double().T).scatter(1, targets[:, None], -math.inf).logsumexp(1)
    rows = weight.double()[targets]
    lead = math.log(1e6) + others - (hidden.double() * rows).sum(1)
    hidden = (hidden + (lead / rows.square().sum(1))[:, None] * rows).bfloat16()
    losses, grad = assert_equal_full_cross_entropy(hidden, weight, targets, upstream)
    assert losses.max() < 1e-2  # moving a state moves the others' logits too
    assert (grad.float().norm(dim=1) > 0).all()


def test_tokens_with_equal_rows_count_as_often_as_they_occur() -> None:
    hidden, weight, _, upstream = inputs(9, 600)
    weight[100:] = weight[99]
    targets = torch.tensor([0, 99, 100, 599, 5, 98, 300, 1, 2])
    assert len(Unembedding.of(weight).rows) == 100
    assert_equal_full_cross_entropy(hidden, weight, targets, upstream)


def test_of_one_token_or_of_no_label_there_is_nothing_to_learn() -> None:
    hidden, weight, _, upstream = inputs(4, 1)
    losses, grad = interpreted(
        "training_probes", "label_loss", 2**20, hidden, weight, torch.zeros(4, dtype=torch.int64), upstream
    )
    assert torch.equal(losses, torch.zeros(4))
    assert torch.equal(grad, torch.zeros(4, C).bfloat16())
    hidden, weight, targets, upstream = inputs(0, 10)
    losses, grad = interpreted("training_probes", "label_loss", 2**20, hidden, weight, targets, upstream)
    assert losses.shape == (0,)
    assert grad.shape == (0, C)


def test_why_a_loss_is_not_run_in_triton_is_told() -> None:
    assert Unembedding.of(torch.zeros(3, 4).bfloat16()).why_plain() == "the model is on cpu"
    on_gpu = Unembedding(torch.zeros(3, 4, device="meta"), None, None)
    assert on_gpu.why_plain() == "the model computes in torch.float32, the kernels in torch.bfloat16"
    assert Unembedding(on_gpu.rows.bfloat16(), None, None).why_plain() is None
