"""The account of what was written: sums by hand and in fp64, over more rows than a part of the work has."""

from __future__ import annotations

import pytest
import torch
from oracles import slow_decode

from gptoss_infer.checkpoint.survival import CACHED_VALUES, Survival, survival_by_kind


def random_pair(rows: int, groups: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (rows, groups, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(118, 124, (rows, groups), dtype=torch.uint8, generator=generator)


def test_ratios_are_those_worked_out_by_hand() -> None:
    weight = Survival("model.layers.0.self_attn.q_proj")
    weight.add(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.eye(2) * 4)
    # Q - W is (1, 0), D is (1, 1) on the diagonal: half of D's direction, and an error of one of its two entries.
    assert (weight.values, weight.changed) == (4, 1)
    assert weight.kept == 0.5
    assert not weight.is_kept
    assert weight.residual == pytest.approx(0.5**0.5)
    assert weight.delta_to_base == pytest.approx(2**0.5 / 5)
    assert weight.error_to_base == pytest.approx(1 / 5)


def test_an_expert_is_accounted_for_as_in_fp64_whatever_its_size() -> None:
    groups = 9
    rows = CACHED_VALUES // (groups * 32) + 5  # two parts, the second of a few rows
    base, written = random_pair(rows, groups, 0), random_pair(rows, groups, 0)
    written[0][1, 2, 3] ^= 0x10  # another code
    written[1][rows - 1, 4] += 1  # the same codes at another scale
    delta = torch.randn(rows, groups * 32, generator=torch.Generator().manual_seed(1)) / 100
    expert = Survival("model.layers.0.mlp.experts.down_proj")
    expert.add_expert(base, delta, written)
    w, q, d = slow_decode(*base).double(), slow_decode(*written).double(), delta.double()
    assert (expert.experts, expert.blocks, expert.blocks_changed) == (1, rows * groups, 2)
    assert (expert.values, expert.changed) == (w.numel(), int((q != w).sum()))
    assert expert.kept == pytest.approx(float(((q - w) * d).sum() / d.square().sum()), rel=1e-5)
    assert expert.residual == pytest.approx(float((q - w - d).norm() / d.norm()), rel=1e-5)


def test_kinds_add_up_the_weights_of_all_layers() -> None:
    names = ("self_attn.q_proj", "mlp.experts.down_proj", "self_attn.o_proj", "mlp.router")
    weights = [Survival(f"model.layers.{n}.{name}", values=10, changed=n) for n in (1, 2) for name in names]
    kinds = [(kind.name, kind.values, kind.changed) for kind in survival_by_kind(weights)]
    assert kinds == [("attention", 40, 6), ("experts.down_proj", 20, 3), ("router", 20, 3)]
