"""The expert kernels in Triton's interpreter against dense products in fp64."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted
from moe_inputs import random_factors, random_inputs, random_weights
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.experts import Activation, Experts, Routing

pytest.importorskip("triton", reason="Triton is not installed here (it comes with torch on Linux)")
from gptoss_infer.kernels import low_rank, moe, routing, tiles, tuning  # need triton

TARGETS = tuple(tuning.TABLES)
MORE = [pytest.mark.slow, pytest.mark.exhaustive]
ONE_FAST = [pytest.param(target, marks=() if target == "sm_90" else MORE) for target in TARGETS]
HALF_UNIT = 2**-8  # largest relative error of rounding to bf16


def dense(blocks: Tensor, scales: Tensor, bias: Tensor, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """x W^T + bias of one expert in fp64, and the same of absolute values: what errors are measured by."""
    weights = mxfp4.decode(blocks[expert], scales[expert], torch.float64)
    x, bias = x.double(), bias[expert].double()
    return weights @ x + bias, weights.abs() @ x.abs() + bias.abs()


def swiglu(pre: Tensor) -> Tensor:
    gate, up = pre[0::2].clamp(max=7), pre[1::2].clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def assert_steps_equal_dense_products(
    target: str, block_m: int, top_k: int, x: Tensor, logits: Tensor, real: Tensor | None, weights: tuple[Tensor, ...]
) -> None:
    hidden, results, out = interpreted("moe_probes", "steps", target, block_m, top_k, x, logits, real, *weights)
    routed = routing.route_ref(logits, top_k, block_m, real)
    rows = {slot: row for row, slot in enumerate(routed.slots.tolist()) if slot >= 0}
    assert hidden[len(rows) :].isnan().all(), "rows behind the last were written"
    for token in range(len(x)):
        total = torch.zeros(x.shape[1], dtype=torch.float64)
        for j, expert in enumerate(routed.chosen[token].tolist()):
            if expert < 0:
                assert results[token, j].isnan().all(), "a slot that is not real was written"
                continue
            unit = hidden[rows[token * top_k + j]].double()
            pre, size = dense(*weights[:3], expert, x[token])
            # fp32 sums of C + 1 terms lose at most C units of 2**-24; the SwiGLU's slope in a pre-activation is at most
            # 1.1 (7 + 1) for gate and 7 for up. Then one rounding to bf16.
            error = 9 * x.shape[1] * 2**-24 * size.view(-1, 2).amax(1) + 1e-6
            assert ((unit - swiglu(pre)).abs() <= error + HALF_UNIT * swiglu(pre).abs()).all()
            y, size = dense(*weights[3:], expert, unit)
            error = len(unit) * 2**-24 * size + HALF_UNIT * y.abs()
            assert ((results[token, j].double() - y).abs() <= error).all()
            total += results[token, j].double() * routed.weights[token, j].double()
        assert ((out[token].double() - total).abs() <= HALF_UNIT * total.abs() + 1e-6).all()


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "hidden", "units"),
    [
        (1, 4, 1, 64, 64),
        (5, 4, 2, 96, 32),  # 32 columns behind the last whole tile, in both products
        (17, 4, 2, 160, 96),
        (3, 128, 4, 64, 32),  # nearly all experts empty
        (2, 3, 3, 32, 160),
    ],
)
def test_every_step_equals_a_dense_product(
    num_tokens: int, num_experts: int, top_k: int, hidden: int, units: int
) -> None:
    x, logits = random_inputs(num_tokens, num_experts, hidden)
    weights = random_weights(num_experts, hidden, units)
    assert_steps_equal_dense_products("sm_90", 16, top_k, x, logits, None, weights)


@pytest.mark.parametrize("target", TARGETS)
def test_every_form_of_every_gpu_equals_a_dense_product(target: str) -> None:
    x, logits = random_inputs(20, 2, 160)
    logits[:, 0] += 3  # more than 16 rows for one expert
    weights = random_weights(2, 160, 96)
    for block_m in tuning.TABLES[target]:
        assert_steps_equal_dense_products(target, block_m, 1, x, logits, None, weights)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "hidden", "units"), [(64, 32, 4, 192, 128), (33, 8, 4, 96, 224)]
)
def test_larger_batches_equal_a_dense_product(
    target: str, num_tokens: int, num_experts: int, top_k: int, hidden: int, units: int
) -> None:
    x, logits = random_inputs(num_tokens, num_experts, hidden)
    weights = random_weights(num_experts, hidden, units)
    for block_m in tuning.TABLES[target]:
        assert_steps_equal_dense_products(target, block_m, top_k, x, logits, None, weights)


def test_all_tokens_on_one_expert_and_slots_that_are_not_real() -> None:
    x, logits = random_inputs(20, 3, 64)
    logits[:, 1] += 100
    real = torch.arange(20) % 4 != 2
    x[~real] = torch.nan  # what such a slot holds is nobody's business
    assert_steps_equal_dense_products("sm_90", 16, 1, x, logits, real, random_weights(3, 64, 32))


def test_pre_activations_beyond_the_limits_are_clamped() -> None:
    weights = list(random_weights(1, 32, 32))
    weights[2] = torch.tensor([20.0, 20, -20, -20, 20, -20, -20, 20]).repeat(8).view(1, 64).bfloat16()
    x, logits = random_inputs(3, 1, 32)
    hidden, _, _ = interpreted("moe_probes", "steps", "sm_90", 16, 1, x * 2**-6, logits, None, *weights)
    assert_steps_equal_dense_products("sm_90", 16, 1, x * 2**-6, logits, None, tuple(weights))
    assert torch.equal(hidden[:, 0], torch.full((3,), 56.0).bfloat16())  # 7 sigmoid(11.9) (7 + 1)
    assert torch.equal(hidden[:, 2], torch.full((3,), -42.0).bfloat16())  # 7 sigmoid(11.9) (-7 + 1)


@pytest.mark.parametrize("target", TARGETS)
def test_every_code_at_every_scale_that_tiles_hold_is_multiplied_exactly(target: str) -> None:
    """Unit vectors take the weights out one by one; those of scale byte 0 are subnormal in bf16."""
    codes = torch.arange(32) % 16
    blocks = mxfp4.pack(codes.to(torch.uint8).expand(129, 2, 32).contiguous()).unsqueeze(0)
    scales = torch.arange(129, dtype=torch.uint8).view(1, 129, 1).repeat(1, 1, 2)
    expected = mxfp4.decode(blocks, scales, torch.bfloat16)[0]  # (129, 64)
    assert (expected[:, 1] == 0.5 * 2.0 ** (torch.arange(129) - 127)).all()
    bias = torch.zeros(1, 129).bfloat16()
    got = interpreted("moe_probes", "product", target, 64, torch.eye(64).bfloat16(), blocks, scales, bias)
    assert torch.equal(got.T, expected)


@pytest.mark.parametrize("target", ONE_FAST)
def test_a_row_is_bit_for_bit_the_same_alone_and_among_others_in_tiles_of_any_height(target: str) -> None:
    x, logits = random_inputs(18, 2, 96)
    logits[:, 0] += 3  # more than 16 rows for one expert
    weights = random_weights(2, 96, 64)
    alone = interpreted("moe_probes", "steps", target, 16, 1, x[5:6], logits[5:6], None, *weights)[2]
    for block_m in tuning.TABLES[target]:
        among = interpreted("moe_probes", "steps", target, block_m, 1, x, logits, None, *weights)[2]
        assert torch.equal(among[5:6], alone)


def test_a_token_that_is_nan_spoils_no_other() -> None:
    x, logits = random_inputs(6, 2, 64)
    weights = random_weights(2, 64, 32)
    sane = interpreted("moe_probes", "moe_layer", 2, x, logits, None, *weights)
    x[2], logits[2] = torch.nan, torch.nan
    got = interpreted("moe_probes", "moe_layer", 2, x, logits, None, *weights)
    others = torch.arange(6) != 2
    assert got[2].isnan().all()
    assert torch.equal(got[others], sane[others])


def test_the_whole_layer_equals_the_models_own_experts() -> None:
    """`Experts` is compared with transformers elsewhere; here it computes in fp32."""
    x, logits = random_inputs(9, 5, 64)
    weights = random_weights(5, 64, 96)
    experts = Experts(5, 64, 96, Activation(1.702, 7.0), "mxfp4")
    for linear, (blocks, scales, bias) in zip(
        (experts.gate_up_proj, experts.down_proj), (weights[:3], weights[3:]), strict=True
    ):
        linear.blocks.copy_(blocks)
        linear.scales.copy_(scales)
        linear.bias.data.copy_(bias)
    values, chosen = logits.topk(2)
    with torch.no_grad():
        expected = experts(x.float(), values.softmax(-1), Routing.of(chosen, 5))
    got = interpreted("moe_probes", "moe_layer", 2, x, logits, None, *weights).float()
    # Three roundings to bf16, each with an error of at most 2**-8 / sqrt(3) in the mean of squares.
    assert (got - expected).norm() / expected.norm() < 2**-8
    linears = (
        moe.Linear(tiles.pack(blocks, scales, "mfma"), bias) for blocks, scales, bias in (weights[:3], weights[3:])
    )
    layer = moe.Layer(*linears, moe.Swiglu(1.702, 7.0), 2)
    assert (moe.moe_ref(x, logits, layer).float() - expected).norm() < 2**-8 * expected.norm()


def dense_layer(x: Tensor, logits: Tensor, top_k: int, weights: tuple[Tensor, ...], deltas: list[Tensor]) -> Tensor:
    """The weighted sum of one token's experts in fp64, `deltas` (E, out, in) added to the weights."""
    values, chosen = logits.topk(top_k)
    total = torch.zeros(len(x), dtype=torch.float64)
    for weight, expert in zip(values.double().softmax(0), chosen.tolist(), strict=True):
        pre = dense(*weights[:3], expert, x)[0] + deltas[0][expert] @ x.double()
        unit = swiglu(pre)
        total += weight * (dense(*weights[3:], expert, unit)[0] + deltas[1][expert] @ unit)
    return total


