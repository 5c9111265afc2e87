"""What an export tells of itself: mean inputs of the experts, biases that use them, losses and divergence."""

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
from torch import Tensor

import gptoss_infer as gi
from evals.exports import read_export
from gptoss_infer.adapter import ATTENTION, EXPERTS, Adapter, Target, write_adapter
from gptoss_infer.checkpoint import Checkpoint
from gptoss_infer.errors import DataError
from gptoss_infer.experts import Shown
from gptoss_infer.lora import load_adapter
from gptoss_train.calibration import MIN_TOKENS, Calibration, collect
from gptoss_train.data import Sample
from gptoss_train.export import Rule, export
from gptoss_train.measure import Reference, Runtime

CONFIG = tiny_config(num_hidden_layers=2, vocab_size=96)
TARGETS = [Target(layer, weight) for layer in range(2) for weight in (*ATTENTION, *EXPERTS)]
RUNTIME = Runtime("cpu", 64)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("measured") / "base", CONFIG)


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return random_adapter(CONFIG, TARGETS, 0.1)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Forty of 20 to 59 tokens; the second half is labelled, as analysis (1) and final (3)."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in range(20, 60):
        channels = torch.zeros(length, dtype=torch.uint8)
        channels[length // 2 : -4], channels[-4:] = 1, 3
        made.append(Sample(torch.randint(0, 96, (length,), generator=generator, dtype=torch.int32), channels))
    return made


def tuned(base: Path, adapter: Adapter | None) -> gi.GptOss:
    model = gi.load(base, device="cpu", dtype=torch.float32)
    if adapter is not None:
        load_adapter(model, adapter)
    return model


class Rows:
    """Keeps everything that the experts of a model read."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, str, int], list[Tensor]] = {}

    def routed(self, layer: int, chosen: Tensor, counts: list[int]) -> None:
        pass

    def computed(self, layer: int, shown: Shown) -> None:
        first = shown.experts.start
        for name, rows in (("gate_up_proj", shown.inputs), ("down_proj", shown.hidden)):
            for offset, part in enumerate(rows.split(shown.counts)):
                self.rows.setdefault((layer, name, first + offset), []).append(part)


def rows_of(model: gi.GptOss, samples: list[Sample]) -> dict[tuple[int, str, int], Tensor]:
    watch = Rows()
    with torch.no_grad():
        for sample in samples:
            model.hidden(sample.token_ids[None, :-1].long(), watch=watch)
    return {key: torch.cat(parts) for key, parts in watch.rows.items()}


def test_mean_inputs_are_those_of_all_tokens_that_an_expert_sees(
    base: Path, adapter: Adapter, samples: list[Sample]
) -> None:
    model = tuned(base, adapter)
    found = collect(model, samples, 64, 10**9)
    rows = rows_of(model, samples)
    for (layer, weight, expert), some in rows.items():
        assert found.tokens[layer, expert] == len(some)
        torch.testing.assert_close(found.means[weight][layer, expert], some.mean(0), rtol=1e-4, atol=1e-5)
    assert int(found.tokens.sum()) == 2 * CONFIG.num_experts_per_tok * sum(sample.num_inputs for sample in samples)
    part = collect(model, samples, 64, 300)
    assert 300 <= int(part.tokens.sum()) // (2 * CONFIG.num_experts_per_tok) < 360, "no more than was asked for"


def test_a_calibration_reads_back_and_one_of_another_model_is_refused(tmp_path: Path, base: Path) -> None:
    found = Calibration(
        torch.ones(2, CONFIG.num_local_experts, dtype=torch.int64),
        {
            name: torch.randn(2, CONFIG.num_local_experts, size)
            for name, size in zip(EXPERTS, (CONFIG.hidden_size, CONFIG.intermediate_size), strict=True)
        },
    )
    found.save(tmp_path / "calibration.safetensors")
    again = Calibration.load(tmp_path / "calibration.safetensors", CONFIG)
    assert all(torch.equal(again.means[name], found.means[name]) for name in EXPERTS)
    with pytest.raises(DataError, match="collected from another model"):
        Calibration.load(tmp_path / "calibration.safetensors", tiny_config(num_hidden_layers=3))


def test_biases_take_back_the_mean_of_the_rounding_errors(
    tmp_path: Path, base: Path, adapter: Adapter, samples: list[Sample]
) -> None:
    model = tuned(base, adapter)
    calibration = collect(model, samples, 64, 10**9)
    result = export(adapter, base, tmp_path / "out", rule=Rule(calibration=calibration))
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    corrected = 0
    for (layer, weight, expert), rows in rows_of(model, samples).items():
        name = f"model.layers.{layer}.mlp.experts.{weight}"

        def dense(checkpoint: Checkpoint, name: str = name, expert: int = expert) -> tuple[Tensor, Tensor]:
            blocks, scales = (checkpoint.tensor(f"{name}_{part}")[expert] for part in ("blocks", "scales"))
            return slow_decode(blocks, scales).double(), checkpoint.tensor(f"{name}_bias")[expert].double()

        (w, bias), (q, new_bias) = dense(before), dense(after)
        asked = w + adapter.delta(Target(layer, weight), expert).double()
        plain = (rows.double() @ (q - asked).T).mean(0)  # (out,): mean shift of the output by rounding
        left = plain + new_bias - bias
        if len(rows) < MIN_TOKENS:
            assert torch.equal(new_bias, bias), "too few tokens to know a mean"
            continue
        corrected += 1
        # What is left is at most half a step of a bf16 bias.
        assert (left.abs() <= new_bias.abs() * 2**-8 + 1e-5).all()
        assert left.norm() < 0.2 * plain.norm()
    assert corrected > 0
    assert sum(item.experts_with_bias for item in result.survival) == corrected


def test_losses_and_divergence_are_those_of_the_full_distributions(
    tmp_path: Path, base: Path, adapter: Adapter, samples: list[Sample]
) -> None:
    reference = Reference.of(Checkpoint.open(base), adapter, {"task": samples}, RUNTIME)
    measured = export(adapter, base, tmp_path / "out", reference=reference).measured
    assert measured is not None
    models = {"base": tuned(base, None), "merge": tuned(base, adapter), "export": tuned(tmp_path / "out", None)}
    logs: dict[str, list[Tensor]] = {name: [] for name in models}
    targets, channels = [], []
    for sample in samples:
        ids, labelled = sample.token_ids.long(), sample.channels[1:] > 0
        targets.append(ids[1:][labelled])
        channels.append(sample.channels[1:][labelled])
        for name, model in models.items():
            with torch.no_grad():
                logs[name].append(model(ids[None, :-1])[0, labelled].double().log_softmax(-1))
    flat = {name: torch.cat(parts) for name, parts in logs.items()}
    code = torch.cat(channels)
    for name, log in flat.items():
        losses = F.nll_loss(log, torch.cat(targets), reduction="none")
        assert measured["task"][name]["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert measured["task"][name]["loss_final"] == pytest.approx(float(losses[code == 3].mean()), rel=1e-5)
        wrong = (log.argmax(-1) != torch.cat(targets)).split([len(some) for some in targets])
        exact = sum(not bool(some.any()) for some in wrong) / len(wrong)
        assert measured["task"][name]["exact"] == pytest.approx(exact)
    divergence = F.kl_div(flat["export"], flat["merge"], log_target=True, reduction="batchmean")
    compared = measured["task"]["compared"]
    assert compared["kl_to_merge"] == pytest.approx(float(divergence), rel=1e-3)
    assert compared["labels"] == len(code)
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["losses on task"] == {name: measured["task"][name] for name in models}
    assert report["compared"]["task"] == compared


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    tmp_path: Path, base: Path, adapter: Adapter
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        export(adapter, base, tmp_path / name, rule=Rule(seed=seed))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_run_measures_its_export_and_an_allowed_increase_decides_the_exit_code(
    recipe: Callable[..., Path], finish: Callable[..., str], tmp_path: Path
) -> None:
    data = {"train": str(tmp_path / "train.jsonl"), "validation_fraction": 0.2}
    unrelated = str(tmp_path / "train.jsonl")
    sections: dict[str, Any] = {"data": data, "export": {"formats": ["mxfp4"], "unrelated": unrelated}}
    output = finish("run", recipe(**sections), "export.max_loss_increase=100.0")
    assert "loss on task: base" in output
    assert "loss on unrelated: base" in output
    report = json.loads((tmp_path / "run/model/export.json").read_text())
    assert report["bias_correction"]
    assert (tmp_path / "run/calibration.safetensors").exists()
    shown = read_export(tmp_path / "run/model/export.json")
    assert [len(chart.lines) for chart in shown.layers] == [3, 3, 3]
    assert [panel.heading for panel in shown.losses[0].panels] == ["on task", "on unrelated"]
    again = ["export", tmp_path / "run", tmp_path / "again"]
    finish(*again)
    one, other = (tmp_path / name / "model.safetensors" for name in ("run/model", "again"))
    assert one.read_bytes() == other.read_bytes(), "the command repeats what the run did"
    short = finish(*again, "--overwrite", "--rounding", "nearest", "--max-loss-increase", "0", code=1)
    assert "is more than the 0.0 that is allowed" in short
    assert (tmp_path / "again").exists(), "written all the same"


def test_an_adapter_alone_is_calibrated_and_measured_on_files(
    recipe: Callable[..., Path], finish: Callable[..., str], tmp_path: Path
) -> None:
    finish("run", recipe())
    data = str(tmp_path / "train.jsonl")
    out = ["export", tmp_path / "run/adapter", tmp_path / "out", "--calibrate", data, "--task", data, "--json"]
    told = json.loads(finish(*out).splitlines()[-1])
    assert told["measured"]["task"]["compared"]["labels"] > 0
    report = json.loads((tmp_path / "out/export.json").read_text())
    assert report["bias_correction"]


def test_a_run_whose_data_is_gone_is_exported_unmeasured_and_said_so(
    recipe: Callable[..., Path], finish: Callable[..., str], tmp_path: Path
) -> None:
    data = {"train": str(tmp_path / "train.jsonl"), "validation_fraction": 0.2}
    train = {"max_steps": 3, "pack_tokens": 256, "batch_tokens": 512, "rounded_steps": 1}
    finish("run", recipe(data=data, train=train))
    (tmp_path / "train.jsonl").unlink()
    output = finish("export", tmp_path / "run", tmp_path / "out", "--seed", "3")
    assert "train.jsonl, the run's held-out data, is not there" in output
    assert "last steps were trained for {'rounding': " in output
    assert "compared" not in json.loads((tmp_path / "out/export.json").read_text())


def test_a_peers_adapter_without_a_base_is_told_to_name_one(
    adapter: Adapter, finish: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", adapter, CONFIG)
    assert "names no base; give it with --base CKPT" in finish("export", tmp_path / "adapter", tmp_path / "out", code=2)
