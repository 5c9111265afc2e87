"""An evaluation directory on disk: `run.json`, `samples.jsonl` and `scores.json`; written by `evals.runner`, read by
all.

`samples.jsonl` is the truth: one record per line, appended and flushed as each sample ends, never rewritten. A retry
appends a record for the same key, and the last one counts. A line that a kill left half-written is cut off when the
file is opened for more. `run.json` says what was asked of which model; `scores.json` can be computed again from the
other two.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from evals.task import Json, Outcome
from gptoss_infer.errors import DataError, UsageError

RECORD_VERSION = 1
RUN_FILE, SAMPLES_FILE, SCORES_FILE = "run.json", "samples.jsonl", "scores.json"


class Key(NamedTuple):
    """What identifies a record within a run."""

    task: str
    effort: str
    sample_id: str
    epoch: int


@dataclass(frozen=True)
class Record:
    """How one sample ended, with all that is needed to read it again: tokens in and out, messages, verdict.

    `messages` are the harmony messages that were read from the completion, each with `role`, `channel`, `recipient` and
    `content`. `well_formed` is None where a server took the answer apart, so that nobody knows. `error` is the engine's
    message for an infra_error, else None.
    """

    task: str
    effort: str
    sample_id: str
    epoch: int
    seed: int
    outcome: Outcome
    answer: str | None
    gold: Json
    explanation: str
    well_formed: bool | None
    defects: list[str]
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    prompt: list[Json]
    messages: list[dict[str, str | None]]
    token_ids: list[int]
    error: str | None = None
    version: int = RECORD_VERSION

    @property
    def key(self) -> Key:
        """What identifies the record."""
        return Key(self.task, self.effort, self.sample_id, self.epoch)


@contextmanager
def appending(directory: Path) -> Iterator[BinaryIO]:
    """Open `samples.jsonl` for more records, alone; cuts off what a kill left half-written and says so on stderr.

    Raises: UsageError while another process writes to the same directory.
    """
    path = directory / SAMPLES_FILE
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel, even after a kill -9
        except BlockingIOError:
            raise UsageError(f"{path}: another process is writing to it; wait for it or give another --out") from None
        end = _end_of_last_line(file)
        extra = file.seek(0, os.SEEK_END) - end
        if extra:
            file.truncate(end)
            print(f"{path}: cut off a half-written record of {extra} bytes; its sample runs again", file=sys.stderr)
        yield file


def append(file: BinaryIO, record: Record) -> None:
    """Write one record and hand it to the operating system, so that a kill of this process cannot take it back."""
    file.write(json.dumps(asdict(record), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    file.flush()


def read_records(directory: Path) -> dict[Key, Record]:
    """The records of a directory by key, the last one of each; a half-written last line is passed over.

    Raises: DataError for a line that is damaged or of another version.
    """
    path = directory / SAMPLES_FILE
    if not path.exists():
        return {}
    records: dict[Key, Record] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            record = _parse(line, f"{path}:{number}")
            records[record.key] = record
    return records


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of ours; DataError when it is not one. The values are checked where they are used."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); it was damaged after it was written") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: a {type(value).__name__}, expected an object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a JSON file as a whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_evaluation(directory: Path) -> bool:
    """Whether the directory holds an evaluation."""
    return (directory / RUN_FILE).is_file()


def _end_of_last_line(file: BinaryIO) -> int:
    """Offset behind the last newline."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - 65536)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        position = start
    return 0


def _parse(line: bytes, where: str) -> Record:
    try:
        fields = json.loads(line.decode("utf-8", "surrogatepass"))
        version = fields.get("version")
        if version != RECORD_VERSION:
            raise DataError(f"{where}: a record of version {version!r}, this program reads {RECORD_VERSION}")
        return Record(**{**fields, "outcome": Outcome(fields["outcome"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: not a record of an evaluation ({error}); the file was damaged") from None
