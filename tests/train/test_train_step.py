"""One optimizer step, in process: channel weights, LoRA+, and the metrics that come with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from gptoss_infer.checkpoint import Checkpoint
from gptoss_infer.lora import factors_of
from gptoss_train.data import Dataset, Report, Sample
from gptoss_train.health import adapter_norms
from gptoss_train.recipe import Recipe
from gptoss_train.train import Trainer, build_trainer


def samples() -> list[Sample]:
    """Analysis (code 1) and final (code 3) labels in every sample, in different numbers."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in (20, 9, 31):
        ids = torch.randint(0, 200000, (length,), generator=generator, dtype=torch.int32)
        channels = torch.zeros(length, dtype=torch.uint8)
        channels[length // 2 : -3], channels[-3:] = 1, 3
        made.append(Sample(ids, channels))
    return made


@pytest.fixture
def trainer(tiny_base: Path, tmp_path: Path) -> Any:
    def make(**sections: dict[str, Any]) -> Trainer:
        train = {"max_steps": 2, "pack_tokens": 40, "batch_tokens": 80} | sections.pop("train", {})
        values: dict[str, Any] = {
            "version": 1,
            "model": {"checkpoint": str(tiny_base), "dtype": "float32", "device": "cpu"},
            "lora": {"rank": 2, "alpha": 4.0},
            "data": {"train": "unused"},
            "optim": {"max_grad_norm": 0.0},
            "train": train,
        }
        recipe = Recipe.model_validate(values | sections)
        data = Dataset(samples(), Report("synthetic"), "")
        checkpoint = Checkpoint.open(tiny_base)
        return build_trainer(
            recipe, checkpoint, data, None, run_dir=tmp_path, fingerprint="", accelerator=Accelerator(cpu=True)
        )

    return make


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The gradients that the first step hands to the optimizer."""
    found: dict[str, torch.Tensor] = {}

    def record(*_: object) -> None:
        found.update({name: p.grad.clone() for name, p in trainer.factors.items() if p.grad is not None})

    trainer.optimizer.register_step_pre_hook(record)
    trainer.step(0)
    return found


def test_channel_weights_mix_the_channels_gradients_over_their_weighted_number_of_labels(trainer: Any) -> None:
    analysis = gradients(trainer(loss={"channel_weights": {"final": 0.0}}))
    final = gradients(trainer(loss={"channel_weights": {"analysis": 0.0}}))
    mixed = gradients(trainer(loss={"channel_weights": {"final": 3.0}}))
    # The first of two steps; packs are of 40 tokens, so it holds all three samples.
    labels = torch.cat([sample.channels[1:] for sample in samples()])
    n1, n3 = int((labels == 1).sum()), int((labels == 3).sum())
    for name, got in mixed.items():
        expected = (n1 * analysis[name] + 3 * n3 * final[name]) / (n1 + 3 * n3)
        assert torch.allclose(got, expected, atol=1e-6 * float(expected.abs().max()) + 1e-12), name


def test_a_common_factor_on_all_channels_changes_nothing(trainer: Any) -> None:
    plain, doubled = gradients(trainer()), gradients(trainer(loss={"channel_weights": {"analysis": 2, "final": 2}}))
    for name, expected in plain.items():
        assert torch.allclose(doubled[name], expected, rtol=1e-5, atol=1e-12), name


def test_lora_plus_gives_b_a_rate_in_the_asked_ratio(trainer: Any) -> None:
    made = trainer(optim={"lr": 1e-3, "lora_plus_ratio": 8.0, "schedule": "constant", "max_grad_norm": 0.0})
    made.step(0)
    # Adam's first step moves every value with a gradient by its rate. A has none yet: B is 0.
    moved = max(float(pair.b.abs().max()) for pair in factors_of(made.model, made.targets).values())
    assert moved == pytest.approx(8e-3, rel=1e-3)


def test_a_step_reports_shares_speed_and_the_experts_load(trainer: Any) -> None:
    made = trainer()
    values, tokens = made.step(0)
    lengths = [sample.num_inputs for sample in samples()]
    labels = sum(int((sample.channels[1:] > 0).sum()) for sample in samples())
    assert tokens == sum(lengths)
    assert values["train/labelled_share"] == pytest.approx(labels / tokens)
    assert values["train/padding_share"] == pytest.approx(1 - tokens / 80)
    assert 0 <= values["moe/dead_experts"] < 1
    assert values["moe/load_cv"] >= 0
    assert 0 <= values["moe/clamped_share"] < 1
    assert values["train/tokens_per_s"] > 0
    assert values["train/peak_memory_gb"] > 0.1


def test_adapter_norms_are_those_of_the_whole_delta(trainer: Any) -> None:
    made = trainer()
    for pair in factors_of(made.model, made.targets).values():
        pair.b.data.normal_()
    squares = torch.zeros(())
    for a, b in factors_of(made.model, made.targets).values():
        squares = squares + (2.0 * b @ a).square().sum()
    (norm,) = adapter_norms(factors_of(made.model, made.targets).items(), 2.0).values()
    assert norm == pytest.approx(float(squares.sqrt()), rel=1e-4)
