"""`metrics.jsonl`: every number a run reports, one record per line, and the source of truth of all its curves.

Here: the append-only log with its exact rewind for resuming, and the reader of its records. Not here: copies of it in
dashboards (`gptoss_train.trackers`) and in the report (`evals`, from the file). Used by the training loop, on rank 0.

A line is one JSON object: `step` (int), `time` (Unix seconds), then the metrics, as numbers that read back bit for bit.
JSON has no NaN or infinity, yet a diverged loss must be on record: they are the strings "NaN", "Infinity" and
"-Infinity", which `float()` of Python and `Number()` of JavaScript read.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from gptoss_infer.errors import DataError

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_RESERVED = ("step", "time")


class Record(NamedTuple):
    """One line of the log."""

    step: int
    time: float  # Unix seconds
    values: dict[str, float]


class Rewound(NamedTuple):
    """What `MetricsLog.rewind` did: records kept, records moved away, and unreadable lines moved away."""

    kept: int
    dropped: int
    damaged: int


class MetricsLog:
    """Appends records to `path`; one writer at a time.

    Lines that no longer count go to `superseded` (`metrics.superseded.jsonl`), never away: those that `rewind` drops,
    and on opening a half-written last line that a kill left.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.superseded = path.with_suffix(f".superseded{path.suffix}")
        whole, newline, fragment = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
        if fragment:
            self._move_away([fragment + b"\n"], keep=[whole + newline])
        last = parse_record(whole.rpartition(b"\n")[2])
        self._last_step = last.step if last else 0
        self._file = path.open("ab")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one record and hand it to the operating system; it survives the death of this process.

        Raises: ValueError for a step before the last one (trackers refuse those) or a metric named `step` or `time`;
            TypeError for what is no number.
        """
        if step < self._last_step:
            raise ValueError(f"step is {step}, expected {self._last_step} or more; `rewind` before logging it again")
        record: dict[str, float | str] = {"step": step, "time": time.time()}
        for name, value in values.items():
            if name in _RESERVED:
                raise ValueError(f"metric {name!r} is a field of every record; give it another name")
            record[name] = _encode(name, value)
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._last_step = step

    def sync(self) -> None:
        """Force everything logged so far to the disk; call it before a checkpoint is published."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def rewind(self, step: int) -> Rewound:
        """Drop what came after `step`, the checkpoint a run resumes from, so that no step is on record twice.

        The lines go to `superseded` first and the file is replaced atomically: a kill in between may leave lines in
        both, never in neither. Kept lines keep their bytes.
        """
        self._file.close()
        keep: list[bytes] = []
        dropped: list[bytes] = []
        damaged: list[bytes] = []
        with self.path.open("rb") as file:
            for line in file:
                record = parse_record(line)
                (damaged if record is None else keep if record.step <= step else dropped).append(line)
        if dropped or damaged:
            self._move_away(dropped + damaged, keep=keep)
        self._file = self.path.open("ab")
        self._last_step = max(0, min(self._last_step, step))
        return Rewound(len(keep), len(dropped), len(damaged))

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _move_away(self, lines: list[bytes], *, keep: list[bytes]) -> None:
        from gptoss_infer.checkpoint.atomic import sync_directory  # its package imports torch

        with self.superseded.open("ab") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        part = self.path.with_suffix(".part")
        with part.open("wb") as file:
            file.writelines(keep)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)
        sync_directory(self.path.parent)


def read_metrics(path: Path) -> Iterator[Record]:
    """The complete records of a log, in the order they were written; a half-written last line is left out.

    Raises: DataError that names the line that is no record.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            record = parse_record(line)
            if record is None:
                raise DataError(
                    f"{path}:{number}: not a metrics record: {line[:80]!r}; expected a JSON object with step, time and "
                    "numbers. Resuming the run moves such lines away"
                )
            yield record


def parse_record(line: bytes) -> Record | None:
    """One line as a record, or None if it is not one (power loss can leave zeros or half a line)."""
    try:
        fields = json.loads(line)
        step, when = fields.pop("step"), fields.pop("time")
        values = {name: _decode(value) for name, value in fields.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    return Record(step, float(when), values) if isinstance(step, int) and isinstance(when, float | int) else None


def _encode(name: str, value: float) -> float | str:
    if not isinstance(value, float | int) or isinstance(value, bool):
        raise TypeError(f"metric {name!r} is a {type(value).__name__}, expected a float; call .item() on a tensor")
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _decode(value: object) -> float:
    if isinstance(value, str):
        return _NON_FINITE[value]
    if isinstance(value, float | int):
        return value
    raise ValueError(f"{value!r} is not a number")
