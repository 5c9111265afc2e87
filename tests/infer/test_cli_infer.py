"""The command line: exit codes, what goes to stdout, and quick help."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, write_tiny
from openai_server import Behaviour, serving

from gptoss_infer import doctor, harmony
from gptoss_infer.__main__ import main
from gptoss_infer.checkpoint import Checkpoint
from gptoss_infer.engine import Completion, Engine, SamplingParams
from gptoss_infer.errors import run_command

COMMANDS = ("generate", "inspect", "convert", "probe", "doctor")


@pytest.fixture(autouse=True)
def _restored_sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "small", tiny_config(num_hidden_layers=1, vocab_size=64))


def run(*argv: object) -> int:
    """The exit code that the console script would end in."""
    try:
        return run_command(main, [str(argument) for argument in argv])
    except SystemExit as error:  # argparse's
        return int(error.code or 0)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_answers_within_half_a_second_and_imports_no_torch(command: str) -> None:
    code = """if True:
        import sys
        from gptoss_infer.__main__ import main
        try:
            main(sys.argv[1:])
        finally:
            heavy = {"torch", "numpy", "triton", "safetensors", "openai_harmony", "huggingface_hub"} & set(sys.modules)
            assert not heavy, heavy
    """
    argv = [sys.executable, "-c", code, *([command] if command else []), "--help"]
    elapsed = []
    for _ in range(3):  # the quickest counts: other work on the machine is not ours
        start = time.perf_counter()
        done = subprocess.run(argv, capture_output=True, text=True)
        elapsed.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(elapsed) < 0.5
    assert "usage: gptoss-infer" in done.stdout
    assert not command or f"example: gptoss-infer {command}" in done.stdout


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "gptoss_infer", "inspect", "/nowhere"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: checkpoint '/nowhere' is neither")


def test_a_reader_that_closes_the_pipe_early_is_no_traceback(small: Path) -> None:
    command = [sys.executable, "-m", "gptoss_infer", "inspect", str(small), "--tensors"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_generate_prints_the_engines_tokens_for_the_rendered_prompt(
    tiny_harmony_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--max-tokens", 6, "--seed", 5, "--dtype", "float32", "--device", "cpu")
    prompt = ("What?", "--system", "Be kind.", "--effort", "low", "--date", "2025-06-28")
    assert run("generate", tiny_harmony_checkpoint, *prompt, *options, "--json", "--logprobs", "--n", 2) == 0
    samples = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What?"}]
    conversation = harmony.conversation_from_chat({"messages": messages}, date="2025-06-28", reasoning_effort="low")
    token_ids = harmony.render(conversation, completion=True).token_ids
    engine = Engine.from_checkpoint(str(tiny_harmony_checkpoint), device="cpu", dtype=torch.float32)
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=5, n=2, logprobs=True)
    expected = list(engine.generate([token_ids], params))
    assert [sample["token_ids"] for sample in samples] == [completion.token_ids for completion in expected]
    assert [sample["logprobs"] for sample in samples] == [completion.logprobs for completion in expected]
    assert [sample["finish_reason"] for sample in samples] == [completion.finish_reason for completion in expected]
    assert [sample["sample"] for sample in samples] == [0, 1]

    assert run("generate", tiny_harmony_checkpoint, *prompt, *options, "--raw") == 0
    assert capsys.readouterr().out == harmony.decode(expected[0].token_ids) + "\n"


def test_generate_by_a_server_prints_what_generate_by_its_checkpoint_does(
    speaker: Path, speaker_engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ("What?", "--system", "Be kind.", "--effort", "low", "--seed", 5, "--n", 3, "--json")
    assert run("generate", speaker, *prompt, "--dtype", "float32", "--device", "cpu", "--logprobs") == 0
    own = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with serving(speaker_engine, Behaviour()) as url:
        assert run("generate", url, *prompt, "--model", "tiny", "--logprobs") == 0
        out, err = capsys.readouterr()
        served = [json.loads(line) for line in out.splitlines()]
        assert f"tiny at {url}, raw mode" in err
        assert run("generate", url, *prompt, "--model", "tiny", "--mode", "chat") == 0
        chat = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for sample, other in zip(own, served, strict=True):
        assert sample.pop("logprobs") == pytest.approx(other.pop("logprobs"), abs=1e-5)  # n samples share a batch here
    assert own == served == chat


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["http://127.0.0.1:9/v1"], 2, "needs --model NAME"),
        (["http://127.0.0.1:9/v1", "--model", "m", "--adapter", "x"], 2, "go with a checkpoint"),
        (["http://127.0.0.1:9/v1", "--model", "m", "--dtype", "float32"], 2, "go with a checkpoint"),
        (["./never-looked-at", "--model", "m"], 2, "go with a server's URL"),
        (["./never-looked-at", "--mode", "chat"], 2, "go with a server's URL"),
        (["http://127.0.0.1:9/v1", "--model", "m"], 3, "is the server up?"),
    ],
)
def test_options_that_do_not_go_with_a_server_or_a_checkpoint_are_refused(
    argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptoss_infer.client.random.uniform", lambda *_: 0.0)
    assert run("generate", argv[0], "Why?", *argv[1:]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_a_date_that_a_server_cannot_be_told_is_refused(
    speaker_engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(speaker_engine, Behaviour(completions=False)) as url:
        assert run("generate", url, "Why?", "--model", "tiny", "--date", "2025-06-28") == 2
    assert "--date cannot be told in chat mode" in capsys.readouterr().err


ANSWER = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Because.<|return|>"
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>'


class _Canned:
    """An engine that answers with given tokens."""

    def __init__(self, *texts: str) -> None:
        from gptoss_infer.harmony.vocabulary import encoding

        self.answers = [encoding().encode(text, allowed_special="all") for text in texts]

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> Iterator[Completion]:
        assert len(prompts) == 1
        assert params.n == len(self.answers)
        for i, token_ids in enumerate(self.answers):
            yield Completion(0, i, token_ids, None, "stop" if token_ids[-1] in harmony.STOP_TOKENS else "length")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Texts that the model is made to answer with."""
    texts: list[str] = []
    monkeypatch.setattr(Engine, "from_checkpoint", lambda *_, **__: _Canned(*texts))
    return texts