@pytest.mark.parametrize("target", ONE_FAST)
def test_tokens_of_two_adapters_and_of_none_in_one_batch_each_get_their_own(target: str) -> None:
    num_tokens, top_k, scaling = 9, 2, 0.5
    x, logits = random_inputs(num_tokens, 3, 96)
    weights = random_weights(3, 96, 64)
    factors = [random_factors(3, 96, 64, rank, seed=rank) for rank in (4, 17)]  # 21 ranks in all, filled up to 32
    adapters = torch.tensor([0, 1, -1]).repeat(3).int()
    tensors = (*weights, *factors[0], *factors[1])
    got = interpreted("moe_probes", "moe_with_adapters", target, top_k, x, logits, adapters, scaling, *tensors)
    nothing = [torch.zeros(3, 128, 96).double(), torch.zeros(3, 96, 64).double()]
    for token, adapter in enumerate(adapters.tolist()):
        deltas = nothing
        if adapter >= 0:
            a, b, c, d = (factor.bfloat16().double() for factor in factors[adapter])
            deltas = [scaling * b @ a, scaling * d @ c]
        expected = dense_layer(x[token], logits[token], top_k, weights, deltas)
        # As without adapters, and A x of both projections is rounded too.
        assert (got[token].double() - expected).norm() < 1.5 * 2**-8 * expected.norm()
        base = dense_layer(x[token], logits[token], top_k, weights, nothing)
        assert adapter < 0 or (base - expected).norm() > 0.1 * expected.norm()


