"""A tiny base with harmony's vocabulary, conversations, recipes over them, and a cheap way to run `gptoss-train`."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import random_tensors, tiny_config, write_tiny
from safetensors.torch import save_file

from gptoss_train import peers

ROOT = Path(__file__).resolve().parents[2]
DISTINCT_ROWS = 64


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random MXFP4 checkpoint: 1 layer of width 32 under all 201,088 tokens, which share 64 rows of the unembedding.

    The repeated rows make a training step take milliseconds; tests of the loss itself have others.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = tiny_config(num_hidden_layers=1, num_local_experts=4, head_dim=8, vocab_size=201088, **sizes)
    directory = write_tiny(tmp_path_factory.mktemp("tiny") / "base", config)
    tensors = random_tensors(config, "mxfp4")
    rows = tensors["lm_head.weight"][:DISTINCT_ROWS]
    tensors["lm_head.weight"] = rows.repeat(-(-config.vocab_size // DISTINCT_ROWS), 1)[: config.vocab_size].contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def conversation(seed: int) -> dict[str, Any]:
    """One question with reasoning and an answer, of a length that the seed decides."""
    chance = random.Random(seed)
    question = " ".join(str(chance.randrange(100)) for _ in range(chance.randint(2, 9)))
    answer = {"role": "assistant", "thinking": f"it has {len(question)} letters", "content": question[::-1]}
    return {"messages": [{"role": "user", "content": question}, answer]}


def write_lines(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> Callable[..., Path]:
    """Write a recipe over the tiny base; keyword arguments replace whole sections."""

    def write(**sections: dict[str, Any]) -> Path:
        data = write_lines(tmp_path / "train.jsonl", [conversation(seed) for seed in range(18)])
        values: dict[str, Any] = {
            "version": 1,
            "model": {"checkpoint": str(tiny_base), "dtype": "float32", "device": "cpu"},
            "lora": {"rank": 2, "alpha": 4.0},
            "data": {"train": str(data)},
            "optim": {"lr": 0.01},
            "train": {"max_steps": 4, "pack_tokens": 256, "batch_tokens": 512},
            "export": {"formats": []},
            "run": {"dir": str(tmp_path / "run")},
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(json.dumps(values | sections))  # JSON is YAML
        return path

    return write


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make packages impossible to import, installed or not, and forget which peers were found."""

    def forget() -> None:
        peers.rules.cache_clear()
        peers.transformers_decode.cache_clear()

    def hide(*packages: str) -> None:
        forget()
        loaded = {name for name in sys.modules if name.split(".")[0] in packages}
        for module in loaded | set(packages):
            monkeypatch.setitem(sys.modules, module, None)  # Python's own way to say so

    yield hide
    forget()


@dataclass(frozen=True)
class Job:
    """A command that runs in a fork."""

    server: subprocess.Popen[str]
    pid: int
    log: Path

    def wait(self) -> int:
        """Return its exit code, or minus the number of the signal that killed it."""
        return ask(self.server, {"wait": self.pid})

    @property
    def output(self) -> str:
        """What it printed so far, stdout and stderr together."""
        return self.log.read_text()


def ask(server: subprocess.Popen[str], question: dict[str, Any]) -> int:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(question) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


@pytest.fixture(scope="session")
def fork_server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield server
        assert server.stdin is not None
        server.stdin.close()


@pytest.fixture
def start(fork_server: subprocess.Popen[str], tmp_path: Path) -> Callable[..., Job]:
    """Start `gptoss-train` with some arguments; relative paths are below the checkout."""
    count = 0

    def begin(*argv: str | Path, environment: dict[str, str] | None = None, max_file_bytes: int | None = None) -> Job:
        nonlocal count
        count += 1
        job = {"argv": [str(word) for word in argv], "log": str(tmp_path / f"{count}.log")}
        settings = {"environment": environment or {}, "max_file_bytes": max_file_bytes}
        return Job(fork_server, ask(fork_server, job | settings), Path(job["log"]))

    return begin


@pytest.fixture
def finish(start: Callable[..., Job]) -> Callable[..., str]:
    """Run `gptoss-train` to its end and return what it printed; the exit code is 0 unless `code` says otherwise."""

    def run(*argv: str | Path, code: int = 0, **settings: Any) -> str:
        job = start(*argv, **settings)
        got = job.wait()
        assert got == code, f"exit code {got}\n{job.output}"
        return job.output

    return run
