"""Training with the experts as they will be exported: what is trained is written, gradients go straight through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import random_adapter, tiny_config, write_tiny
from oracles import slow_decode

import gptoss_infer as gi
from gptoss_infer.adapter import EXPERTS, Adapter, Factors, Target
from gptoss_infer.checkpoint import Checkpoint
from gptoss_infer.experts import Experts, Routing
from gptoss_infer.lora import factors_of, load_adapter, round_experts
from gptoss_train.export import Rule, export

CONFIG = tiny_config(num_hidden_layers=1, vocab_size=96)
TARGETS = [Target(0, weight) for weight in EXPERTS]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "base", CONFIG)


@pytest.fixture
def adapter() -> Adapter:
    return random_adapter(CONFIG, TARGETS, 0.1)


@pytest.mark.parametrize("rule", ["stochastic", "systematic", "nearest"])
def test_the_rounded_model_is_the_exported_one_bit_for_bit(
    tmp_path: Path, base: Path, adapter: Adapter, rule: Any
) -> None:
    export(adapter, base, tmp_path / "out", rule=Rule(rule, seed=3))
    written = gi.load(tmp_path / "out", device="cpu", dtype=torch.float32)
    model = gi.load(base, device="cpu", dtype=torch.float32)
    load_adapter(model, adapter)
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    unrounded = model(ids)
    round_experts(model, rule, 3)
    assert torch.equal(model(ids), written(ids))
    assert not torch.equal(model(ids), unrounded)


def test_gradients_go_straight_through_the_rounding(base: Path, adapter: Adapter) -> None:
    model = gi.load(base, device="cpu", dtype=torch.float32)
    load_adapter(model, adapter)
    round_experts(model, "stochastic", 0)
    experts: Experts = model.model.layers[0].mlp.experts  # type: ignore[assignment]
    live = {target.weight: pair for target, pair in factors_of(model, TARGETS).items()}
    for pair in live.values():
        pair.a.requires_grad_(True), pair.b.requires_grad_(True)
    generator = torch.Generator().manual_seed(2)
    tokens, k = 24, CONFIG.num_experts_per_tok
    x = torch.randn(tokens, CONFIG.hidden_size, generator=generator, requires_grad=True)
    chosen = torch.stack([torch.randperm(CONFIG.num_local_experts, generator=generator)[:k] for _ in range(tokens)])
    weights = torch.rand(tokens, k, generator=generator)
    upstream = torch.randn(tokens, CONFIG.hidden_size, generator=generator)
    experts(x, weights, Routing.of(chosen, CONFIG.num_local_experts)).backward(upstream)

    def written(weight: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Rounded weights (E, out, in) whose derivative is that of scaling B A."""
        module = experts.get_submodule(weight)
        rounded = slow_decode(module.rounded, module.base_layer.scales)
        delta = adapter.scaling * b @ a
        return rounded + delta - delta.detach()

    again = {name: Factors(*(p.detach().clone().requires_grad_() for p in pair)) for name, pair in live.items()}
    dense_x = x.detach().clone().requires_grad_()
    w = {name: written(name, *pair) for name, pair in again.items()}
    bias = {name: experts.get_submodule(name).base_layer.bias for name in EXPERTS}
    total = torch.zeros(tokens, CONFIG.hidden_size)
    for expert in range(CONFIG.num_local_experts):
        pre = F.linear(dense_x, w["gate_up_proj"][expert], bias["gate_up_proj"][expert])
        gate, up = (
            pre[:, 0::2].clamp(max=CONFIG.swiglu_limit),
            pre[:, 1::2].clamp(-CONFIG.swiglu_limit, CONFIG.swiglu_limit),
        )
        hidden = gate * torch.sigmoid(CONFIG.swiglu_alpha * gate) * (up + 1)
        out = F.linear(hidden, w["down_proj"][expert], bias["down_proj"][expert])
        total = total + out * ((chosen == expert) * weights).sum(1, keepdim=True)
    total.backward(upstream)
    pairs = [(x.grad, dense_x.grad)]
    for name in EXPERTS:
        pairs += [(live[name].a.grad, again[name].a.grad), (live[name].b.grad, again[name].b.grad)]
    for got, expected in pairs:
        assert got is not None
        assert expected is not None
        assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_a_run_that_ends_rounded_exports_what_it_validated(
    recipe: Callable[..., Path], finish: Callable[..., str], tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "lora": {"rank": 2, "alpha": 4.0, "attention": []},
        "data": {"train": str(tmp_path / "train.jsonl"), "validation_fraction": 0.2},
        "train": {"max_steps": 4, "pack_tokens": 256, "batch_tokens": 512, "rounded_steps": 2},
        "export": {"formats": ["mxfp4"], "seed": 5},
    }
    finish("run", recipe(**sections))
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    validated = [record["val/loss"] for record in records if "val/loss" in record]
    report = json.loads((tmp_path / "run/model/export.json").read_text())
    assert report["losses on task"]["export"]["loss"] == pytest.approx(validated[-1], rel=1e-6)
    assert report["losses on task"]["merge"]["loss"] != pytest.approx(validated[-1], rel=1e-6)
    assert not report["bias_correction"], "what learned to live with the errors keeps them"
    assert Checkpoint.open(tmp_path / "run/model").experts == "mxfp4"


def test_a_recipe_that_could_not_round_is_refused(recipe: Callable[..., Path], finish: Callable[..., str]) -> None:
    train = {"max_steps": 4, "pack_tokens": 256, "batch_tokens": 512, "rounded_steps": 2}
    output = finish("run", recipe(train=train), "lora.dropout=0.1", code=2)
    assert "train.rounded_steps is 2, which needs lora.experts, lora.dropout 0" in output
