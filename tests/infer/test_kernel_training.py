"""Experts in tiles, trained in Triton's interpreter, against autograd of dense products in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreter import interpreted
from moe_inputs import random_factors, random_inputs, random_weights
from oracles import slow_decode
from torch import Tensor

from gptoss_infer.experts import Activation, Projection, Routing, run_plain

pytest.importorskip("triton", reason="Triton is not installed here (it comes with torch on Linux)")
from gptoss_infer.kernels import tuning

PLAIN: dict[str, Any] = {"scaling": 0.5, "dropout": 0.0, "merged": False, "recompute": False, "seed": 0}
NAMES = ("result", "x", "weights", "A of gate_up", "B of gate_up", "A of down", "B of down")


class Inputs:
    """A layer's weights and factors, tokens with their choices, and the gradient to the result."""

    def __init__(
        self, num_tokens: int, num_experts: int, top_k: int, sizes: tuple[int, int], ranks: tuple[int, int] = (4, 4)
    ) -> None:
        generator = torch.Generator().manual_seed(num_tokens)
        self.sizes, self.num_experts = sizes, num_experts
        self.x, logits = random_inputs(num_tokens, num_experts, sizes[0])
        values, self.chosen = logits.topk(top_k)
        self.gates = values.softmax(-1).bfloat16()
        self.upstream = torch.randn(self.x.shape, generator=generator).bfloat16()
        self.weights = random_weights(num_experts, *sizes)
        made = [random_factors(num_experts, *sizes, max(rank, 1), seed=1) for rank in ranks]
        self.pairs = [made[i][2 * i : 2 * i + 2] if rank else [] for i, rank in enumerate(ranks)]  # of gate_up, of down

    def factors(self) -> list[Tensor]:
        return [*self.pairs[0], *self.pairs[1]]

    def names(self) -> list[str]:
        return [*NAMES[:3], *(NAMES[3 + 2 * i + j] for i, pair in enumerate(self.pairs) for j in range(len(pair)))]


def dense(inputs: Inputs, scaling: float, masks: list[Tensor] | None = None, merged: bool = False) -> list[Tensor]:
    """All results and gradients in fp64, an expert at a time; `masks` of dropout have a row per row of its tokens."""
    x, gates, *factors = (t.double().requires_grad_(True) for t in (inputs.x, inputs.gates, *inputs.factors()))
    pairs = iter(factors)
    up, down = ([next(pairs), next(pairs)] if pair else [] for pair in inputs.pairs)

    def project(x: Tensor, side: int, pair: list[Tensor], expert: int, row: int) -> Tensor:
        blocks, scales, bias = inputs.weights[3 * side : 3 * side + 3]
        y = x @ slow_decode(blocks[expert], scales[expert]).double().T + bias[expert].double()
        if pair:
            dropped = x if masks is None else x * masks[side][row : row + len(x)].double()
            dropped = dropped.detach() if merged else dropped
            term = scaling * dropped @ pair[0][expert].T @ pair[1][expert].T
            y = y + (term - term.detach() if merged else term)  # straight through: no value, all of the gradient
        return y

    out, row = torch.zeros_like(x), 0
    for expert in range(inputs.num_experts):
        tokens, place = (inputs.chosen == expert).nonzero(as_tuple=True)
        pre = project(x[tokens], 0, up, expert, row)
        gate, value = pre[:, 0::2].clamp(max=7), pre[:, 1::2].clamp(-7, 7)
        y = project(gate * torch.sigmoid(1.702 * gate) * (value + 1), 1, down, expert, row)
        out = out.index_add(0, tokens, y * gates[tokens, place].unsqueeze(1))
        row += len(tokens)
    out.backward(inputs.upstream.double())
    return [out.detach(), *(leaf.grad for leaf in (x, gates, *factors))]


def plain(inputs: Inputs, dtype: torch.dtype, options: dict[str, Any]) -> list[Tensor]:
    """What the experts make of MXFP4 blocks in plain PyTorch."""
    pairs = [[factor.clone().requires_grad_(True) for factor in pair] for pair in inputs.pairs]
    constants = options["scaling"], options["dropout"], options["merged"]
    sides = [
        Projection(*inputs.weights[3 * i : 3 * i + 2], inputs.weights[3 * i + 2].to(dtype), *pair, *constants)
        for i, pair in enumerate((pair or (None, None)) for pair in pairs)
    ]
    x, gates = inputs.x.to(dtype).requires_grad_(True), inputs.gates.to(dtype).requires_grad_(True)
    out = run_plain(x, gates, Routing.of(inputs.chosen, inputs.num_experts), tuple(sides), Activation(1.702, 7.0))
    out.backward(inputs.upstream.to(dtype))
    return [out.detach(), *(leaf.grad for leaf in (x, gates, *pairs[0], *pairs[1]))]


