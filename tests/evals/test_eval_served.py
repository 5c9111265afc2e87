"""`gptoss-eval run URL --model NAME`: a server is evaluated as our engine is, and its failures are no wrong answers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from openai_server import Behaviour, body, hang, serving, status

from evals.__main__ import main
from evals.records import Record, read_records
from gptoss_infer import client
from gptoss_infer.engine import Engine
from gptoss_infer.errors import run_command

REPOSITORY = Path(__file__).parents[2]


class Served:
    """A server, what it does, and evaluations of it."""

    def __init__(self, url: str, does: Behaviour) -> None:
        self.url, self.does = url, does

    def run(self, out: Path, *options: str) -> int:
        arguments = ["run", self.url, "--model", "tiny", "--tasks", "addition", "--limit", "6", "--out", str(out)]
        return run_command(main, [*arguments, "--max-tokens", "40", "--batch", "3", *options])


@pytest.fixture
def served(speaker_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start a server that behaves so."""
    monkeypatch.setattr(client.random, "uniform", lambda *_: 0.01)  # between tries
    with ExitStack() as stack:

        def start(**does: Any) -> Served:
            behaviour = Behaviour(**does)
            return Served(stack.enter_context(serving(speaker_engine, behaviour)), behaviour)

        yield start


def in_order(out: Path) -> list[Record]:
    return sorted(read_records(out).values(), key=lambda record: record.sample_id)


def test_raw_mode_gives_the_records_of_our_own_engine(served: Any, speaker: Path, tmp_path: Path) -> None:
    assert served().run(tmp_path / "served") == 0
    options = ("--tasks", "addition", "--limit", "6", "--max-tokens", "40", "--device", "cpu", "--dtype", "float32")
    assert run_command(main, ["run", str(speaker), "--out", str(tmp_path / "own"), *options]) == 0
    assert in_order(tmp_path / "served") == in_order(tmp_path / "own")


