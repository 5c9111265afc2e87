"""A killed run that is started again is bitwise the run that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

# Everything that could remember something: dropout, small last batches, accumulation, validation, Adam's moments.
SETTINGS: dict[str, Any] = {
    "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.2},
    "optim": {"lr": 0.01, "warmup_steps": 5, "weight_decay": 0.01},
    "checkpoint": {"every_steps": 4, "keep": 2},
}


# Every lever that moves memory or work elsewhere.
LEVERS = {
    "none": [],
    "experts": ["train.recompute=experts", "checkpoint.background=true"],
    "layers": [
        "train.recompute=layers", "train.offload=true", "train.deterministic=true", "model.embedding=host",
        "checkpoint.background=true", "lora.router=true", "optim.lora_plus_ratio=4",
    ],
}  # fmt: skip


@pytest.fixture
def run_recipe(recipe: Callable[..., Path], tmp_path: Path) -> Callable[[int], Path]:
    def write(steps: int) -> Path:
        data = {"train": str(tmp_path / "train.jsonl"), "validation_fraction": 0.2}
        train = {"max_steps": steps, "pack_tokens": 256, "batch_tokens": 768, "eval_every": 6}
        return recipe(**SETTINGS, data=data, train=train)

    return write


def curves(run: Path) -> list[dict[str, float]]:
    """All records but what a clock decides; JSON carries floats bit for bit."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    machine = ("time", "train/tokens_per_s", "train/tflops", "train/peak_memory_gb")
    return [{k: v for k, v in record.items() if k not in machine} for record in records]


def wait_for_step(run: Path, step: int, job: Any) -> None:
    """Return once `step` is on record; fails if the run ends before."""
    log, deadline = run / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline:
        if log.exists() and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(f"no step {step} within a minute:\n{job.output}")


def assert_equal_runs(run: Path, undisturbed: Path, steps: int) -> None:
    assert curves(run) == curves(undisturbed)
    assert sum("train/loss" in record for record in curves(run)) == steps
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run / "adapter" / name).read_bytes() == (undisturbed / "adapter" / name).read_bytes()
    last = f"checkpoints/step-{steps:06d}/state.safetensors"
    assert (run / last).read_bytes() == (undisturbed / last).read_bytes()
    leftovers = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not leftovers


def kill_at(
    steps: list[int], total: int, recipe: Path, tmp_path: Path, start: Any, finish: Any, levers: Sequence[str] = ()
) -> None:
    finish("run", recipe, f"run.dir={tmp_path / 'undisturbed'}", *levers)
    run, chance = tmp_path / "killed", random.Random(0)
    for step in steps:
        job = start("run", recipe, f"run.dir={run}", *levers)
        wait_for_step(run, step, job)
        time.sleep(chance.uniform(0, 0.02))  # anywhere in the next steps: in a forward pass, in a save
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL, job.output
        assert not (run / "adapter").exists()
    output = finish("run", recipe, f"run.dir={run}", *levers)
    assert "resuming from step" in output
    assert_equal_runs(run, tmp_path / "undisturbed", total)


@pytest.mark.parametrize("levers", LEVERS)
def test_a_run_killed_once_and_resumed_is_bitwise_the_undisturbed_one(
    run_recipe: Any, tmp_path: Path, start: Any, finish: Any, levers: str
) -> None:
    kill_at([9], 20, run_recipe(20), tmp_path, start, finish, LEVERS[levers])


@pytest.mark.slow
def test_a_run_killed_at_ten_random_moments_is_bitwise_the_undisturbed_one(
    run_recipe: Any, tmp_path: Path, start: Any, finish: Any
) -> None:
    moments = sorted(random.Random(1).sample(range(1, 190), 10))
    kill_at(moments, 200, run_recipe(200), tmp_path, start, finish)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_in_progress_and_the_run_goes_on_from_there(
    run_recipe: Any, tmp_path: Path, start: Any, finish: Any, signum: signal.Signals, code: int
) -> None:
    recipe, run = run_recipe(30), tmp_path / "run"
    job = start("run", recipe, "checkpoint.every_steps=0")
    wait_for_step(run, 5, job)
    os.kill(job.pid, signum)
    assert job.wait() == code, job.output
    assert "saving after this step" in job.output
    assert "Traceback" not in job.output
    (saved,) = (run / "checkpoints").iterdir()
    assert saved.name == f"step-{curves(run)[-1]['step']:06d}"
    assert f"resuming from step {int(saved.name[5:])} of 30" in finish("run", recipe, "checkpoint.every_steps=0")
    finish("run", recipe, f"run.dir={tmp_path / 'undisturbed'}", "checkpoint.every_steps=0")
    assert_equal_runs(run, tmp_path / "undisturbed", 30)


def test_a_disk_that_fills_up_in_a_checkpoint_exits_3_and_with_room_the_run_goes_on(
    run_recipe: Any, tmp_path: Path, finish: Any
) -> None:
    recipe, run = run_recipe(12), tmp_path / "run"
    finish("run", recipe, f"run.dir={tmp_path / 'undisturbed'}")
    state = tmp_path / "undisturbed/checkpoints/step-000012/state.safetensors"
    output = finish("run", recipe, code=3, max_file_bytes=state.stat().st_size // 2)
    assert "no space left" in output
    assert "Traceback" not in output
    assert list((run / "checkpoints").iterdir()) == []
    finish("run", recipe)
    assert_equal_runs(run, tmp_path / "undisturbed", 12)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_continues(
    run_recipe: Any, tmp_path: Path, start: Any, finish: Any
) -> None:
    recipe, run = run_recipe(12), tmp_path / "run"
    finish("run", recipe)
    finish("run", recipe, f"run.dir={tmp_path / 'undisturbed'}")
    (run / "adapter").rename(tmp_path / "adapter")  # as if the run had died before writing it
    tensors = run / "checkpoints/step-000012/state.safetensors"
    damaged = bytearray(tensors.read_bytes())
    damaged[-1] ^= 1
    tensors.write_bytes(damaged)
    output = finish("run", recipe)
    assert "checkpoint skipped" in output
    assert "state.safetensors has sha256" in output
    assert "resuming from step 8 of 12" in output
    assert_equal_runs(run, tmp_path / "undisturbed", 12)


def test_checkpoints_of_other_data_are_refused_with_exit_2(run_recipe: Any, tmp_path: Path, finish: Any) -> None:
    recipe, run = run_recipe(8), tmp_path / "run"
    finish("run", recipe)
    (run / "adapter").rename(tmp_path / "adapter")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write((tmp_path / "train.jsonl").read_text().partition("\n")[0] + "\n")
    output = finish("run", recipe, code=2)
    assert "step-000008 was written with other data, another base or other settings" in output
    assert "run.overwrite=true" in output