def run(target: str, inputs: Inputs, **options: Any) -> list[Tensor]:
    tensors = inputs.x, inputs.gates, inputs.chosen, inputs.upstream, *inputs.weights, *inputs.factors()
    adapted = [bool(pair) for pair in inputs.pairs]
    return interpreted("training_probes", "experts_step", target, PLAIN | options, adapted, *tensors)


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def assert_as_exact_as_plain_bf16(target: str, inputs: Inputs, **options: Any) -> None:
    got = run(target, inputs, **options)
    expected = dense(inputs, PLAIN["scaling"], merged=options.get("merged", False))
    reference = plain(inputs, torch.bfloat16, PLAIN | options)
    for name, one, exact, other in zip(inputs.names(), got, expected, reference, strict=True):
        # No more roundings to bf16 than in the plain path, but some in other places: of a few tokens' chance, half as
        # much again is allowed, and of a few numbers' (the weights' gradients) a last place. Wrong is far more.
        assert error(one, exact) <= 1.5 * error(other, exact) + 2**-8 * one.numel() ** -0.5, name
        assert error(one, exact) < 2**-5, name


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "sizes"),
    [
        (1, 4, 1, (64, 64)),
        (5, 3, 2, (96, 32)),  # 32 columns behind the last whole tile, in both products
        (23, 3, 1, (160, 96)),  # more than a tile of 16 rows, and a hidden size of two and a half tiles
        (3, 40, 4, (64, 32)),  # nearly all experts empty
    ],
)
def test_results_and_gradients_are_those_of_dense_products(
    num_tokens: int, num_experts: int, top_k: int, sizes: tuple[int, int]
) -> None:
    assert_as_exact_as_plain_bf16("sm_90", Inputs(num_tokens, num_experts, top_k, sizes))


@pytest.mark.parametrize("target", [t for t in tuning.TABLES if t != "sm_90"])
def test_the_tiles_of_every_gpu_serve_forward_and_backward(target: str) -> None:
    assert_as_exact_as_plain_bf16(target, Inputs(7, 2, 2, (96, 96)))


@pytest.mark.parametrize("ranks", [(0, 0), (4, 0), (0, 17)], ids=["none", "gate_up", "down"])
def test_a_layer_need_not_be_adapted_in_both_projections(ranks: tuple[int, int]) -> None:
    assert_as_exact_as_plain_bf16("sm_90", Inputs(6, 3, 2, (64, 32), ranks))


def test_of_factors_that_the_weights_hold_already_only_the_gradients_remain() -> None:
    assert_as_exact_as_plain_bf16("sm_90", Inputs(9, 3, 2, (64, 32)), merged=True)


def test_pre_activations_that_are_made_again_give_the_same_bits() -> None:
    inputs = Inputs(6, 3, 2, (64, 64))
    for kept, made in zip(run("sm_90", inputs), run("sm_90", inputs, recompute=True), strict=True):
        assert torch.equal(kept, made)


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_drops_the_same_inputs_of_the_factors_forward_and_backward(recompute: bool) -> None:
    inputs, keep = Inputs(11, 3, 2, (64, 32)), 0.7
    got = run("sm_90", inputs, dropout=1 - keep, seed=3, recompute=recompute)
    torch.manual_seed(3)
    masks = [torch.empty(22, size, dtype=torch.bfloat16).bernoulli_(keep).div_(keep) for size in (64, 32)]
    expected, undropped = dense(inputs, 0.5, masks), dense(inputs, 0.5)
    for name, one, exact, other in zip(inputs.names(), got, expected, undropped, strict=True):
        # 1 / 0.7 is rounded in both; a result has some six roundings, most of 2**-9 / sqrt(3) in the mean of squares.
        assert error(one, exact) < 2**-6, name
        assert error(other, exact) > 2**-3, name


def test_a_choice_of_no_weight_and_a_clamped_unit_pass_no_gradient() -> None:
    inputs = Inputs(4, 2, 1, (32, 32))
    inputs.gates = torch.tensor([[1.0], [0.0], [1.0], [1.0]]).bfloat16()
    bias = inputs.weights[2]
    bias[:, 0:4] = torch.tensor([50.0, 0.0, 0.0, -50.0])  # gate of unit 0 above its clamp, up of unit 1 below its own
    _, grad_x, slopes, _, grad_b, *_ = run("sm_90", inputs)
    assert torch.equal(grad_x[1], torch.zeros(32).bfloat16())
    assert slopes.abs().min() > 0
    assert torch.equal(grad_b[:, [0, 3]], torch.zeros(2, 2, 4))
    assert grad_b[:, [1, 2]].norm() > 0
