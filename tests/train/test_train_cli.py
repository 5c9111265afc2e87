"""The command lines of `gptoss-train`: quick help, what goes to stdout, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gptoss_infer.errors import run_command
from gptoss_train.__main__ import main
from gptoss_train.recipe import shipped_recipes

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("run", "data", "export", "recipes")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_answers_within_half_a_second_and_imports_no_torch(command: str) -> None:
    code = """if True:
        import sys
        from gptoss_train.__main__ import main
        try:
            main(sys.argv[1:])
        finally:
            heavy = {"torch", "numpy", "peft", "accelerate", "datasets", "wandb", "openai_harmony"} & set(sys.modules)
            assert not heavy, heavy
    """
    argv = [sys.executable, "-c", code, *([command] if command else []), "--help"]
    elapsed = []
    for _ in range(3):  # the quickest counts: other work on the machine is not ours
        start = time.perf_counter()
        done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
        elapsed.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(elapsed) < 0.5
    assert "usage: gptoss-train" in done.stdout
    assert not command or f"example: gptoss-train {command}" in " ".join(done.stdout.split())


def test_a_wrong_recipe_is_named_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("version: 1\nmodel: {checkpoint: x}\ndata: {trian: y}\ntrain: {epochs: 1}\n")
    code = """if True:
        import sys
        from gptoss_infer.errors import run_command
        from gptoss_train.__main__ import main
        code = run_command(main, ["run", sys.argv[1]])
        assert "torch" not in sys.modules
        sys.exit(code)
    """
    command = [sys.executable, "-c", code, str(tmp_path / "r.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "r.yaml:3: data.trian" in done.stderr
    assert "train" in done.stderr
    assert "Traceback" not in done.stderr


def test_data_shows_samples_with_their_labels_and_the_counts(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", str(recipe()), "-n", "2", "data.validation_fraction=0.5"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("⟦analysis: ") == shown.out.count("⟦final: ") == 2
    assert "training    " in shown.out
    assert "validation  " in shown.out
    assert shown.out.count("9 lines, 9 samples") == 2


def test_overrides_may_stand_before_and_after_options_but_unknown_options_are_refused(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recipe())
    assert main(["data", path, "train.epochs=null", "-n", "1"]) == 0
    assert run_command(main, ["data", path, "-n", "1", "data.max_tokens=2"]) == 4
    assert "18 samples over the limit skipped" in capsys.readouterr().err
    for wrong in (["data", path, "--samples", "1"], ["recipes", "quickstart", "lora.rank=4"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


def test_recipes_lists_them_prints_one_and_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(shipped_recipes())
    assert main(["recipes", "quickstart"]) == 0
    assert capsys.readouterr().out == (ROOT / "recipes/quickstart.yaml").read_text()
    assert main(["recipes", "--keys"]) == 0
    keys = capsys.readouterr().out
    assert "lora.rank" in keys
    assert "on_bad_line" in keys


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["recipes", "quickstrat"], 2, "Did you mean quickstart?"),
        (["run", "nowhere.yaml"], 2, "nowhere.yaml: is neither a file nor a shipped recipe"),
        (["data", "quickstart", "data.train"], 2, "expected section.key=value"),
        (["export", "nowhere", "out"], 4, "nowhere"),
    ],
)
def test_wrong_arguments_end_in_one_message_and_their_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(main, argv) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("error: ")
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_names_no_base_needs_one_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert run_command(main, ["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "names no base; give it with --base CKPT" in capsys.readouterr().err


def test_unknown_options_are_usage_errors() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", "a", "b", "--format", "gguf"])
    assert caught.value.code == 2
