"""Reading JSON-lines files of samples, with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from evals.task import Json
from gptoss_infer.errors import DataError


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Json]]]:
    """Yield (line number from 1, object) of every line that is not blank.

    Raises: DataError where a line is not UTF-8, not JSON or not an object.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                value = json.loads(raw)
            except ValueError as error:
                raise DataError(
                    f"{path}:{number}: not a line of JSON ({error}); expected one object per line"
                ) from None
            if not isinstance(value, dict):
                raise DataError(f"{path}:{number}: a {type(value).__name__}, expected one JSON object per line")
            yield number, value


def text_field(record: dict[str, Json], field: str, where: str) -> str:
    """`record[field]` as text that is not empty; DataError naming `where` otherwise."""
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {field!r} is {value!r}, expected text; the fields here are {sorted(record)}")
    return value
