"""`gptoss-infer bench --kernels` on a CPU: every kernel of a step is there, and its counts are those of the shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import tiny_config, write_tiny

from gptoss_infer import kernels
from gptoss_infer.__main__ import main
from gptoss_infer.errors import run_command

KERNELS = [
    "rms_norm", "q, k, v", "attention, full", "attention, window", "o", "router", "experts", "unembedding",
    "likeliest token",
]  # fmt: skip

if kernels.cpu_kernels() is None:
    pytest.skip("no compiled kernels here; the line above says why", allow_module_level=True)


def test_every_kernel_of_a_step_is_timed_at_every_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config()
    directory = write_tiny(tmp_path / "base", config)
    options = ["--kernels", "--device", "cpu", "--batch", "1,3", "--prompt", "40", "--rounds", "1", "--json"]
    assert run_command(main, ["bench", str(directory), *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["tokens"], row["kernel"]) for row in rows] == [(n, name) for n in (1, 3) for name in KERNELS]
    by_name = {(row["kernel"], row["tokens"]): row for row in rows}
    head = by_name["unembedding", 3]
    seconds = head["us"] / 1e6
    flops = 2 * 3 * config.vocab_size * config.hidden_size
    assert head["gflops"] * 1e9 * seconds == pytest.approx(flops, rel=0.05)
    moved = config.vocab_size * config.hidden_size * 2
    assert head["gb_per_s"] * 1e9 * seconds == pytest.approx(moved, rel=0.05)


def test_what_makes_no_sense_with_kernels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_tiny(tmp_path / "base", tiny_config())
    assert run_command(main, ["bench", str(directory), "--kernels", "--experts", "bf16", "--device", "cpu"]) == 2
    assert "--adapter and --experts go with whole models" in capsys.readouterr().err
