"""Adapters against stock PEFT over stock transformers, in both directions, and against the dense formulation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, write_tiny
from oracles import transformers_model
from peft import LoraConfig
from torch import nn

import gptoss_infer as gi
from gptoss_infer.adapter import (
    ATTENTION,
    EXPERTS,
    ROUTER,
    Adapter,
    Factors,
    Target,
    read_adapter,
    weight_shape,
    write_adapter,
    zero_like,
)
from gptoss_infer.errors import DataError, UsageError
from gptoss_infer.experts import ExpertLinear, _Linear
from gptoss_infer.lora import LoraExpertLinear, LoraLinear, all_targets, attach, factors_of, load_adapter

CONFIG = tiny_config()
INPUT = torch.randint(0, 512, (2, 160), generator=torch.Generator().manual_seed(3))


def random_adapter(targets: list[Target], rank: int = 4, rslora: bool = False) -> Adapter:
    zeros = zero_like(CONFIG, targets, rank, alpha=8.0)
    generator = torch.Generator().manual_seed(5)
    factors = {
        target: Factors(*(torch.randn(x.shape, generator=generator) * 0.2 for x in pair))
        for target, pair in zeros.factors.items()
    }
    return Adapter(rank, 8.0, rslora, 0.0, factors, base="base")


SELECTIONS = {
    "all": all_targets(3, (*ATTENTION, *EXPERTS)),
    "with_router": all_targets(3, (*ATTENTION, *EXPERTS, ROUTER)),
    "attention": all_targets(3, ("q_proj", "o_proj")),
    "down_only": all_targets(3, ("down_proj",)),
    "one_layer": all_targets(3, ("v_proj", *EXPERTS, ROUTER), layers=[1]),
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_adapter_written_here_gives_the_same_logits_in_stock_peft(tmp_path: Path, selection: str, rslora: bool) -> None:
    from peft import PeftModel

    base = write_tiny(tmp_path / "base", CONFIG)
    write_adapter(tmp_path, random_adapter(SELECTIONS[selection], rslora=rslora), CONFIG)
    stock = PeftModel.from_pretrained(transformers_model(base), tmp_path).eval()
    ours = gi.load(base, device="cpu", dtype=torch.float32)
    plain = ours(INPUT)
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        expected, got = stock(input_ids=INPUT).logits, ours(INPUT)
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= 1e-4 * scale
    assert (got - plain).abs().max() > 0.01 * scale, "the adapter changed nothing"


@pytest.mark.parametrize(
    "parameters",
    [
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ["mlp.experts.gate_up_proj"],
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"],
    ],
)
def test_adapter_that_stock_peft_writes_is_read_with_equal_logits(tmp_path: Path, parameters: list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    base = write_tiny(tmp_path / "base", CONFIG)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "k_proj"], target_parameters=parameters)
    stock = get_peft_model(transformers_model(base), config).eval()
    torch.manual_seed(0)
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    stock.save_pretrained(tmp_path / "adapter")
    ours = gi.load(base, device="cpu", dtype=torch.float32)
    load_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        expected, got = stock(input_ids=INPUT).logits, ours(INPUT)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_writing_and_reading_an_adapter_keeps_every_value(tmp_path: Path) -> None:
    adapter = random_adapter(SELECTIONS["all"])
    write_adapter(tmp_path, adapter, CONFIG)
    again = read_adapter(tmp_path, CONFIG)
    assert (again.rank, again.alpha, again.base) == (4, 8.0, "base")
    for target, (a, b) in adapter.factors.items():
        assert torch.equal(again.factors[target].a, a)
        assert torch.equal(again.factors[target].b, b)


@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
def test_lora_gradients_equal_autograd_through_dense_merged_weights(tmp_path: Path, experts: str) -> None:
    base = write_tiny(tmp_path / "base", CONFIG)
    adapter = random_adapter(SELECTIONS["all"])
    ours = gi.load(base, device="cpu", dtype=torch.float32, experts=experts)
    attach(ours, adapter.factors, rank=4, alpha=8.0, dropout=0.0, rslora=False)
    live = factors_of(ours, adapter.factors)
    for target, pair in adapter.factors.items():
        for parameter, value in zip(live[target], pair, strict=True):
            parameter.data.copy_(value)
    loss(ours).backward()

    # The oracle: stock transformers with W + scaling B A written into its weights as a function of A and B.
    leaves = {t: Factors(*(x.clone().requires_grad_(True) for x in pair)) for t, pair in adapter.factors.items()}
    oracle = transformers_model(base)
    merged = {}
    for target, (a, b) in leaves.items():
        delta = adapter.scaling * (b @ a)
        name = target.module if target.is_expert else f"{target.module}.weight"
        merged[name] = oracle.get_parameter(name).detach() + (delta.transpose(-1, -2) if target.is_expert else delta)
    logits = torch.func.functional_call(oracle, merged, kwargs={"input_ids": INPUT}).logits
    logits.log_softmax(-1)[..., 7].mean().backward()
    for target, pair in leaves.items():
        for got, expected in zip(live[target], pair, strict=True):
            bound = 1e-4 * expected.grad.abs().max().item() + 1e-9
            assert (got.grad - expected.grad).abs().max() <= bound, target


def loss(model: torch.nn.Module) -> torch.Tensor:
    return model(INPUT).log_softmax(-1)[..., 7].mean()


def test_targets_that_match_nothing_are_an_error_that_names_what_exists(tiny_checkpoint: Path) -> None:
    model = gi.load(tiny_checkpoint, device="cpu", dtype=torch.float32)
    with pytest.raises(UsageError, match=r"layers\.9.*3 layers.*q_proj"):
        attach(model, [Target(9, "q_proj")], rank=4, alpha=8.0, dropout=0.0, rslora=False)
    with pytest.raises(UsageError, match=r"empty.*nothing would be trained"):
        attach(model, [], rank=4, alpha=8.0, dropout=0.0, rslora=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 5}, "expected"),
    ],
)
def test_adapters_that_cannot_be_applied_whole_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    write_adapter(tmp_path, random_adapter(SELECTIONS["all"]), CONFIG)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        read_adapter(tmp_path, CONFIG)


def test_adapter_tensors_without_a_place_are_refused_rather_than_dropped(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_adapter(tmp_path, random_adapter(SELECTIONS["attention"]), CONFIG)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.mlp.gate.lora_A.weight"] = torch.zeros(4, 64)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(DataError, match=r"gate\.lora_A"):
        read_adapter(tmp_path, CONFIG)


def test_shapes_of_adaptable_weights_are_those_of_the_model(tiny_checkpoint: Path) -> None:
    model = gi.load(tiny_checkpoint, device="cpu", dtype=torch.float32)
    for target in SELECTIONS["all"]:
        module = model.get_submodule(target.module)
        assert weight_shape(target.weight, CONFIG) == (module.in_features, module.out_features)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("size", [2e-4, 1e-3, 5e-3])
def test_in_bf16_an_unmerged_adapter_carries_its_whole_delta_however_small(size: float, frozen: bool) -> None:
    torch.manual_seed(0)
    linear, experts = nn.Linear(256, 256).bfloat16(), ExpertLinear(1, 256, 256, "mxfp4")
    blocks, scales = gi.mxfp4.encode(torch.randn(1, 256, 256) * 0.05)
    experts.blocks, experts.scales = blocks, scales
    experts.bias.data = torch.randn(1, 256)
    x = torch.randn(512, 256).bfloat16()
    for layer, weight in ((linear, linear.weight.detach().float()), (experts, gi.mxfp4.decode(blocks, scales)[0])):
        wrapper = LoraLinear if layer is linear else LoraExpertLinear
        adapted = wrapper(layer, "default", config=LoraConfig(), r=8, lora_alpha=16)
        a, b = adapted.factors
        b.data = torch.randn(b.shape) * 0.01
        delta = 2 * (b @ a).detach().reshape(256, 256)
        b.data *= size * weight.float().norm() / delta.norm()
        b.requires_grad_(not frozen)
        asked = x.float() @ (2 * (b @ a).detach().reshape(256, 256)).T
        with torch.no_grad():
            if layer is linear:
                added = adapted(x).float() - linear(x).float()
            else:
                both = [_Linear(p, torch.bfloat16, halves=False) for p in (adapted.projection(), layer.projection())]
                outputs = [one.forward(x, slice(0, 1), [512], None)[0].float() for one in both]
                added = outputs[0] - outputs[1]
        carried = float((added * asked).sum() / asked.square().sum())
        assert carried == pytest.approx(1, abs=0.05), f"{type(layer).__name__} carries {carried:.2f} of its delta"


def test_a_frozen_adapter_that_is_written_to_computes_with_what_was_written(tmp_path: Path) -> None:
    model = gi.load(write_tiny(tmp_path / "base", CONFIG), device="cpu", dtype=torch.float32)
    targets = SELECTIONS["all"]
    load_adapter(model, random_adapter(targets))
    before = model(INPUT)
    with torch.no_grad():
        for pair in factors_of(model, targets).values():
            pair.b.mul_(0)
    base = gi.load(tmp_path / "base", device="cpu", dtype=torch.float32)(INPUT)
    assert not torch.allclose(before, base, atol=1e-2)
    assert torch.allclose(model(INPUT), base, atol=1e-5)
