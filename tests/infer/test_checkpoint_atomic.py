"""Directories and files are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import tiny_config, write_tiny

from gptoss_infer.checkpoint import atomic_directory, verify_manifest
from gptoss_infer.checkpoint.atomic import atomic_file
from gptoss_infer.errors import DataError, UsageError

SMALL = tiny_config(num_hidden_layers=1, vocab_size=64)
# Writes half of what it wants to, says so, and waits to be killed.
HALFWAY = """if True:
    import signal, sys, time
    from pathlib import Path
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
    from gptoss_infer.checkpoint import atomic_directory
    from gptoss_infer.errors import run_command
    def main(argv):
        with atomic_directory(Path(argv[0]), overwrite=True) as directory:
            (directory / "half").write_bytes(b"half")
            print("half", flush=True)
            time.sleep(60)
        return 0
    sys.exit(run_command(main))
"""


def write(target: Path, text: str, *, overwrite: bool = False) -> None:
    with atomic_directory(target, overwrite=overwrite) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text(text)


def start_halfway(target: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HALFWAY, str(target)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


def test_a_finished_directory_has_a_manifest_of_all_its_files(tmp_path: Path) -> None:
    write(tmp_path / "new" / "out", "text")
    out = tmp_path / "new" / "out"
    assert json.loads((out / "MANIFEST.json").read_text()) == {"sha256": {"sub/file": sha256(b"text").hexdigest()}}
    assert verify_manifest(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_directory_that_others_wrote_has_no_manifest_to_verify(tmp_path: Path) -> None:
    assert not verify_manifest(tmp_path)


def test_files_that_changed_or_went_are_all_named(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as directory:
        for name in ("a", "b", "c"):
            (directory / name).write_text(name)
    (tmp_path / "out" / "a").write_text("x")
    (tmp_path / "out" / "c").unlink()
    with pytest.raises(DataError, match=r"a has sha256 .*; c is missing"):
        verify_manifest(tmp_path / "out")


def test_an_exception_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with atomic_directory(tmp_path / "out") as directory:
            (directory / "half").write_text("half")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="out exists; choose another output or pass --overwrite"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "sub" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_replaces_the_target_and_an_exception_keeps_it(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "extra").write_text("of the old one")
    with pytest.raises(KeyError), atomic_directory(tmp_path / "out", overwrite=True):
        raise KeyError("stop")
    assert (tmp_path / "out" / "sub" / "file").read_text() == "old"
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "sub" / "file").read_text() == "new"
    assert not (tmp_path / "out" / "extra").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_kill_9_while_writing_leaves_no_target_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    process = start_halfway(tmp_path / "out")
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == [f".out.tmp-{process.pid}"]
    write(tmp_path / "out", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_kill_9_while_overwriting_leaves_the_old_target(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    process = start_halfway(tmp_path / "out")
    process.kill()
    process.wait()
    assert (tmp_path / "out" / "sub" / "file").read_text() == "old"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_writing_removes_what_was_written_and_gives_its_exit_code(
    tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    process = start_halfway(tmp_path / "out")
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_kill_between_the_two_renames_loses_nothing_and_still_overwrites_nothing_unasked(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    os.rename(tmp_path / "out", tmp_path / f".out.old-{dead_pid()}")  # the state at that moment
    with pytest.raises(UsageError, match="exists"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "sub" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_running_process_writes_to_the_same_place_is_left_alone(tmp_path: Path) -> None:
    process = start_halfway(tmp_path / "out")
    write(tmp_path / "out", "mine")
    assert (tmp_path / f".out.tmp-{process.pid}" / "half").exists()
    process.kill()
    process.wait()


def test_names_with_wildcards_and_files_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in (f".run1.tmp-{dead_pid()}", ".run[1].tmp-notes"):
        (tmp_path / name).mkdir()
    write(tmp_path / "run[1]", "text")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_appears_when_it_is_whole_and_an_exception_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with atomic_file(target) as path:
        path.write_text("old")
        assert not target.exists()
    with pytest.raises(UsageError, match="out exists; choose another output or pass --overwrite"), atomic_file(target):
        pass

    def fail_halfway() -> None:
        with atomic_file(target, overwrite=True) as path:
            path.write_text("half")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail_halfway()
    assert target.read_text() == "old"
    with atomic_file(target, overwrite=True) as path:
        path.write_text("new")
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_file_that_a_killed_process_left_half_written_is_removed_by_the_next(tmp_path: Path) -> None:
    for name in (f".out.tmp-{dead_pid()}", f".out.tmp-{os.getppid()}"):
        (tmp_path / name).write_text("half")
    with atomic_file(tmp_path / "out") as path:
        path.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".out.tmp-{os.getppid()}", "out"]


def test_a_directory_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with (
        pytest.raises(UsageError, match="is a directory, but one file is to be written"),
        atomic_file(tmp_path / "out", overwrite=True),
    ):
        pass
    assert (tmp_path / "out" / "sub" / "file").read_text() == "old"


def run_convert(source: Path, target: Path, to: str, prefix: list[str]) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "gptoss_infer", "convert", str(source), str(target), "--to", to]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(("to", "name"), [("bf16", "out"), ("gguf", "out.gguf")])
def test_a_file_that_grows_too_large_exits_3_and_leaves_nothing_half_written(
    tmp_path: Path, to: str, name: str
) -> None:
    source = write_tiny(tmp_path / "base", SMALL)
    limited = ["sh", "-c", 'ulimit -f 64; exec "$@"', "sh"]  # 32 or 64 KiB a file, less than the weights
    done = run_convert(source, tmp_path / name, to, limited)
    assert done.returncode == 3, done.stderr
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(("to", "name"), [("bf16", "out"), ("gguf", "out.gguf")])
def test_a_full_disk_exits_3_and_leaves_nothing_half_written(tmp_path: Path, to: str, name: str) -> None:
    source = write_tiny(tmp_path / "base", SMALL)
    (tmp_path / "disk").mkdir()
    # A file system of 64 KiB in a mount namespace of its own; what is left on it is listed at the end.
    script = 'mount -t tmpfs -o size=64k tmpfs "$0" && { "$@"; echo "code $?"; ls -A "$0"; }'
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(tmp_path / "disk")]
    if shutil.which("unshare") is None or subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    done = run_convert(source, tmp_path / "disk" / name, to, mounted)
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == "code 3\n"
