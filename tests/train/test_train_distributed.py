"""Two processes, or smaller packs, do the step that one process does: the batch is the same, and so is its loss."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

STEPS = 6
# Sums of the same fp32 terms in another order differ by about 1e-7 of their size a step. Adam's step lr m / (sqrt(v) +
# eps) magnifies that without bound where a gradient is near 0, unless eps is above such gradients: hence the large one.
OPTIM = {"lr": 0.05, "eps": 0.01, "max_grad_norm": 0.5}
TOLERANCE = 1e-5
# What the machine decides, and what packs of another size change.
NOT_COMPARED = {
    "time", "train/tokens_per_s", "train/tflops", "train/peak_memory_gb",
    "train/padding_share", "moe/clamped_share", "val/router_drift",
}  # fmt: skip


@pytest.fixture
def write(recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def write(pack_tokens: int, packs: int) -> Path:
        tokens = {"pack_tokens": pack_tokens, "batch_tokens": packs * pack_tokens}
        train = {"max_steps": STEPS, "eval_every": 3} | tokens
        data = {"train": str(tmp_path / "train.jsonl"), "validation_fraction": 0.2}
        return recipe(data=data, optim=OPTIM, train=train)

    return write


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_two(start: Any, recipe: Path, run: Path) -> None:
    """Run as two processes with the variables that `accelerate launch` sets."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    jobs = []
    for rank in ("0", "1"):
        environment = common | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"}
        jobs.append(start("run", recipe, f"run.dir={run}", environment=environment))
    codes = [job.wait() for job in jobs]
    assert codes == [0, 0], "\n".join(job.output for job in jobs)


def records(run: Path) -> list[dict[str, float]]:
    """All records but what clock, memory and the filling of packs decide."""
    parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in NOT_COMPARED} for record in parsed]


def assert_close_runs(run: Path, expected: Path) -> None:
    for got, want in zip(records(run), records(expected), strict=True):
        assert got == pytest.approx(want, rel=TOLERANCE)
    factors = load_file(run / "adapter/adapter_model.safetensors")
    wanted = load_file(expected / "adapter/adapter_model.safetensors")
    assert factors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.abs().max() > 0, f"{name} was not trained"
        assert (factors[name] - tensor).abs().max() <= TOLERANCE * tensor.abs().max(), name


def test_two_processes_give_the_losses_and_factors_of_one(
    write: Callable[..., Path], tmp_path: Path, start: Any, finish: Any
) -> None:
    # Steps of 3 packs, of different lengths: rank 0 has two of them, rank 1 one.
    finish("run", write(256, 3), f"run.dir={tmp_path / 'one'}")
    run_two(start, write(256, 3), tmp_path / "two")
    assert_close_runs(tmp_path / "two", tmp_path / "one")


def test_accumulating_over_small_packs_gives_the_step_of_one_large_pack(
    write: Callable[..., Path], tmp_path: Path, finish: Any
) -> None:
    # Every step is the whole data.
    finish("run", write(4096, 1), f"run.dir={tmp_path / 'whole'}")
    finish("run", write(256, 16), f"run.dir={tmp_path / 'parts'}")
    assert_close_runs(tmp_path / "parts", tmp_path / "whole")


def test_a_process_without_a_pack_in_a_small_batch_takes_part_in_the_step(
    write: Callable[..., Path], tmp_path: Path, start: Any, finish: Any
) -> None:
    # Every step is one pack, which rank 0 takes.
    finish("run", write(512, 1), f"run.dir={tmp_path / 'one'}")
    run_two(start, write(512, 1), tmp_path / "two")
    assert_close_runs(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_accelerate_launch_with_two_processes_gives_the_losses_and_factors_of_one(
    write: Callable[..., Path], tmp_path: Path, finish: Any
) -> None:
    finish("run", write(256, 3), f"run.dir={tmp_path / 'one'}")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    command = [*launch, "-m", "gptoss_train", "run", str(write(256, 3)), f"run.dir={tmp_path / 'two'}"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_close_runs(tmp_path / "two", tmp_path / "one")