def test_run_json_says_which_server_was_asked_how_and_holds_no_key(
    served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    server = served(key="sk-secret")
    assert server.run(tmp_path / "out", "--api-key-env", "MY_KEY") == 0
    described = json.loads((tmp_path / "out" / "run.json").read_text())
    assert described["target"] == {
        "given": server.url, "variant": "served", "server": server.url, "model": "tiny", "mode": "raw", "tokens": "ids",
    }  # fmt: skip
    assert described["settings"]["dtype"] == "served"
    told = capsys.readouterr()
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert "sk-secret" not in written + told.out + told.err
    assert f"tiny at {server.url}, raw mode: prompts go as token ids" in told.err


def test_chat_mode_sends_the_questions_and_counts_as_the_server_does(served: Any, tmp_path: Path) -> None:
    server = served(completions=False, date="2024-02-29")
    assert server.run(tmp_path / "raw-is-gone", "--mode", "chat", "--effort", "high") == 0
    sent = [request for path, request in server.does.requests if request["max_tokens"] == 40]
    assert {request["reasoning_effort"] for request in sent} == {"high"}
    records = in_order(tmp_path / "raw-is-gone")
    assert sorted(request["messages"][0]["content"] for request in sent) == [r.prompt[0]["content"] for r in records]
    assert sorted(request["seed"] for request in sent) == sorted(record.seed for record in records)
    assert {record.prompt_tokens for record in records} == {70}, "59 of ours, and the server's line with a date"
    assert {record.well_formed for record in records} == {None}
    scores = json.loads((tmp_path / "raw-is-gone" / "scores.json").read_text())["scores"]
    assert (scores[0]["n_scored"], scores[0]["format_validity"]) == (6, None)


def test_a_request_that_fails_is_an_infra_error_of_its_sample_alone_and_is_asked_again(
    served: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, out = served(), tmp_path / "out"
    assert server.run(tmp_path / "dry") == 0
    discovery = len(server.does.requests) - 6
    server.does.faults = [lambda _: True] * discovery + [status(400), body({"error": {"message": "HarmonyError"}})]
    server.does.requests.clear()
    assert server.run(out) == 1
    failed = [record for record in in_order(out) if record.outcome == "infra_error"]
    assert len(failed) == 2
    assert {"fault 400" in str(record.error) for record in failed} == {True, False}
    assert all(str(record.error).startswith("ServerError: ") for record in failed)
    assert len(server.does.requests) == discovery + 6, "the others are not asked again one at a time"
    assert "2 of 6 samples ended in infra_error" in capsys.readouterr().err

    server.does.requests.clear()
    assert server.run(out) == 0
    assert len(server.does.requests) == discovery + 2
    assert in_order(out) == in_order(tmp_path / "dry")


def test_a_directory_is_not_continued_in_another_mode_or_by_another_model(
    served: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, out = served(), tmp_path / "out"
    assert server.run(out) == 0
    before = (out / "samples.jsonl").read_bytes()
    assert server.run(out, "--mode", "chat") == 2
    assert "mode: 'raw' there, 'chat' here" in capsys.readouterr().err
    assert server.run(out, "--model", "other") == 2
    assert "model: 'tiny' there, 'other' here" in capsys.readouterr().err
    assert (out / "samples.jsonl").read_bytes() == before


def test_a_server_is_compared_with_our_engine_and_the_comparison_says_so(
    served: Any, speaker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = served()
    assert server.run(tmp_path / "served") == 0
    options = ("--tasks", "addition", "--limit", "6", "--max-tokens", "40", "--device", "cpu", "--dtype", "float32")
    assert run_command(main, ["run", str(speaker), "--out", str(tmp_path / "own"), *options]) == 0
    capsys.readouterr()
    assert run_command(main, ["compare", str(tmp_path / "own"), str(tmp_path / "served"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["notes"] == [f"note: B was asked in raw mode at {server.url}."]
    assert result["comparisons"][0]["difference"] == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--variant", "base"], 2, "go with checkpoints"),
        (["--adapter", "x"], 2, "go with checkpoints"),
        (["--dtype", "float32"], 2, "go with checkpoints"),
        (["--device", "cpu"], 2, "go with checkpoints"),
        (["--mode", "chat", "--date", "2025-06-28"], 2, "cannot be told in chat mode"),
        (["--mode", "chat", "--header", "<|channel|>"], 2, "cannot be told in chat mode"),
        (["--api-key-env", "NOT_SET_ANYWHERE"], 2, "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_options_that_do_not_go_with_a_server_are_refused_before_anything_is_written(
    served: Any, tmp_path: Path, options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert served().run(tmp_path / "out", *options) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["http://127.0.0.1:9/v1"], 2, "needs --model NAME"),
        (["http://me:secret@127.0.0.1:9/v1", "--model", "m"], 2, "through an environment variable"),
        (["http://127.0.0.1:9/v1", "--model", "m"], 3, "is the server up?"),
        ([".", "--model", "m"], 2, "go with a server's URL"),
        ([".", "--mode", "raw"], 2, "go with a server's URL"),
    ],
)
def test_a_target_that_cannot_be_asked_ends_with_its_exit_code(
    argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.random, "uniform", lambda *_: 0.0)
    assert run_command(main, ["run", *argv, "--tasks", "addition"]) == code
    err = capsys.readouterr().err
    assert message in err
    assert "secret" not in err


def test_sigterm_ends_a_run_at_once_though_the_server_is_silent_and_what_is_done_stays(
    served: Any, tmp_path: Path
) -> None:
    server, out = served(), tmp_path / "out"
    server.does.faults = [lambda _: True] * 2 + [hang(60)] * 2  # what `connect` asks, then the first two questions
    command = [sys.executable, "-m", "evals", "run", server.url, "--model", "tiny", "--tasks", "addition"]
    command += ["--limit", "6", "--out", str(out), "--max-tokens", "40", "--batch", "3"]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(read_records(out)) < 4 and process.poll() is None:
            time.sleep(0.02)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        told = process.communicate()[1].decode()
    assert process.returncode == 143
    assert time.monotonic() - begin < 30
    assert "the same command goes on from there" in told
    assert "Traceback" not in told
    assert len(read_records(out)) == 4
