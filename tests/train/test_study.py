"""`gptoss-train study`: what it measures in memory is what an export writes, and a stopped study goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import slow_decode

from evals.exports import read_study
from gptoss_infer import mxfp4, rounding
from gptoss_infer.adapter import write_adapter
from gptoss_infer.checkpoint import Checkpoint
from gptoss_infer.errors import UsageError
from gptoss_infer.rounding import Rounding
from gptoss_train import peers
from gptoss_train import study as module
from gptoss_train.calibration import collect
from gptoss_train.data import load_dataset
from gptoss_train.export import Rule, export
from gptoss_train.measure import Reference, Runtime
from gptoss_train.recipe import Data, Recipe
from gptoss_train.study import Grid, read_cells, study, summarize


@pytest.fixture
def data(recipe: Callable[..., Path], tmp_path: Path) -> Path:
    recipe()
    return tmp_path / "train.jsonl"


@pytest.fixture
def grid(tiny_base: Path, data: Path) -> Grid:
    tasks = {"copy": (str(data), str(data))}
    return Grid(str(tiny_base), tasks, str(data), (0.01,), 1, 2, 3, 1, 256, 2, "float32", "cpu")


@pytest.mark.parametrize("rule", ["nearest", "stochastic", "systematic"])
def test_what_is_measured_in_memory_is_what_the_export_on_disk_gives(
    rule: Rounding, grid: Grid, data: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(grid.checkpoint)
    dataset = load_dataset(data, Data(train="given"))
    trainer = module._trainer(grid, checkpoint, dataset, grid.recipe(0.01, 0, 3))
    module._do_steps(trainer)
    adapter = module._adapter(trainer)
    reference = Reference.of(checkpoint, adapter, {"task": dataset.samples}, Runtime("cpu", 256))
    calibration = collect(trainer.model, dataset.samples, 256, 10**6)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", adapter, checkpoint.config)
    written = export(
        tmp_path / "adapter", grid.checkpoint, tmp_path / "out", rule=Rule(rule, 1, calibration), reference=reference
    ).measured
    assert written is not None
    with module._written(trainer, rule, 1, calibration):
        in_memory = reference.measure(trainer.model)
    assert in_memory["task"]["export"]["loss"] == pytest.approx(written["task"]["export"]["loss"], rel=1e-6)
    again = reference.measure(trainer.model)
    assert again["task"]["export"]["loss"] == pytest.approx(again["task"]["merge"]["loss"], rel=1e-6), "all restored"


def test_the_model_computes_with_what_a_peer_makes_of_the_merged_weights(grid: Grid, data: Path) -> None:
    for package in ("torchao", "modelopt"):
        pytest.importorskip(
            package, reason="oracle: needs the environment that gptoss_train/peers.py tells how to make"
        )
    dataset = load_dataset(data, Data(train="given"))
    trainer = module._trainer(grid, Checkpoint.open(grid.checkpoint), dataset, grid.recipe(0.01, 0, 3))
    module._do_steps(trainer)
    adapter = module._adapter(trainer)
    for name, rule in peers.rules().items():
        bases = [layer.base_layer.scales for _, layer in module._experts(trainer)]
        with module._written(trainer, name, 0, None):
            for (target, layer), scales in zip(module._experts(trainer), bases, strict=True):
                for expert in range(layer.base_layer.num_experts):
                    base = mxfp4.decode(layer.base_layer.blocks[expert], scales[expert], torch.float32)
                    merged = (base + adapter.delta(target, expert)).bfloat16()
                    assert layer.rounded is not None
                    written = slow_decode(layer.rounded[expert], layer.base_layer.scales[expert])
                    assert torch.equal(written, rule.dequantize(rule.quantize(merged))), (name, target, expert)


def test_a_study_measures_every_method_and_goes_on_where_it_stopped(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study"
    first = study(grid, out)
    methods = {row["method"]: row for row in first["rows"]}
    assert {"merge", "nearest", "stochastic", "stochastic+bias", "systematic", "control", "trained"} <= methods.keys()
    assert set(peers.rules()) <= methods.keys(), "each peer that is here"
    assert methods["merge"]["kept"]["mean"] == pytest.approx(1)
    (cell,) = read_cells(out)
    assert sum(result["method"] == "stochastic" for result in cell["results"]) == grid.draws
    losses = [r["task"]["export"]["loss"] for r in cell["results"] if r["method"] in ("merge", "stochastic")]
    assert len(set(losses)) == 3, "each draw is another"
    more = study(replace(grid, seeds=2), out)
    assert len(read_cells(out)) == 2
    assert read_cells(out)[0] == cell, "what was done is not done again"
    assert all(row["cells"] == 2 for row in more["rows"])
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(more))
    shown = read_study(out)
    assert [len(chart.rows) for chart in shown.charts] == [len(methods) - 1] * 2, "all but the merge"
    for other in ({"steps": 4}, {"tasks": {"copy": ("other.jsonl", "other.jsonl")}}):
        with pytest.raises(UsageError, match="holds a study with other settings"):
            study(replace(grid, **other), out)  # type: ignore[arg-type]


def test_a_cell_that_a_kill_cut_short_is_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cells.jsonl").write_text('{"task": "whole"}\n{"task": "cu')
    assert read_cells(tmp_path) == [{"task": "whole"}]
    assert "was cut short: it will be done again" in capsys.readouterr().err
    assert (tmp_path / "cells.jsonl").read_text() == '{"task": "whole"}\n'


def test_a_recipe_rounds_as_the_study_found_best() -> None:
    assert Recipe.model_fields["export"].default.rounding == rounding.DEFAULT == Rule().rounding


def result(method: str, task: float, unrelated: float) -> dict[str, object]:
    """What a cell holds of a method: the base's loss is 3, the merge's 1."""
    base, merge = {"loss": 3.0}, {"loss": 1.0}
    return {
        "method": method, "draw": 0,
        "task": {"base": base, "merge": merge, "export": {"loss": task, "exact": 0.5}, "compared": {"gain": 2.0}},
        "unrelated": {"base": base, "export": {"loss": unrelated, "exact": 0.5}},
    }  # fmt: skip


def test_a_method_that_some_cells_lack_is_averaged_over_the_others() -> None:
    cell = {"task": "t", "rate": 1e-3, "seed": 0, "seconds": 1.0, "delta_to_base": 0.01}
    without = cell | {"results": [result("merge", 1.0, 2.0)]}
    rows = summarize([without, cell | {"results": [result("merge", 1.0, 2.0), result("modelopt", 2.0, 2.0)]}])["rows"]
    assert {row["method"]: row["cells"] for row in rows} == {"merge": 2, "modelopt": 1}
    assert {row["method"]: row["kept"]["mean"] for row in rows} == {"merge": 1.0, "modelopt": 0.5}


def test_kept_is_the_share_of_the_gain_and_trained_is_held_against_its_control() -> None:
    results = [
        result("merge", 1.0, 2.0), result("stochastic", 1.1, 2.01), result("stochastic", 1.3, 2.03),
        result("control", 0.5, 2.2), result("trained", 1.0, 2.5),
    ]  # fmt: skip
    cell = {"task": "t", "rate": 1e-3, "seed": 0, "seconds": 1.0, "delta_to_base": 0.01, "results": results}
    rows = {row["method"]: row for row in summarize([cell])["rows"]}
    assert rows["stochastic"]["kept"]["mean"] == pytest.approx((0.95 + 0.85) / 2)
    assert rows["stochastic"]["unrelated_increase"]["mean"] == pytest.approx(0.02)
    assert rows["trained"]["kept"]["mean"] == pytest.approx(2.0 / 2.5)
    assert rows["trained"]["unrelated_increase"]["mean"] == pytest.approx(0.3)


def test_the_command_says_what_a_task_must_look_like(finish: Callable[..., str], tmp_path: Path) -> None:
    assert "expected NAME=TRAIN.jsonl,HELDOUT.jsonl" in finish("study", tmp_path / "s", "--task", "x=one", code=2)
    assert "expected numbers such as" in finish("study", tmp_path / "s", "--rates", "fast", code=2)


@pytest.mark.parametrize("argv", [(), ("out", "--threads", "2"), ("out", "--speed"), ("--speed", "--rounds", "0")])
def test_the_command_needs_either_a_directory_or_to_time(argv: Sequence[str], finish: Callable[..., str]) -> None:
    assert "--speed" in finish("study", *argv, code=2)
