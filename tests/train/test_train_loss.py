"""The chunked loss against torch's cross-entropy over the full vocabulary in fp64, and what it never allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gptoss_train import loss
from gptoss_train.loss import Unembedding

V, C = 1000, 24


def matrix(kind: str, dtype: torch.dtype) -> torch.Tensor:
    """(V, C) with all rows different, or 300 rows of which one stands for 701 tokens and the others for one each."""
    weight = torch.randn(V, C, generator=torch.Generator().manual_seed(0)).to(dtype)
    if kind == "repeated":
        weight[299:] = weight[299]
        weight = weight[torch.randperm(V, generator=torch.Generator().manual_seed(1))]
    return weight


def inputs(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, targets and upstream gradients of n positions."""
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, C, generator=generator).to(dtype)
    return hidden, torch.randint(0, V, (n,), generator=generator), torch.rand(n, generator=generator)


def oracle(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and the gradient to `hidden`, all in fp64."""
    leaf = hidden.double().requires_grad_(True)
    losses = F.cross_entropy(leaf @ weight.double().T, targets, reduction="none")
    (losses * upstream.double()).sum().backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


@pytest.mark.parametrize("kind", ["different", "repeated"])
@pytest.mark.parametrize("n", [1, 6, 7, 8, 20])  # with 7 rows in a chunk: less, equal, one more, a remainder of 6
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_equal_full_cross_entropy_in_fp64(
    monkeypatch: pytest.MonkeyPatch, kind: str, n: int, dtype: torch.dtype
) -> None:
    weight = matrix(kind, dtype)
    unembedding = Unembedding.of(weight)
    assert len(unembedding.rows) == (V if kind == "different" else 300)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 7 * 4 * len(unembedding.rows) + 3)
    hidden, targets, upstream = inputs(n, dtype)
    expected, expected_grad = oracle(hidden, weight, targets, upstream)
    leaf = hidden.clone().requires_grad_(True)
    losses = unembedding.losses(leaf, targets)
    (losses * upstream).sum().backward()
    assert losses.dtype == torch.float32
    assert leaf.grad is not None
    # A logit is a sum of C products, rounded to dtype; a loss is the difference of two of them.
    largest = (hidden.double() @ weight.double().T).abs().max().item()
    logit_error = torch.finfo(dtype).eps * largest + C * torch.finfo(torch.float32).eps * largest
    assert (losses - expected).abs().max() <= 2 * logit_error
    # |p - onehot| sums to 2 at most; p's relative error is twice a logit's plus its rounding and that of the products.
    bound = 2 * (2 * logit_error + 3 * torch.finfo(dtype).eps) * weight.abs().max().item()
    assert (leaf.grad - expected_grad).abs().max() <= bound


def test_rows_that_differ_in_one_bit_are_not_merged() -> None:
    weight = torch.ones(V, C)
    weight[5, 3] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    unembedding = Unembedding.of(weight)
    assert len(unembedding.rows) == 2
    assert unembedding.row_of_token is not None
    assert (unembedding.rows[unembedding.row_of_token] == weight).all()


def test_without_a_gradient_asked_for_none_is_computed() -> None:
    hidden, targets, _ = inputs(5, torch.float32)
    weight = matrix("different", torch.float32)
    losses = Unembedding.of(weight).losses(hidden, targets)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, F.cross_entropy(hidden @ weight.T, targets, reduction="none"))


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_tensor_of_all_positions_by_all_tokens_ever_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    n, chunk = 400, 50  # positions, and those whose logits fit in CHUNK_BYTES: twice the unembedding
    monkeypatch.setattr(loss, "CHUNK_BYTES", chunk * 4 * V)
    hidden, targets, _ = inputs(n, torch.float32)
    leaf = hidden.requires_grad_(True)
    unembedding = Unembedding.of(matrix("different", torch.float32))
    with Largest() as seen:
        unembedding.losses(leaf, targets).sum().backward()
    assert seen.numel == chunk * V
