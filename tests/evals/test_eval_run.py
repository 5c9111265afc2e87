"""`gptoss-eval run`: records, resuming, failures of the engine, targets; with the real engine where it matters."""

from __future__ import annotations

import gc
import json
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import gptoss_infer as gi
from evals.__main__ import main
from evals.records import appending, read_records
from evals.target import fingerprint, resolve
from gptoss_infer.engine import Completion
from gptoss_infer.errors import DataError, UsageError, run_command
from gptoss_infer.harmony.vocabulary import encoding

REPOSITORY = Path(__file__).parents[2]


def right(prompt: str) -> str:
    """The harmony answer to the sum in a prompt."""
    a, b = re.findall(r"user<\|message\|>(\d+)\+(\d+)<", prompt)[0]
    return f"<|channel|>final<|message|>{int(a) + int(b)}<|return|>"


def run(checkpoint: Path, out: Path, *options: str) -> int:
    arguments = ["run", str(checkpoint), "--tasks", "addition", "--out", str(out), "--limit", "6", *options]
    return run_command(main, arguments)


def outcomes(directory: Path) -> list[str]:
    return [record.outcome.value for record in read_records(directory).values()]


def test_a_run_writes_records_settings_and_scores(
    tiny_checkpoint: Path, tmp_path: Path, fake_engine: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = fake_engine(right)
    out = tmp_path / "out"
    assert run(tiny_checkpoint, out, "--effort", "high,low", "--epochs", "2", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["directory"] == str(out)
    assert json.loads((out / "scores.json").read_text())["scores"] == result["scores"]
    assert [(score["effort"], score["n_scored"], score["accuracy"]) for score in result["scores"]] == [
        ("low", 12, 1.0),
        ("high", 12, 1.0),
    ]
    assert result["scores"][0]["outcomes"]["correct"] == 12
    assert result["scores"][0]["format_validity"] == 1.0
    described = json.loads((out / "run.json").read_text())
    assert described["settings"]["efforts"] == ["low", "high"]
    assert described["target"]["checkpoint_sha256"] == fingerprint(tiny_checkpoint)
    assert len(engine.prompts) == 24
    assert sum("Reasoning: high" in prompt for prompt in engine.prompts) == 12


def test_epochs_draw_differently_and_checkpoints_alike(
    tiny_checkpoint: Path, tmp_path: Path, fake_engine: Callable
) -> None:
    engine = fake_engine(right)
    run(tiny_checkpoint, tmp_path / "a", "--epochs", "2")
    seeds = [one.seed for one in engine.params]
    assert len(set(seeds)) == 12
    again = fake_engine(right)
    run(tiny_checkpoint, tmp_path / "b", "--epochs", "2", "--batch", "1")
    assert [one.seed for one in again.params] == seeds


def test_the_table_shows_every_task_with_interval_and_outcomes(
    tiny_checkpoint: Path, tmp_path: Path, fake_engine: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_engine(lambda prompt: "<|channel|>final<|message|>1<|return|>" if "+1" in prompt else right(prompt))
    run(tiny_checkpoint, tmp_path / "out")
    table = capsys.readouterr().out
    assert re.search(r"out +addition +medium +6 +\d+\.\d% +\d+\.\d to \d+\.\d +100\.0% +", table)
    assert "correct" in table


def test_an_engine_that_raises_is_no_wrong_answer_and_is_asked_again(
    tiny_checkpoint: Path, tmp_path: Path, fake_engine: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    engine = fake_engine(lambda prompt: RuntimeError("out of memory") if prompt == bad else right(prompt))
    bad = ""
    run(tiny_checkpoint, tmp_path / "dry")
    bad, asked = engine.prompts[3], len(engine.prompts)
    capsys.readouterr()

    assert run(tiny_checkpoint, out, "--json") == 1
    captured = capsys.readouterr()
    score = json.loads(captured.out)["scores"][0]
    assert (score["n_scored"], score["accuracy"], score["outcomes"]["infra_error"]) == (5, 1.0, 1)
    assert not score["is_complete"]
    assert "1 of 6 samples ended in infra_error, the first with: RuntimeError: out of memory" in captured.err
    assert outcomes(out).count("infra_error") == 1
    assert asked == 6

    engine = fake_engine(right)
    assert run(tiny_checkpoint, out) == 0
    assert engine.prompts == [bad]
    assert outcomes(out) == ["correct"] * 6


def test_a_finished_directory_is_not_asked_again(
    tiny_checkpoint: Path, tmp_path: Path, fake_engine: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_engine(right)
    run(tiny_checkpoint, tmp_path / "out")
    engine = fake_engine(lambda _: AssertionError("the engine was asked"))
    assert run(tiny_checkpoint, tmp_path / "out") == 0
    assert engine.prompts == []
    assert "6 of 6 samples are done" in capsys.readouterr().err


def test_other_settings_are_refused_and_nothing_is_lost(
    tiny_checkpoint: Path, tmp_path: Path, fake_engine: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_engine(right)
    out = tmp_path / "out"
    run(tiny_checkpoint, out)
    before = (out / "samples.jsonl").read_bytes()
    assert run(tiny_checkpoint, out, "--max-tokens", "7") == 2
    assert "max_tokens: 4096 there, 7 here" in capsys.readouterr().err
    assert (out / "samples.jsonl").read_bytes() == before
    assert run(tiny_checkpoint, out, "--max-tokens", "7", "--overwrite") == 0
    assert json.loads((out / "run.json").read_text())["settings"]["max_tokens"] == 7


def test_another_checkpoint_of_the_same_shape_is_not_mixed_in(
    tiny_checkpoint: Path, tmp_path: Path, fake_engine: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_engine(right)
    run(tiny_checkpoint, tmp_path / "out")
    weights = tiny_checkpoint / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert run(tiny_checkpoint, tmp_path / "out") == 2
    assert "checkpoint_sha256" in capsys.readouterr().err


def test_a_directory_with_other_files_is_left_alone(
    tiny_checkpoint: Path, tmp_path: Path, fake_engine: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_engine(right)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("ten years")
    assert run(tiny_checkpoint, tmp_path / "out", "--overwrite") == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.txt").read_text() == "ten years"


def test_a_second_process_on_the_same_directory_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, fake_engine: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    fake_engine(lambda _: RuntimeError("down"))
    run(tiny_checkpoint, out)
    fake_engine(right)
    with appending(out):
        assert run(tiny_checkpoint, out) == 2
    assert "another process is writing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "gsm9k"], "unknown task 'gsm9k'"),
        (["--tasks", "addition,addition"], "each once"),
        (["--effort", "extreme"], "'extreme'"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--epochs", "2", "--temperature", "0"], "ask the same thing 2 times"),
        (["--top-p", "1.5"], "in (0, 1]"),
        (["--batch", "0"], "--batch is 0"),
        (["--date", "yesterday"], "YYYY-MM-DD"),
        (["--data", "gsm8k=x"], "a task of --tasks (addition)"),
        (["--data", "addition=nowhere.jsonl"], "does not exist"),
        (["--adapter", "nowhere"], "--adapter nowhere"),
        (["--variant", "base"], "needs a run directory"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    tiny_checkpoint: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_checkpoint, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_directory_stands_for_three_models(tmp_path: Path) -> None:
    run_directory, base = tmp_path / "run", tmp_path / "base"
    for folder in (base, run_directory / "model", run_directory / "adapter"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (run_directory / "recipe.yaml").write_text(f"version: 1\nmodel:\n  checkpoint: {base}\n")
    model, adapter, base_only = (
        resolve(str(run_directory), variant=variant, adapter=None) for variant in (None, "adapter", "base")
    )
    assert (model.checkpoint, model.adapter) == (run_directory / "model", None)
    assert (adapter.checkpoint, adapter.adapter) == (base, run_directory / "adapter")
    assert (base_only.checkpoint, base_only.adapter) == (base, None)
    with pytest.raises(UsageError, match="--adapter needs a checkpoint"):
        resolve(str(run_directory), variant=None, adapter=str(tmp_path))


def test_the_base_of_a_built_in_run_is_the_one_its_adapter_names(tmp_path: Path) -> None:
    run_directory, base = tmp_path / "run", tmp_path / "base"
    for folder in (base, run_directory / "adapter"):
        folder.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (run_directory / "recipe.yaml").write_text("model: {checkpoint: 'builtin:addition'}\n")
    with pytest.raises(UsageError, match="'builtin:addition', which is no directory here"):
        resolve(str(run_directory), variant="base", adapter=None)
    (run_directory / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert resolve(str(run_directory), variant="base", adapter=None).checkpoint == base


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        resolve(str(tmp_path), variant=None, adapter=None)


def test_date_and_dtype_of_a_run_default_to_its_recipe(
    tiny_checkpoint: Path, tmp_path: Path, fake_engine: Callable
) -> None:
    run_directory = tmp_path / "run"
    run_directory.mkdir()
    tiny_checkpoint.rename(run_directory / "model")
    recipe = "model: {checkpoint: base, dtype: float32}\ndata: {date: '2025-06-28'}\n"
    (run_directory / "recipe.yaml").write_text(recipe)
    engine = fake_engine(right)
    assert run_command(main, ["run", str(run_directory), "--tasks", "addition", "--limit", "2"]) == 0
    settings = json.loads((run_directory / "evals" / "model" / "run.json").read_text())["settings"]
    assert (settings["date"], settings["dtype"]) == ("2025-06-28", "float32")
    assert "Current date: 2025-06-28" in engine.prompts[0]


def test_the_real_engine_gets_prompt_and_seed_of_the_record(tiny_harmony_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--limit", "3", "--max-tokens", "5", "--dtype", "float32", "--device", "cpu")
    assert run(tiny_harmony_checkpoint, out, *options) == 0
    engine = gi.Engine.from_checkpoint(str(tiny_harmony_checkpoint), device="cpu", dtype=torch.float32)
    records = list(read_records(out).values())
    assert len(records) == 3
    for record in records:
        conversation = gi.harmony.conversation_from_chat({"messages": record.prompt}, date=None)
        prompt = gi.harmony.render(conversation, completion=True).token_ids
        params = gi.SamplingParams(max_tokens=5, temperature=1.0, seed=record.seed)
        (expected,) = engine.generate([prompt], params)
        assert record.token_ids == expected.token_ids
        assert (record.prompt_tokens, record.completion_tokens) == (len(prompt), len(expected.token_ids))
        assert record.outcome == ("truncated" if expected.finish_reason == "length" else "malformed_harmony")


REAL_OPTIONS = ("--limit", "10", "--max-tokens", "4", "--dtype", "float32", "--batch", "1", "--device", "cpu")


def test_a_run_resumed_at_a_half_written_record_ends_like_an_undisturbed_one(
    tiny_harmony_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(tiny_harmony_checkpoint, whole, *REAL_OPTIONS) == 0
    cut.mkdir()
    (cut / "run.json").write_bytes((whole / "run.json").read_bytes())
    lines = (whole / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (cut / "samples.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:50])
    assert run(tiny_harmony_checkpoint, cut, *REAL_OPTIONS) == 0
    messages = capsys.readouterr().err
    assert "cut off a half-written record of 50 bytes" in messages
    assert "4 of 10 samples are done, asking the other 6" in messages
    assert read_records(cut) == read_records(whole)
    assert (cut / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()


@pytest.mark.slow
def test_what_a_failed_attempt_held_is_free_before_the_next(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a batch that was too large for the memory would fail again in halves."""

    class Small:
        def __init__(self) -> None:
            self.held: list[weakref.ref] = []
            self.alive: list[int] = []

        def as_completed(self, prompts: list, params: list) -> Iterator:
            gc.collect()
            self.alive.append(sum(ref() is not None for ref in self.held))
            memory = torch.zeros(1)
            self.held.append(weakref.ref(memory))
            if len(prompts) > 1:
                raise MemoryError(f"{len(prompts)} at once")
            ids = encoding().encode("<|channel|>final<|message|>0<|return|>", allowed_special="all")
            yield Completion(0, 0, ids, None, "stop")

    engine = Small()
    monkeypatch.setattr("evals.__main__._load_engine", lambda *_: engine)
    assert run(tiny_checkpoint, tmp_path / "out") == 0
    assert len(engine.alive) == 11, "6, then 3 twice, each as 1 and 2, the 2 as 1 and 1"
    assert set(engine.alive) == {0}


def test_a_run_killed_with_sigkill_goes_on_where_it_was(tiny_harmony_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["run", str(tiny_harmony_checkpoint), "--tasks", "addition", "--out", str(out), *REAL_OPTIONS]
    with subprocess.Popen([sys.executable, "-m", "evals", *arguments], cwd=REPOSITORY) as process:
        _wait_for_lines(out / "samples.jsonl", 3, process)
        process.send_signal(signal.SIGKILL)
    before = read_records(out)
    assert 3 <= len(before) < 10
    assert main(arguments) == 0
    after = read_records(out)
    assert len(after) == 10
    assert {key: after[key] for key in before} == before


@pytest.mark.slow
def test_sigterm_ends_a_run_with_143_and_says_how_to_go_on(tiny_harmony_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["run", str(tiny_harmony_checkpoint), "--tasks", "addition", "--out", str(out), *REAL_OPTIONS]
    command = [sys.executable, "-m", "evals", *arguments]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE) as process:
        _wait_for_lines(out / "samples.jsonl", 3, process)
        process.send_signal(signal.SIGTERM)
        messages = process.communicate()[1].decode()
    assert process.returncode == 143
    assert "the same command goes on from there" in messages
    assert "Traceback" not in messages


def _wait_for_lines(path: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    pytest.fail(f"no {count} records within a minute, or the run ended before; exit code {process.poll()}")


def test_help_of_every_command_answers_without_torch() -> None:
    script = (
        "import sys\nfrom evals.__main__ import main\n"
        "for command in ([], ['run'], ['compare'], ['report'], ['tasks']):\n"
        "    try:\n        main([*command, '--help'])\n    except SystemExit as end:\n        assert end.code == 0\n"
        "assert not {'torch', 'datasets', 'jinja2'} & sys.modules.keys(), 'a heavy import'\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("example: gptoss-eval") == 4