def test_a_token_without_an_adapter_is_bit_for_bit_what_it_is_in_a_layer_without_any() -> None:
    x, logits = random_inputs(5, 2, 64)
    weights = random_weights(2, 64, 32)
    adapters = torch.tensor([-1, 0, -1, 0, 0]).int()
    factors = random_factors(2, 64, 32, 8, seed=1)
    got = interpreted("moe_probes", "moe_with_adapters", "sm_90", 1, x, logits, adapters, 1.0, *weights, *factors)
    plain = interpreted("moe_probes", "moe_layer", 1, x, logits, None, *weights)
    assert torch.equal(got[adapters < 0], plain[adapters < 0])
    assert (got[adapters >= 0] != plain[adapters >= 0]).any(1).all()


def test_the_reference_adds_what_the_kernels_add() -> None:
    x, logits = random_inputs(7, 2, 640)  # two parts of columns
    weights = random_weights(2, 640, 32)
    factors = random_factors(2, 640, 32, 8, seed=1)
    adapters = torch.tensor([0, -1, 0, 0, 0, -1, 0]).int()
    got = interpreted("moe_probes", "moe_with_adapters", "sm_90", 1, x, logits, adapters, 1.0, *weights, *factors)
    linears = [
        moe.Linear(tiles.pack(*weights[i : i + 2], "mma"), weights[i + 2], low_rank.join([(a, b, 1.0)]))
        for i, a, b in ((0, *factors[:2]), (3, *factors[2:]))
    ]
    expected = moe.moe_ref(x, logits, moe.Layer(*linears, moe.Swiglu(1.702, 7.0), 1), adapters=adapters)
    # Sums in another order may be rounded to the other of two neighbours, here and there.
    assert (got.float() - expected.float()).norm() < 2**-9 * expected.float().norm()


