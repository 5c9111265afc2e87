"""Routing on the device against plain PyTorch, and that against counting by hand."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed here (it comes with torch on Linux)")
from gptoss_infer.kernels import routing  # needs triton

MODULE = "gptoss_infer.kernels.routing"


def random_logits(num_tokens: int, num_experts: int) -> Tensor:
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(num_tokens)).bfloat16()


def assert_routed_as_the_reference_does(logits: Tensor, top_k: int, block_m: int, real: Tensor | None = None) -> None:
    got = routing.Routed(*interpreted(MODULE, "route", logits, top_k, block_m, real), block_m)
    expected = routing.route_ref(logits, top_k, block_m, real)
    assert torch.equal(got.chosen, expected.chosen)
    # A handful of fp32 roundings and two exponentials accurate to 2 units in the last place.
    assert torch.allclose(got.weights, expected.weights, rtol=8 * 2**-24, atol=0, equal_nan=True)
    assert torch.equal(got.slots, expected.slots)
    exists = expected.tiles[0] >= 0
    assert torch.equal(got.tiles[0], expected.tiles[0])
    assert torch.equal(got.tiles[:, exists], expected.tiles[:, exists])


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "block_m"),
    [
        *[(1, 4, 1, 16), (1, 32, 4, 16), (3, 8, 8, 16), (16, 5, 3, 16), (17, 6, 2, 64), (64, 128, 4, 16)],
        *[(65, 32, 4, 32), (96, 4, 2, 16), (129, 6, 3, 64)],
    ],
)
def test_every_size_routes_as_the_reference_does(num_tokens: int, num_experts: int, top_k: int, block_m: int) -> None:
    assert_routed_as_the_reference_does(random_logits(num_tokens, num_experts), top_k, block_m)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1100, 32, 4), (300, 128, 8)])
def test_many_blocks_of_tokens_route_as_the_reference_does(num_tokens: int, num_experts: int, top_k: int) -> None:
    assert_routed_as_the_reference_does(random_logits(num_tokens, num_experts), top_k, 64)


@pytest.mark.parametrize("num_tokens", [1, 20, 70])
def test_slots_that_are_not_real_route_nowhere(num_tokens: int) -> None:
    logits = random_logits(num_tokens, 8)
    for real in (torch.arange(num_tokens) % 3 == 1, torch.zeros(num_tokens, dtype=torch.bool)):
        assert_routed_as_the_reference_does(logits, 4, 16, real)


@pytest.mark.parametrize("num_tokens", [40, 100])
def test_all_tokens_on_one_expert_fill_its_tiles_and_leave_the_others_empty(num_tokens: int) -> None:
    logits = torch.tensor([0.0, 9.0, 0.0, 0.0]).expand(num_tokens, 4)
    assert_routed_as_the_reference_does(logits, 1, 16)
    tiles = routing.route_ref(logits, 1, 16).tiles
    assert tiles[0].tolist() == [1] * -(-num_tokens // 16) + [-1] * (tiles.shape[1] - -(-num_tokens // 16))


def test_ties_go_to_the_lowest_expert_and_odd_values_are_ordered_as_torch_orders_them() -> None:
    logits = torch.randint(-2, 3, (80, 32), generator=torch.Generator().manual_seed(0)).float()
    logits[3, 4] = torch.nan
    logits[4] = torch.nan
    logits[5] = -torch.inf
    logits[6, 7] = torch.inf
    logits[7] = torch.tensor([-0.0, 0.0]).repeat(16)  # equal: the first four
    logits[8] = -1e-45
    for rows in (logits[:16], logits):
        assert_routed_as_the_reference_does(rows, 4, 16)
    assert routing.route_ref(logits, 4, 16).chosen[7].tolist() == [0, 1, 2, 3]


def test_a_token_is_routed_the_same_alone_and_among_others_bit_for_bit() -> None:
    logits = random_logits(70, 32)
    _, many, _, _ = interpreted(MODULE, "route", logits, 4, 16)
    _, few, _, _ = interpreted(MODULE, "route", logits[:20], 4, 16)
    _, one, _, _ = interpreted(MODULE, "route", logits[7:8], 4, 16)
    assert torch.equal(many[:20], few)
    assert torch.equal(many[7:8], one)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "block_m"), [(1, 32, 4, 16), (37, 6, 3, 16), (5, 4, 4, 64)]
)
def test_the_reference_gives_every_slot_one_row_among_its_experts_tiles(
    num_tokens: int, num_experts: int, top_k: int, block_m: int
) -> None:
    logits = random_logits(num_tokens, num_experts)
    routed = routing.route_ref(logits, top_k, block_m)
    values, experts = logits.float().topk(top_k)
    assert torch.equal(routed.weights, values.softmax(-1))
    assert torch.equal(logits.float().gather(1, routed.chosen.long()), values)
    seen = []
    for expert, first, count in routed.tiles.T.tolist():
        if expert >= 0:
            assert 1 <= count <= block_m
            rows = routed.slots[first : first + count].tolist()
            assert all(routed.chosen[slot // top_k, slot % top_k] == expert for slot in rows)
            seen += rows
    assert sorted(seen) == list(range(num_tokens * top_k))
    assert experts.shape == routed.chosen.shape


@pytest.mark.parametrize("block_m", [1, 2, 16])
def test_the_number_of_tiles_is_the_least_that_no_routing_exceeds(block_m: int) -> None:
    """Every way of giving 6 slots to 3 experts, tried."""
    most = max(sum(-(-count // block_m) for count in (a, b, 6 - a - b)) for a in range(7) for b in range(7 - a))
    assert routing.num_tiles(6, 1, 3, block_m) == most


def test_wrong_arguments_are_refused() -> None:
    logits = random_logits(4, 6)
    for top_k in (0, 7, 9):
        with pytest.raises(ValueError, match=r"expected \(N, E\) and k of 1 to"):
            routing.route(logits, top_k, 16)
    with pytest.raises(ValueError, match=r"expected bool \(4,\)"):
        routing.route(logits, 2, 16, torch.ones(3, dtype=torch.bool))
