"""One command from a recipe to a report, the same command again, and what a run directory refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def whole(recipe: Callable[..., Path], tmp_path: Path) -> Callable[[list[str]], Path]:
    """Write a recipe that trains 4 steps, exports and evaluates some variants on two questions."""

    def write(variants: list[str]) -> Path:
        questions = [
            {"id": str(n), "messages": [{"role": "user", "content": f"{n} 1"}], "answer": f"1 {n}"} for n in range(5)
        ]
        data = tmp_path / "exact.jsonl"
        data.write_text("".join(json.dumps(question) + "\n" for question in questions))
        evaluation = {
            "tasks": ["exact"],
            "data": {"exact": str(data)},
            "limit": 2,
            "max_tokens": 4,
            "variants": variants,
        }
        return recipe(optim={"lr": 0.1}, export={"formats": ["mxfp4", "bf16", "adapter"]}, eval=evaluation)

    return write


def results(run: Path) -> dict[str, bytes]:
    """Every file that a finished run must not touch again."""
    kept = ("adapter/", "model/", "model-bf16/", "adapter-export/", "checkpoints/", "metrics.jsonl", "evals/")
    files = (path for path in run.rglob("*") if path.is_file())
    return {name: path.read_bytes() for path in files if (name := str(path.relative_to(run))).startswith(kept)}


def assert_complete(run: Path, variants: list[str]) -> None:
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "report.html"):
        assert (run / name).stat().st_size > 0, name
    for name in ("adapter", "model", "model-bf16", "adapter-export"):
        assert (run / name / "MANIFEST.json").exists(), name
    samples = sorted((run / "evals").rglob("samples.jsonl"))
    assert len(samples) == len(variants)
    assert all(len(path.read_text().splitlines()) == 2 for path in samples)
    assert all(f"evals/{name}/" in " ".join(map(str, samples)) for name in variants)
    assert "<html" in (run / "report.html").read_text()


def test_one_command_trains_exports_evaluates_and_reports(
    whole: Callable[[list[str]], Path], tmp_path: Path, finish: Callable[..., str]
) -> None:
    output = finish("run", whole(["model"]))
    assert_complete(tmp_path / "run", ["model"])
    losses = [json.loads(line)["train/loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert f"{tmp_path / 'run/report.html'}: loss curve and comparison in one file" in output
    assert "delta kept" in output


@pytest.mark.slow
def test_the_console_command_does_it_all_and_the_same_command_again_does_nothing_twice(
    whole: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    variants = ["base", "adapter", "model"]
    command = [sys.executable, "-m", "gptoss_train", "run", str(whole(variants))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_complete(tmp_path / "run", variants)
    before = results(tmp_path / "run")
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert results(tmp_path / "run") == before
    assert "continuing" in again.stderr
    assert "exported" not in again.stderr


def test_a_finished_run_is_left_as_it_is_and_what_is_missing_is_made_again(
    recipe: Callable[..., Path], tmp_path: Path, finish: Callable[..., str]
) -> None:
    path = recipe(optim={"lr": 0.1}, export={"formats": ["mxfp4", "bf16"]})
    finish("run", path)
    before = results(tmp_path / "run")
    (tmp_path / "run/model").rename(tmp_path / "model")
    output = finish("run", path)
    assert f"exported mxfp4 to {tmp_path / 'run/model'}" in output
    assert "exported bf16" not in output
    assert results(tmp_path / "run") == before
    saved = tmp_path / "run/recipe.yaml"
    finish("run", saved)  # the resolved recipe is enough to repeat the run
    assert results(tmp_path / "run") == before


def test_another_recipe_in_the_same_directory_is_refused_and_overwrite_starts_over(
    recipe: Callable[..., Path], tmp_path: Path, finish: Callable[..., str]
) -> None:
    path, run = recipe(), tmp_path / "run"
    finish("run", path)
    before = results(run)
    output = finish("run", path, "optim.lr=0.02", "lora.rank=4", code=2)
    assert "holds a run with other values in lora, optim" in output
    assert "run.overwrite=true" in output
    assert results(run) == before
    finish("run", path, "log.project=other", "eval.limit=1")  # neither changes what was trained or exported
    assert results(run) == before
    finish("run", path, "optim.lr=0.02", "run.overwrite=true")
    assert results(run).keys() == before.keys()
    assert results(run)["adapter/adapter_model.safetensors"] != before["adapter/adapter_model.safetensors"]


def test_run_resume_never_and_must_mean_what_they_say(
    recipe: Callable[..., Path], tmp_path: Path, finish: Callable[..., str]
) -> None:
    path, run = recipe(), tmp_path / "run"
    assert "run.resume is must, but" in finish("run", path, "run.resume=must", code=2)
    assert not run.exists()
    finish("run", path, "run.resume=never")
    before = results(run)
    assert "run.resume is never" in finish("run", path, "run.resume=never", code=2)
    finish("run", path, "run.resume=must")
    output = finish("run", path, "run.resume=must", "run.overwrite=true", code=2)
    assert "would delete what run.resume=must continues" in output
    assert results(run) == before


@pytest.mark.parametrize("names", [["notes.txt"], ["recipe.yaml", "precious.txt"], ["recipe.yaml"]])
@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_a_directory_that_is_no_run_is_left_untouched(
    recipe: Callable[..., Path], tmp_path: Path, finish: Callable[..., str], names: list[str], overwrite: str
) -> None:
    path = recipe()
    (tmp_path / "run").mkdir()
    for name in names:
        (tmp_path / "run" / name).write_text("mine")
    output = finish("run", path, f"run.overwrite={overwrite}", code=2)
    assert "exists and is no run directory" in output
    assert {p.name: p.read_text() for p in (tmp_path / "run").iterdir()} == dict.fromkeys(names, "mine")


def test_a_run_that_died_while_its_directory_was_made_starts_again(
    recipe: Callable[..., Path], tmp_path: Path, finish: Callable[..., str]
) -> None:
    path = recipe()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/environment.json").write_text("{}")
    (tmp_path / "run/.recipe.yaml.tmp").write_text("version")
    finish("run", path)
    assert (tmp_path / "run/adapter").exists()


def test_a_tracker_that_dies_costs_a_line_and_not_the_run(
    recipe: Callable[..., Path], tmp_path: Path, finish: Callable[..., str]
) -> None:
    path = recipe(log={"trackers": ["tensorboard"]})
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tensorboard.py").write_text("raise RuntimeError('no dashboard today')\n")
    output = finish("run", path, environment={"PYTHONPATH": f"{broken}:{ROOT}"})
    assert "tracker tensorboard failed: RuntimeError: no dashboard today. Training is not affected" in output
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "run/adapter").exists()


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("data.train=nowhere.jsonl", 4, "data file nowhere.jsonl cannot be read"),
        ("model.checkpoint=/nowhere", 2, "checkpoint '/nowhere' is neither a directory nor a hub id"),
        ("lora.layers=[7]", 2, "The model has 1 layers (0..0)"),
        ("optim.lr=fast", 2, "optim.lr"),
        ("model.device=cuda", 3, "sees no CUDA device; use model.device=cpu"),
    ],
)
def test_what_cannot_be_run_ends_in_one_message_and_its_exit_code(
    recipe: Callable[..., Path], finish: Callable[..., str], override: str, code: int, message: str
) -> None:
    import torch

    if code == 3 and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    output = finish("run", recipe(), override, code=code)
    assert message in output
    assert "Traceback" not in output


def test_a_bad_line_ends_the_run_with_its_file_and_number_and_exit_4(
    recipe: Callable[..., Path], tmp_path: Path, finish: Callable[..., str]
) -> None:
    path = recipe()
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("{not json}\n")
    assert f"{tmp_path / 'train.jsonl'}:19: the line is not JSON" in finish("run", path, code=4)
    output = finish("run", path, "data.on_bad_line=skip", "run.overwrite=true")
    assert "1 bad lines skipped" in output


def test_a_run_that_changes_nothing_refuses_its_export_and_keeps_the_adapter(
    recipe: Callable[..., Path], tmp_path: Path, finish: Callable[..., str]
) -> None:
    sections: dict[str, Any] = {"lora": {"rank": 2, "attention": []}, "optim": {"lr": 1e-9}}
    path = recipe(**sections, export={"formats": ["mxfp4"], "rounding": "nearest"})
    assert "rounding to nearest lost every delta" in finish("run", path, code=4)
    assert (tmp_path / "run/adapter").exists()
    assert not (tmp_path / "run/model").exists()