def test_only_the_final_message_goes_to_stdout_and_reasoning_is_shown_on_request(
    answers: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    answers.append(ANSWER)
    assert run("generate", "any", "Why?") == 0
    out, err = capsys.readouterr()
    assert out == "Because.\n"
    assert "Hm." not in err
    assert run("generate", "any", "Why?", "--show-analysis") == 0
    out, err = capsys.readouterr()
    assert out == "Because.\n"
    assert "[analysis] Hm." in err


def test_reasoning_is_dimmed_on_a_terminal(
    answers: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers.append(ANSWER)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("generate", "any", "Why?") == 0
    assert "\033[2m[analysis] Hm.\033[0m" in capsys.readouterr().err


def test_several_samples_are_told_apart(answers: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    answers.extend([ANSWER, ANSWER.replace("Because", "Therefore")])
    assert run("generate", "any", "Why?", "--n", 2) == 0
    expected = ["--- sample 1 of 2", "Because.", "--- sample 2 of 2", "Therefore."]
    assert capsys.readouterr().out.splitlines() == expected


def test_an_answer_that_was_cut_off_or_has_no_final_message_is_said_on_stderr(
    answers: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    answers.append(ANSWER.removesuffix("<|return|>"))
    assert run("generate", "any", "Why?") == 0
    out, err = capsys.readouterr()
    assert out == "Because.\n"
    assert "ended by length" in err
    answers[0] = CALL
    assert run("generate", "any", "Why?") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "no final message" in err


def test_json_holds_messages_calls_and_defects(answers: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    answers.extend([ANSWER, CALL, ANSWER.removesuffix("<|return|>")])
    assert run("generate", "any", "Why?", "--json", "--n", 3) == 0
    whole, call, cut = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (whole["final"], whole["defects"], whole["finish_reason"]) == ("Because.", [], "stop")
    assert [(m["channel"], m["content"]) for m in whole["messages"]] == [("analysis", "Hm."), ("final", "Because.")]
    assert "logprobs" not in whole
    assert call["final"] is None
    assert [(c["name"], c["arguments"]) for c in call["tool_calls"]] == [("f", {"x": 1})]
    assert cut["finish_reason"] == "length"
    assert cut["defects"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--logprobs"], "--logprobs goes with --json"),
        (["--n", "2", "--temperature", "0"], "would give equal samples"),
        (["--temperature", "-1"], "temperature -1.0"),
        (["--top-p", "0"], "top_p 0.0"),
        (["--max-tokens", "0"], "max_tokens 0"),
        (["--date", "yesterday"], "date is 'yesterday'"),
        (["--effort", "extreme"], "invalid choice: 'extreme'"),
        (["--raw", "--json"], "not allowed with"),
    ],
)
def test_options_that_mean_nothing_exit_2_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run("generate", "./never-looked-at", "Why?", *options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "loading" not in err


def test_a_prompt_for_another_vocabulary_exits_2_and_a_damaged_checkpoint_4(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", small, "Why?", "--device", "cpu") == 2
    assert "another vocabulary?" in capsys.readouterr().err
    file = small / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for command in (
        ("generate", small, "Why?"),
        ("inspect", small),
        ("convert", small, small.parent / "o", "--to", "bf16"),
    ):
        assert run(*command) == 4
        assert "model.safetensors has" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_exits_3(tiny_harmony_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", tiny_harmony_checkpoint, "Why?", "--device", "cuda") == 3
    assert "sees no CUDA device; use cpu" in capsys.readouterr().err


def test_inspect_prints_a_summary_and_says_whether_two_checkpoints_are_identical(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", small, tmp_path / "original", "--to", "original") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'original'}\n"
    assert run("inspect", tmp_path / "original", "--against", small, "--tensors") == 0
    out = capsys.readouterr().out
    assert "original, experts in mxfp4" in out
    assert "identical: all 22 tensors" in out
    assert "block.0.attn.qkv.weight" in out
    other = write_tiny(tmp_path / "other", tiny_config(num_hidden_layers=1, vocab_size=64), seed=1)
    assert run("inspect", other, "--against", small) == 0
    assert "0 tensors identical, 22 differ" in capsys.readouterr().out


def test_inspect_json_is_one_object_with_hashes_of_what_differs(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_tiny(tmp_path / "other", tiny_config(num_hidden_layers=1, vocab_size=64), seed=1)
    assert run("inspect", other, "--against", small, "--tensors", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["layout"], result["manifest"], result["config"]["hidden_size"]) == ("hf", "absent", 64)
    assert len(result["tensors"]) == result["num_tensors"] == 22
    assert {len(difference["sha256"]) for difference in result["against"]["differing"]} == {64}


def test_convert_refuses_an_existing_target_and_replaces_it_when_asked(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep me")
    assert run("convert", small, tmp_path / "out", "--to", "bf16") == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "keep me"
    assert run("convert", small, tmp_path / "out", "--to", "bf16", "--overwrite", "--max-shard-bytes", 30_000) == 0
    assert Checkpoint.open(tmp_path / "out").experts == "bf16"
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert run("convert", small, tmp_path / "out", "--to", "bf16", "--overwrite", "--max-shard-bytes", 0) == 2


def test_convert_to_gguf_prints_the_target_only_and_tells_the_rest_on_stderr(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for to in ("gguf", "gguf-f32"):
        assert run("convert", small, tmp_path / f"{to}.gguf", "--to", to) == 0
        out, err = capsys.readouterr()
        assert out == f"{tmp_path / f'{to}.gguf'}\n"
        assert "layer 1 of 1" in err
        assert "note: vocab_size is 64" in err
        assert (tmp_path / f"{to}.gguf").read_bytes()[:4] == b"GGUF"
    assert run("convert", small, tmp_path / "gguf.gguf", "--to", "gguf") == 2
    assert run("convert", small, tmp_path / "gguf.gguf", "--to", "gguf", "--overwrite") == 0
    assert run("convert", small, tmp_path / "folder", "--to", "gguf") == 2
    assert "name must end in .gguf" in capsys.readouterr().err
    assert run("convert", small, tmp_path / "b.gguf", "--to", "gguf", "--max-shard-bytes", 9) == 2
    assert "not with --to gguf, which writes one file" in capsys.readouterr().err
    assert run("convert", small, tmp_path / "bf16", "--to", "bf16") == 0
    assert run("convert", tmp_path / "bf16", tmp_path / "b.gguf", "--to", "gguf") == 2
    assert "holds bf16 experts" in capsys.readouterr().err


def test_convert_to_mxfp4_prints_the_target_only_and_tells_the_rest_on_stderr(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", small, tmp_path / "bf16", "--to", "bf16") == 0
    capsys.readouterr()
    command = ("convert", tmp_path / "bf16", tmp_path / "like", "--to", "mxfp4", "--like", small)
    assert run(*command, "--rounding", "systematic", "--seed", 3) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'like'}\n"
    assert "2 of 2: model.layers.0.mlp.experts.gate_up_proj" in err
    assert "experts.down_proj     0 of 1 changed" in err
    assert (tmp_path / "like" / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()
    assert run(*command) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert run("convert", tmp_path / "bf16", tmp_path / "anew", "--to", "mxfp4") == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'anew'}\n"
    assert "warning: without --like, scales are chosen anew" in err
    assert run("inspect", tmp_path / "anew", "--against", small, "--json") == 0
    kinds = {kind["name"]: kind for kind in json.loads(capsys.readouterr().out)["against"]["kinds"]}
    assert kinds["experts.down_proj"]["values_changed"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "bf16", "--like", "base"], "--like: only with --to mxfp4, since --to bf16 rounds nothing"),
        (["--to", "hf", "--rounding", "nearest", "--seed", "1"], "--rounding and --seed: only with --to mxfp4"),
        (["--to", "mxfp4", "--rounding", "nearest"], "--rounding: only with --like BASE"),
        (["--to", "mxfp4", "--seed", "0"], "--seed: only with --like BASE"),
        (["--to", "mxfp4", "--like", "base", "--seed", "-1"], "--seed is -1"),
        (["--to", "mxfp4", "--like", "base", "--rounding", "up"], "invalid choice: 'up'"),
    ],
)
def test_rounding_options_that_mean_nothing_exit_2_before_anything_is_read(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run("convert", "./never-looked-at", "./never-written", *options) == 2
    assert message in capsys.readouterr().err


def test_doctor_finds_this_machine_fit_and_gives_a_cure_for_every_lack(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--json") == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert checks["torch"]["finding"] == torch.__version__
    assert {"python", "openai-harmony", "vocabulary", "kernels", "disk here", "disk cache"} <= checks.keys()
    assert all(check["cure"] for check in checks.values() if check["status"] != "ok")
    assert run("doctor") == 0
    assert len(capsys.readouterr().out.splitlines()) >= len(checks)


def test_doctor_exits_3_where_the_vocabulary_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path))
    assert run("doctor") == 3
    out = capsys.readouterr().out
    assert "missing  vocabulary" in out
    assert "cure: pip install 'gptoss[vocab]'" in out


def test_doctor_reports_missing_packages_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor.importlib.metadata.version

    def version(name: str) -> str:
        if name in ("openai-harmony", "triton", "llguidance"):
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    checks = {check.name: check for check in doctor.examine()}
    assert (checks["openai-harmony"].status, checks["openai-harmony"].cure) == ("missing", "pip install openai-harmony")
    assert checks["kernels"].status == checks["constraints"].status == "note"


def test_doctor_warns_of_a_disk_too_small_for_the_smallest_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "not" / "yet" / "there"))
    monkeypatch.setattr(doctor, "CHECKPOINT_BYTES", 10**18)
    checks = {check.name: check for check in doctor.examine()}
    assert checks["disk cache"].status == checks["disk here"].status == "note"
    assert str(tmp_path / "not" / "yet" / "there") in checks["disk cache"].finding
    assert "HF_HOME" in checks["disk cache"].cure
