"""`gptoss-train plan`: memory against torch's own record of a real step, and what it says of recipes and devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from conftest import random_tensors, tiny_config, write_tiny
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

from gptoss_infer.checkpoint import Checkpoint
from gptoss_infer.config import ModelConfig, alternating, published
from gptoss_train.bench import Shape, synthetic
from gptoss_train.dry_run import dry_run
from gptoss_train.plan import checkpoint_bytes
from gptoss_train.recipe import Recipe
from gptoss_train.train import Trainer, build_trainer

SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2}
CONFIG = tiny_config(num_hidden_layers=4, num_local_experts=8, head_dim=32, vocab_size=2048, sliding_window=16, **SIZES)
DEEPER = replace(CONFIG, num_hidden_layers=6, layer_types=alternating(6))


def recipe_of(**sections: dict[str, Any]) -> Recipe:
    train = {"max_steps": 2, "pack_tokens": 1024, "batch_tokens": 1024} | sections.pop("train", {})
    model = {"checkpoint": "x", "device": "cpu"} | sections.pop("model", {})
    values: dict[str, Any] = {"version": 1, "model": model, "data": {"train": "x"}, "train": train}
    return Recipe.model_validate(values | sections)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Random, with biases too small to send all tokens to the same experts."""
    directory = write_tiny(tmp_path_factory.mktemp("plan") / "base", CONFIG)
    small = {name: x * 0.01 if name.endswith("bias") else x for name, x in random_tensors(CONFIG, "mxfp4").items()}
    save_file(small, directory / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.open(directory)


def measured(trainer: Trainer) -> int:
    """Return the bytes of all tensors at the peak of a second step: what stays, and what the profiler recorded."""
    trainer.step(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        trainer.step(1)
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    weights = [*trainer.model.parameters(), *trainer.model.buffers()]
    return sum(tensor.nbytes for tensor in weights) + sum(2 * p.nbytes for p in trainer.factors.values()) + peak


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"train": {"recompute": "experts"}},
        {"train": {"recompute": "layers"}},
        {"train": {"batch_tokens": 2048}},
        {"train": {"batch_tokens": 2048, "recompute": "layers"}},
        {"model": {"dtype": "float32"}},
        {"model": {"experts": "bf16"}},
        {"lora": {"rank": 64, "router": True, "dropout": 0.1}},
        {"lora": {"experts": (), "layers": (0, 3)}},
    ],
    ids=json.dumps,
)
def test_memory_is_what_torch_records_of_a_real_step(
    sections: dict[str, dict[str, Any]], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    recipe = recipe_of(**sections)
    batch = recipe.train.batch_tokens // 256
    data = synthetic(CONFIG, Shape(256, batch, 4, 0.5), 2)
    trainer = build_trainer(
        recipe, checkpoint, data, None, run_dir=tmp_path, fingerprint="", accelerator=Accelerator(cpu=True)
    )
    planned = dry_run(recipe, CONFIG, [256] * 4, 512, gpu=False)
    assert planned.device == pytest.approx(measured(trainer), rel=0.05)
    assert planned.num_factors == sum(factor.numel() for factor in trainer.factors.values())


@pytest.mark.parametrize("gpu", [True, False])
def test_two_and_four_layers_tell_what_all_of_them_take(gpu: bool) -> None:
    recipe = recipe_of(train={"batch_tokens": 2048})
    every = recipe_of(train={"batch_tokens": 2048}, lora={"layers": tuple(range(6))})  # runs all six
    assert dry_run(recipe, DEEPER, [1024], 300, gpu=gpu) == dry_run(every, DEEPER, [1024], 300, gpu=gpu)


def test_levers_trade_device_memory_as_documented() -> None:
    config = replace(published("20b"), num_hidden_layers=2, layer_types=alternating(2))

    def step(train: dict[str, Any], **model: str) -> Any:
        recipe = recipe_of(train=train | {"pack_tokens": 2048, "batch_tokens": 2048}, model=model)
        return dry_run(recipe, config, [2048], 512, gpu=True)

    none, experts, layers = (step({"recompute": name}) for name in ("none", "experts", "layers"))
    assert none.kept > 1.7 * experts.kept > 1.7 * 3 * layers.kept
    offloaded = step({"recompute": "layers", "offload": True})
    assert offloaded.offloaded == 2 * 2048 * 2880 * 2  # layers, tokens, width, bf16
    assert offloaded.kept == layers.kept - offloaded.offloaded
    on_host = step({"recompute": "layers"}, embedding="host")
    assert on_host.embedding_on_host == layers.weights - on_host.weights == 201088 * 2880 * 2


@pytest.mark.parametrize(("size", "stored_gb"), [("20b", 13.76), ("120b", 65.25)])
def test_weights_are_the_published_checkpoints_bytes(size: Any, stored_gb: float) -> None:
    config: ModelConfig = published(size)
    assert checkpoint_bytes(config, "mxfp4") / 1e9 == pytest.approx(stored_gb, abs=0.005)  # sizes on the hub
    recipe = recipe_of(train={"pack_tokens": 128, "batch_tokens": 128, "recompute": "layers"})
    weights = dry_run(recipe, config, [128], 16, gpu=True).weights
    # A GPU's tiles fill the 90 scales of a row up to 92. Norms are fp32 in memory.
    filled = 2 * 3 * config.hidden_size * config.num_local_experts * config.num_hidden_layers
    assert weights == pytest.approx(checkpoint_bytes(config, "mxfp4") + filled, rel=1e-4)


def test_training_rounded_experts_costs_a_second_copy_of_their_blocks() -> None:
    plain, rounded = (
        dry_run(recipe_of(train={"rounded_steps": steps}), CONFIG, [128], 16, gpu=True).weights for steps in (0, 2)
    )
    elements = 3 * CONFIG.hidden_size * CONFIG.intermediate_size * CONFIG.num_local_experts * CONFIG.num_hidden_layers
    assert rounded - plain == elements // 2


def test_attention_workspace_stays_bounded_for_long_packs() -> None:
    config = replace(published("20b"), num_hidden_layers=2, layer_types=alternating(2))
    recipe = recipe_of(train={"pack_tokens": 32768, "batch_tokens": 32768, "recompute": "layers"})
    assert dry_run(recipe, config, [32768], 64, gpu=True).passing < 7e9  # a layer of it, recomputed, takes 3


def test_a_plan_tells_memory_time_and_disk_and_trains_nothing(
    recipe: Callable[..., Path], finish: Callable[..., str], tmp_path: Path
) -> None:
    path = recipe(export={"formats": ["mxfp4"]})
    text = finish("plan", path)
    assert "on cpu: it fits" in text
    for word in ("weights", "in all", "disk", "tokens/s", "hours", "train.recompute=layers"):
        assert word in text, word
    assert not (tmp_path / "run").exists()
    told = json.loads(finish("plan", path, "--device", "rtx4090", "--json").splitlines()[-1])
    assert told["steps"] == 4
    assert told["tokens"] > 0
    assert told["fits"]
    assert told["recipe"]["train"]["pack_tokens"] == 256
    assert set(told["disk_gb"]) == {"checkpoints", "adapter", "export mxfp4"}


def test_what_does_not_fit_says_so_and_exits_1(recipe: Callable[..., Path], finish: Callable[..., str]) -> None:
    train = {"max_steps": 9, "pack_tokens": 128, "batch_tokens": 128}
    path = recipe(model={"checkpoint": "openai/gpt-oss-20b"}, data={"train": "none.jsonl"}, train=train)
    text = finish("plan", path, "--device", "12GB", code=1)
    assert "it does NOT fit" in text
    assert "none.jsonl is not there" in text
    assert "speed unknown" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h999"], "device 'h999' is not known; known are cpu, a100-40gb"),
        (["model.checkpoint=someone/model"], "architecture of 'someone/model' is not known here"),
        (["lora.layers=[7]"], "7"),
    ],
)
def test_an_unknown_device_checkpoint_or_layer_is_refused(
    arguments: list[str], message: str, recipe: Callable[..., Path], finish: Callable[..., str]
) -> None:
    assert message in finish("plan", recipe(), *arguments, code=2)
