"""The tiled loss against torch's cross-entropy over the full vocabulary in fp64, and what it never allocates."""

from __future__ import annotations

import math
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
    leaf = hidden.double().clone().requires_grad_(True)
    losses = F.cross_entropy(leaf @ weight.double().T, targets, reduction="none")
    (losses * upstream.double()).sum().backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


def run(
    unembedding: Unembedding, hidden: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and the gradient to `hidden`, as computed by what is tested."""
    leaf = hidden.clone().requires_grad_(True)
    losses = unembedding.losses(leaf, targets)
    (losses * upstream).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == hidden.dtype
    return losses.detach(), leaf.grad


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of at most 7 rows and, with 7 rows, of 128 columns in fp32: a divisor neither of V nor of 300."""
    monkeypatch.setattr(loss, "TILE_ROWS", 7)
    monkeypatch.setattr(loss, "CPU_TILE_BYTES", 7 * 4 * 128 + 3)


def logit_error(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> float:
    """Bound the error of l_j - l_t: l_j's distance from another logit is rounded to dtype, after sums of C terms."""
    logits = hidden.double() @ weight.double().T
    largest = logits.abs().max().item()
    others = logits.scatter(1, targets[:, None], 0.0).abs().max().item()
    sums = 2 * C * torch.finfo(torch.promote_types(hidden.dtype, torch.float32)).eps * largest
    return torch.finfo(hidden.dtype).eps / 2 * (others + largest) + sums


@pytest.mark.parametrize("kind", ["different", "repeated"])
@pytest.mark.parametrize("n", [1, 6, 7, 8, 20])  # with 7 rows in a tile: less, equal, one more, a remainder of 6
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_losses_and_gradients_equal_full_cross_entropy_in_fp64(
    monkeypatch: pytest.MonkeyPatch, kind: str, n: int, dtype: torch.dtype
) -> None:
    small_tiles(monkeypatch)
    weight = matrix(kind, dtype)
    unembedding = Unembedding.of(weight)
    assert len(unembedding.rows) == (V if kind == "different" else 300)
    hidden, targets, upstream = inputs(n, dtype)
    targets[n // 2] = unembedding.row_of_token.bincount().argmin() if unembedding.row_of_token is not None else 0
    expected, expected_grad = oracle(hidden, weight, targets, upstream)
    losses, grad = run(unembedding, hidden, targets, upstream)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The loss' slope in every l_j - l_t is at most 1, and these slopes sum to 1 at most.
    error = logit_error(hidden, weight, targets)
    assert (losses - expected).abs().max() <= error
    # |p - onehot| sums to 2 at most; p's relative error is twice a logit's plus its rounding and that of the products.
    bound = 2 * (2 * error + 3 * torch.finfo(dtype).eps) * weight.abs().max().item()
    assert (grad - expected_grad).abs().max() <= bound
    if dtype == torch.float64:
        torch.testing.assert_close((losses, grad), (expected, expected_grad), atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_with_a_confident_target_loss_and_gradient_keep_their_relative_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    small_tiles(monkeypatch)
    weight = matrix("different", dtype)
    targets = weight.double().norm(dim=1).topk(20).indices  # these can outdo every other row
    hidden, upstream = inputs(20, dtype)[0].double(), inputs(20, dtype)[2]
    rows = weight.double()[targets]
    for _ in range(50):  # move along the target's row until its odds are 10^6 to 1
        others = (hidden @ weight.double().T).scatter(1, targets[:, None], -math.inf).logsumexp(1)
        lead = (hidden * rows).sum(1) - others
        hidden += ((math.log(1e6) - lead) / rows.square().sum(1))[:, None] * rows
    hidden = hidden.to(dtype)
    # In fp64 the oracle's 1 - p of 1e-6 has a relative error of 1e-16 / 1e-6 for each of a few operations.
    expected, expected_grad = oracle(hidden, weight, targets, upstream)
    assert expected.min() > 5e-7
    assert expected.max() < 2e-6
    losses, grad = run(Unembedding.of(weight), hidden, targets, upstream)
    # As above, but all relative to 1 - p, which is the loss to within 1e-6; e^x - 1 is at most 2x where x < 1.
    error = logit_error(hidden, weight, targets)
    assert error < 0.5
    assert ((losses - expected).abs() / expected).max() <= 2 * error + 1e-9
    bound = 2 * (2 * 2 * error + 3 * torch.finfo(dtype).eps + 1e-9) * weight.abs().max().item()
    assert ((grad - expected_grad).abs() / expected[:, None]).max() <= bound


@pytest.mark.parametrize("scale", [0.2, 0.5, 1.0])
def test_in_bf16_the_gradient_errs_no_more_than_that_of_full_logits_in_bf16(scale: float) -> None:
    weight = (scale * matrix("different", torch.float32)).bfloat16()
    hidden, targets, upstream = inputs(200, torch.bfloat16)
    _, expected_grad = oracle(hidden, weight, targets, upstream)
    _, grad = run(Unembedding.of(weight), hidden, targets, upstream)
    leaf = hidden.clone().requires_grad_(True)
    (F.cross_entropy((leaf @ weight.T).float(), targets, reduction="none") * upstream).sum().backward()
    assert leaf.grad is not None
    assert (grad - expected_grad).norm() <= (leaf.grad - expected_grad).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_of_plus_and_minus_200_neither_overflow_nor_vanish(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    small_tiles(monkeypatch)
    weight = torch.zeros(V, C, dtype=dtype)
    weight[:, 1:] = torch.eye(C, dtype=dtype)[torch.arange(V) % (C - 1), : C - 1]
    weight[500, 0], weight[0, 0], weight[999, 0] = 20, -20, 19
    hidden = torch.zeros(4, C, dtype=dtype)
    hidden[:, 0] = 10  # logits of 200, -200, 190 and 997 zeros, all exact
    targets = torch.tensor([500, 0, 999, 3])
    upstream = torch.ones(4)
    expected, expected_grad = oracle(hidden, weight, targets, upstream)
    losses, grad = run(Unembedding(weight, None, None), hidden, targets, upstream)
    # As above. The gradient of the second is W_500 - W_0, of up to 40, and that is rounded.
    error = logit_error(hidden, weight, targets)
    torch.testing.assert_close(losses.double(), expected, atol=error, rtol=0)
    bound = 2 * (math.expm1(2 * error) + 3 * torch.finfo(dtype).eps) * 40
    torch.testing.assert_close(grad.double(), expected_grad, atol=bound, rtol=0)
    assert losses[0] == pytest.approx(math.log1p(math.exp(-10)), rel=math.expm1(2 * error))


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_where_all_tokens_are_alike_the_loss_is_the_log_of_their_number(num_tokens: int) -> None:
    hidden, _, upstream = inputs(3, torch.float32)
    weight = torch.full((num_tokens, C), 0.25)
    losses, grad = run(Unembedding.of(weight), hidden, torch.zeros(3, dtype=torch.int64), upstream)
    error = logit_error(hidden, weight, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(losses, torch.full((3,), math.log(num_tokens)), atol=error, rtol=1e-6)
    torch.testing.assert_close(grad, torch.zeros(3, C), atol=4 * torch.finfo(torch.float32).eps, rtol=0)


@pytest.mark.parametrize("kind", ["different", "repeated"])
def test_without_labels_there_are_no_losses_and_the_gradient_is_empty(kind: str) -> None:
    hidden, targets, upstream = inputs(0, torch.bfloat16)
    losses, grad = run(Unembedding.of(matrix(kind, torch.bfloat16)), hidden, targets, upstream)
    assert losses.shape == (0,)
    assert losses.dtype == torch.float32
    assert grad.shape == (0, C)


@pytest.mark.parametrize("kind", ["different", "repeated"])
@pytest.mark.parametrize("target", [-100, V])
def test_a_target_outside_the_vocabulary_is_refused(kind: str, target: int) -> None:
    hidden, _, _ = inputs(1, torch.float32)
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        Unembedding.of(matrix(kind, torch.float32)).losses(hidden, torch.tensor([target]))


def test_rows_that_differ_in_one_bit_are_not_merged() -> None:
    weight = torch.ones(V, C)
    weight[5, 3] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    unembedding = Unembedding.of(weight)
    assert len(unembedding.rows) == 2
    assert unembedding.row_of_token is not None
    assert (unembedding.rows[unembedding.row_of_token] == weight).all()


def test_rows_in_fp64_are_merged_by_all_their_bits() -> None:
    weight = torch.ones(V, C, dtype=torch.float64)
    weight[5, 3] = 1 + torch.finfo(torch.float64).eps
    assert len(Unembedding.of(weight).rows) == 2


class Seen(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns, and which operations there were."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append(func.overloadpacket.__name__)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("frozen", ["no_grad", "hidden"])
def test_without_a_gradient_asked_for_there_is_one_product_a_tile(frozen: str) -> None:
    hidden, targets, _ = inputs(5, torch.float32)
    weight = matrix("different", torch.float32)
    with Seen() as seen, torch.set_grad_enabled(frozen != "no_grad"):
        losses = Unembedding.of(weight).losses(hidden.requires_grad_(frozen == "no_grad"), targets)
    assert not losses.requires_grad
    assert [name for name in seen.operations if "mm" in name] == ["addmm"]
    # fp32 at both sides: C terms a logit, of which the largest are about 20.
    expected = F.cross_entropy(hidden.detach() @ weight.T, targets, reduction="none")
    torch.testing.assert_close(losses, expected, atol=logit_error(hidden.detach(), weight, targets), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_the_stated_tile(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    n, width = 400, 128  # of V = 1000 columns
    size = torch.promote_types(dtype, torch.float32).itemsize
    monkeypatch.setattr(loss, "CPU_TILE_BYTES", n * width * size)
    hidden, targets, _ = inputs(n, dtype)
    leaf = hidden.requires_grad_(True)
    unembedding = Unembedding.of(matrix("different", dtype))
    with Seen() as seen:
        unembedding.losses(leaf, targets).sum().backward()
    assert seen.numel * size == loss.CPU_TILE_BYTES
