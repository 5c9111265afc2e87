"""Directories and files that are complete or absent: written aside, synced to disk, then renamed into place.

A crash at any moment leaves the old state or the new one, plus at most a `.NAME.tmp-PID` that the next write to the
same place removes. A directory's `MANIFEST.json` holds the sha256 of every file in it, so that a flipped bit is found
before it is trained on (safetensors itself has no checksum).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptoss_infer.errors import DataError, UsageError

MANIFEST = "MANIFEST.json"


@contextmanager
def atomic_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `target`; on a clean exit it becomes `target`, on an exception it is removed.

    Raises: UsageError if `target` exists and `overwrite` is False (nothing is ever replaced unasked).
    """
    target, partial = _prepare(target, overwrite=overwrite)
    partial.mkdir()
    try:
        yield partial
        write_manifest(partial)
        _sync_tree(partial)
        _replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield the path of a temporary sibling of `target`, to be written as a file; then as `atomic_directory`.

    Raises: UsageError if `target` is a directory, or exists and `overwrite` is False.
    """
    target, partial = _prepare(target, overwrite=overwrite)
    if target.is_dir():
        raise UsageError(f"{target} is a directory, but one file is to be written; choose another output")
    try:
        yield partial
        _sync_file(partial)
        os.replace(partial, target)
        sync_directory(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def _prepare(target: Path, *, overwrite: bool) -> tuple[Path, Path]:
    """Return `target`, absolute, and the sibling to write first; UsageError if it exists and may not be replaced."""
    target = Path(os.path.abspath(target))
    _remove_leftovers(target)  # first: it may bring back an old target
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists; choose another output or pass --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target, target.parent / f".{target.name}.tmp-{os.getpid()}"


def _replace(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; an old target steps aside first, and comes back if the rename fails."""
    if not target.exists():
        os.rename(partial, target)
        sync_directory(target.parent)
        return
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        os.rename(old, target)
        raise
    sync_directory(target.parent)
    shutil.rmtree(old)


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left beside `target`; bring back an old target that a kill left aside."""
    for old in _leftovers(target, "old"):
        if not target.exists():
            os.rename(old, target)
    for leftover in (*_leftovers(target, "tmp"), *_leftovers(target, "old")):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _leftovers(target: Path, kind: str) -> list[Path]:
    """Return the `.NAME.KIND-PID` beside `target` whose process is gone (or is this one, which holds none)."""
    found = []
    for path in target.parent.glob(f".{glob.escape(target.name)}.{kind}-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdecimal() and (int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists()):
            found.append(path)
    return found


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_manifest(directory: Path) -> None:
    """Write `MANIFEST.json` with the sha256 of every other file below `directory`."""
    files = {
        str(path.relative_to(directory)): file_sha256(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (directory / MANIFEST).write_text(json.dumps({"sha256": files}, indent=2) + "\n")


def verify_manifest(directory: Path) -> bool:
    """Check every file against `MANIFEST.json`; False if there is none (a checkpoint that others wrote).

    Raises: DataError naming the files that are missing or changed.
    """
    path = directory / MANIFEST
    if not path.exists():
        return False
    try:
        listed = dict(json.loads(path.read_text())["sha256"].items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); restore the directory from its source") from None
    bad = []
    for name, expected in listed.items():
        file = directory / name
        if not file.is_file():
            bad.append(f"{name} is missing")
        elif (got := file_sha256(file)) != expected:
            bad.append(f"{name} has sha256 {got[:12]}…, expected {expected[:12]}…")
    if bad:
        raise DataError(
            f"{directory}: {'; '.join(bad)}. The files changed after they were written; restore or rebuild them."
        )
    return True


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            _sync_file(path)
    for path in (*(p for p in directory.rglob("*") if p.is_dir()), directory):
        sync_directory(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as f:
        os.fsync(f.fileno())


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
