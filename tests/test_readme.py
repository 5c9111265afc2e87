"""The README, and the examples in help texts: blocks, commands, recipes, samples and file tree are what the code has.

Running its first two blocks is `.ci/run`'s work; here is what can be known in seconds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_config, write_tiny

from gptoss_infer import harmony
from gptoss_train.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = {"gptoss-train": "gptoss_train", "gptoss-infer": "gptoss_infer", "gptoss-eval": "evals"}


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, without their fences."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for kind, text in found if kind == language]


def command_lines() -> list[list[str]]:
    """Every command of the bash blocks as words, continuation lines joined, comments left out."""
    text = "".join(blocks("bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def our_commands() -> list[tuple[str, list[str]]]:
    """(module, arguments) of each command line that runs our code, with or without accelerate's launcher."""
    found = []
    for words in command_lines():
        words = words[: words.index(">")] if ">" in words else words
        if words[0] in MODULES:
            found.append((MODULES[words[0]], words[1:]))
        elif words[:2] == ["accelerate", "launch"]:
            module = words.index("-m")
            found.append((words[module + 1], words[module + 2 :]))
    return found


def parse(module: str, arguments: list[str]) -> argparse.Namespace:
    parser = importlib.import_module(f"{module}.__main__")._parser()
    return parser.parse_args(arguments)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 250


def test_the_first_block_runs_the_quickstart_and_the_second_the_tests_each_with_its_set_up() -> None:
    first, second = (text.splitlines() for text in blocks("bash")[:2])
    assert first[0] == second[0] == "python3.11 -m venv .venv"
    assert first[-1].endswith("-m gptoss_train run quickstart")
    assert second[-1] == 'pytest -m "not slow"'
    for block in (first, second):
        assert any(line.startswith("pip install -c .ci/constraints.txt") for line in block)


def test_ci_takes_the_blocks_out_of_the_readme_as_they_are_printed() -> None:
    function = re.search(r"^block\(\) \{.*?^\}$", (ROOT / ".ci" / "run").read_text(), re.DOTALL | re.MULTILINE)
    assert function
    for number, text in enumerate(blocks("bash"), start=1):
        script = f"{function[0]}\nblock {number}"
        done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == text


@pytest.mark.parametrize("text", blocks("bash"), ids=lambda text: text.splitlines()[-1][:40])
def test_every_bash_block_is_valid_bash(text: str) -> None:
    subprocess.run(["bash", "-n", "-c", text], check=True)


@pytest.mark.parametrize(("module", "arguments"), our_commands(), ids=lambda part: shlex.join(part)[:60])
def test_every_command_in_the_readme_parses(module: str, arguments: list[str]) -> None:
    parse(module, arguments)


def help_examples() -> list[str]:
    """The worked example at the end of each command's --help."""
    found = []
    for module in MODULES.values():
        parser = importlib.import_module(f"{module}.__main__")._parser()
        (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        found += [str(command.epilog).removeprefix("example: ") for command in commands.choices.values()]
    return found


@pytest.mark.parametrize("example", help_examples())
def test_the_example_in_every_help_text_parses(example: str) -> None:
    name, *arguments = shlex.split(example)
    parse(MODULES[name], arguments)


def test_all_three_commands_occur_in_the_readme() -> None:
    assert {module for module, _ in our_commands()} == set(MODULES.values())


def test_accelerate_knows_the_flags_that_the_readme_gives_it() -> None:
    from accelerate.commands.launch import launch_command_parser

    launches = [words[2:] for words in command_lines() if words[:2] == ["accelerate", "launch"]]
    assert len(launches) >= 2
    for words in launches:
        assert launch_command_parser().parse_args(words).training_script == "gptoss_train"


def test_every_recipe_that_the_readme_runs_loads_with_its_overrides() -> None:
    copies = {}  # files that an earlier line wrote: gptoss-train recipes NAME > FILE
    for words in command_lines():
        if words[:2] == ["gptoss-train", "recipes"] and ">" in words:
            copies[words[-1]] = words[2]
    used = [parse(module, arguments) for module, arguments in our_commands() if module == "gptoss_train"]
    recipes = [(copies.get(a.recipe, a.recipe), a.overrides) for a in used if a.command in ("run", "data")]
    assert {name for name, _ in recipes} >= {"quickstart", "gpt-oss-20b-lora"}
    for name, overrides in recipes:
        load_recipe(name, overrides)


def test_the_sample_conversations_train_the_channels_that_the_readme_names() -> None:
    (text,) = blocks("json")
    trained: list[str | None] = []
    for line in text.splitlines():
        conversation = harmony.conversation_from_chat(json.loads(line), date=None)
        trained += [channel for sample in harmony.training_samples(conversation) for channel in sample.channels]
    assert set(trained) == {None, "analysis", "final", "tool_call"}


def test_the_python_example_runs_on_a_checkpoint(tmp_path: Path) -> None:
    (text,) = blocks("python")
    write_tiny(tmp_path / "runs/quickstart/model", tiny_config(num_hidden_layers=1, vocab_size=201088))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in ("stop", "length")


def tree() -> dict[str, str]:
    """Path to comment, of the README's file tree; one line may name several files."""
    (text,) = [text for text in blocks("") if text.startswith("gptoss_infer/")]
    found, folder = {}, ""
    for line in text.splitlines():
        names, comment = re.split(r"\s{2,}", line.strip(), maxsplit=1)
        folder = folder if line.startswith(" ") else names
        prefix = folder if line.startswith(" ") else ""
        found.update({f"{prefix}{name}": comment for name in names.split()})
    return found


def test_the_file_tree_names_every_file_and_folder_of_the_packages_and_no_other() -> None:
    listed = tree()
    assert [path for path in listed if not (ROOT / path).exists()] == []
    for package in ("gptoss_infer", "gptoss_train", "evals"):
        for path in (ROOT / package).iterdir():
            if path.name.startswith("_"):  # __init__, __main__, __pycache__
                continue
            assert f"{package}/{path.name}{'/' if path.is_dir() else ''}" in listed, f"{path} has no line in the README"


def test_every_recipe_is_named_in_the_readme() -> None:
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert path.stem in tree()["recipes/"]


def test_links_to_files_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