def test_a_projection_with_adapters_is_not_run_without_knowing_whose_a_token_is() -> None:
    x, logits = random_inputs(2, 3, 64)
    factors = low_rank.join([(torch.zeros(3, 4, 64), torch.zeros(3, 64, 4), 1.0)])
    linear = moe.Linear(tiles.empty(3, 64, 64, "wgmma"), torch.zeros(3, 64), factors)
    with pytest.raises(ValueError, match="which one each token has: pass `adapters`"):
        moe.down(x, linear, routing.route_ref(logits, 2, 16))


def test_an_empty_batch_has_an_empty_result() -> None:
    x, logits = random_inputs(0, 3, 64)
    assert interpreted("moe_probes", "moe_layer", 2, x, logits, None, *random_weights(3, 64, 32)).shape == (0, 64)


def test_wrong_dtypes_shapes_and_tile_heights_are_refused() -> None:
    x, logits = random_inputs(2, 3, 64)
    linear = moe.Linear(tiles.empty(3, 64, 64, "wgmma"), torch.zeros(3, 64))
    routed = routing.route_ref(logits, 2, 16)
    with pytest.raises(ValueError, match=r"torch\.float32; the expert kernels take bfloat16"):
        moe.down(x.float(), linear, routed)
    with pytest.raises(ValueError, match=r"shape \(2, 32\), expected \(rows, 64\)"):
        moe.up(x[:, :32], linear, routed, moe.Swiglu(1.702, 7.0))
    with pytest.raises(ValueError, match=r"up to 48 rows, expected one of \(16, 32, 64, 128\)"):
        moe.down(x, linear, routed._replace(block_m=48))


@pytest.mark.parametrize(
    ("tokens", "experts", "expected"), [(1, 32, 16), (64, 32, 16), (128, 32, 32), (512, 128, 32), (8192, 32, 128)]
)
def test_tiles_are_as_high_as_experts_need_them(tokens: int, experts: int, expected: int) -> None:
    assert tuning.block_m("sm_90", tokens, 4, experts) == expected
