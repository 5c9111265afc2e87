"""Compiling the CPU kernels: with fresh caches, without a compiler, with a broken one, and by two processes at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import tiny_config, write_tiny

from gptoss_infer import kernels
from gptoss_infer.errors import MachineError
from gptoss_infer.kernels.cpu import build

ROOT = Path(__file__).resolve().parents[2]
GENERATE = """if True:
    import sys, torch
    import gptoss_infer as gi
    from gptoss_infer import doctor
    torch.set_num_threads(1)
    engine = gi.Engine.from_checkpoint(sys.argv[1], device="cpu", dtype=torch.float32)
    params = gi.SamplingParams(max_tokens=8, stop_token_ids=())
    tokens = [c.token_ids for c in engine.generate([[1, 2, 3], [4]], params)]
    print("compiled" if engine.compiled else "plain", tokens, *doctor._cpu_kernels(), sep="|")
"""

if kernels.cpu_kernels() is None:
    pytest.skip("no compiled kernels here; the line above says why", allow_module_level=True)


def start(checkpoint: Path, **environment: str) -> subprocess.Popen[str]:
    """Generate in a new process with these variables; an empty one is taken away."""
    merged = {name: value for name, value in (os.environ | environment).items() if value}
    command = [sys.executable, "-c", GENERATE, str(checkpoint)]
    return subprocess.Popen(command, cwd=ROOT, env=merged, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


class Result(NamedTuple):
    """What a process printed, and the lines about kernels that it wrote to stderr."""

    path: str
    tokens: str
    doctor: str
    lines: list[str]
    told: str  # which way the engine says it goes, without the details


def finish(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate()
    assert process.returncode == 0, err
    lines = [line for line in err.splitlines() if "kernels" in line]
    told = [line for line in lines if line.startswith("layers: ")]
    return Result(*out.strip().split("|"), [line for line in lines if line not in told], ";".join(told).split(",")[0])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "base", tiny_config())


def test_without_a_compiler_pytorch_generates_the_same_and_one_line_says_why(checkpoint: Path, tmp_path: Path) -> None:
    empty = {"PATH": str(tmp_path), "CXX": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    working, without = map(finish, (start(checkpoint), start(checkpoint, **empty)))
    assert (working.path, working.lines) == ("compiled", [])
    assert working.told == "layers: compiled CPU kernels"
    assert "status='ok'" in working.doctor
    assert (without.path, without.tokens) == ("plain", working.tokens)
    (line,) = without.lines
    assert "plain PyTorch" in line
    assert "no C++ compiler" in line
    assert "status='note'" in without.doctor
    assert "no C++ compiler" in without.doctor


def program(folder: Path, script: str) -> str:
    """Put a program in place of the compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'x.cpp:1:1: error: bad' >&2; exit 1", "x.cpp:1:1: error: bad"),
        ("exit 3", "exit 3"),
        ("true", "can be loaded neither from"),
        ('for last; do :; done; echo text > "$last"', "can be loaded neither from"),
    ],
)
def test_a_compiler_that_fails_is_a_reason_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", program(tmp_path, script))
    with pytest.raises(MachineError, match=re.escape(reason)):
        build.load()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        (build.SWITCH, "0", f"{build.SWITCH}=0"),
        ("CXX", "no-such-compiler", "CXX=no-such-compiler"),
        ("PATH", "", "no C++ compiler"),
    ],
)
def test_what_the_environment_forbids_or_lacks_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(MachineError, match=re.escape(reason)):
        build.load()


@pytest.mark.slow
def test_two_processes_that_need_them_first_both_get_them_and_leave_one_library(
    checkpoint: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    both = [start(checkpoint, XDG_CACHE_HOME=str(cache)) for _ in range(2)]
    first, second = map(finish, both)
    assert first.path == second.path == "compiled"
    assert first.tokens == second.tokens
    assert all(len(result.lines) == 1 and "compiling" in result.lines[0] for result in (first, second))
    (library,) = [path for path in cache.rglob("*") if path.is_file()]
    assert library.suffix == ".so"
    again = finish(start(checkpoint, XDG_CACHE_HOME=str(cache)))
    assert (again.tokens, again.lines) == (first.tokens, [])


@pytest.mark.slow
def test_where_nothing_can_be_cached_they_are_compiled_for_the_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build.load().gptoss_level() in (1, 2)
    compiling, unwritable = capsys.readouterr().err.splitlines()
    assert "compiling" in compiling
    assert "cannot be written" in unwritable


def test_the_name_of_a_library_tells_sources_command_and_cpu_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {build._key(["c++", "-O3"]), build._key(["c++", "-O2"]), build._key(["g++", "-O3"])}
    monkeypatch.setattr(build, "_cpu", lambda: "another CPU")
    names.add(build._key(["c++", "-O3"]))
    monkeypatch.setattr(build, "SOURCES", build.SOURCES[:-1])
    names.add(build._key(["c++", "-O3"]))
    assert len(names) == 5


def test_every_source_is_part_of_the_name() -> None:
    folder = Path(build.__file__).parent
    assert sorted(build.SOURCES) == sorted(path.name for path in folder.iterdir() if path.suffix in (".cpp", ".h"))


def test_a_library_in_the_cache_that_cannot_be_loaded_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken, or on a file system that runs nothing; and CXX may hold a launcher and arguments."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "env g++ -pipe")
    flags = [*build.FLAGS, *build.THIS_CPU]
    path = build.cache_folder() / f"cpu-{build._key([*build._compiler(), *flags])}.so"
    path.parent.mkdir(parents=True)
    path.write_text("text")
    library = build.load()
    assert library.gptoss_lanes() in (4, 8, 16)
    assert "compiling the CPU kernels" in capsys.readouterr().err
    assert build.load().gptoss_lanes() == library.gptoss_lanes()
    assert capsys.readouterr().err == ""
