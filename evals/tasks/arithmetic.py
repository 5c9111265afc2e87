"""`addition`: sums of two numbers, generated, so that it needs no download and no model can have seen the answers.

The split is a pure rule on the numbers: a pair is held out when the SHA-256 of "SEED:SMALLER+LARGER" falls in the first
tenth of its range. `a+b` and `b+a` are therefore always on the same side, and training and held-out problems never
meet, whoever generates them and in whatever order. The seed of the task is 0.
"""

from __future__ import annotations

import hashlib
from itertools import product
from pathlib import Path
from typing import Literal

from evals.task import Sample, Task
from evals.tasks import exact

_MAX_DIGITS = 3  # all pairs are enumerated: 810,000 of three digits take about a second


def is_held_out(a: int, b: int, *, seed: int = 0) -> bool:
    """Whether the problem belongs to the held-out tenth; the same for `a + b` and `b + a`."""
    return _hash(f"{seed}:{min(a, b)}+{max(a, b)}") < 0.1


def problems(split: Literal["train", "held_out"], *, digits: int = 2, seed: int = 0) -> list[tuple[int, int]]:
    """All ordered pairs of `digits`-digit numbers in the split, shuffled by `seed` alone."""
    if not 1 <= digits <= _MAX_DIGITS:
        raise ValueError(f"digits is {digits}, expected 1 to {_MAX_DIGITS}")
    numbers = range(10 ** (digits - 1), 10**digits)
    wanted = split == "held_out"
    pairs = [pair for pair in product(numbers, numbers) if is_held_out(*pair, seed=seed) == wanted]
    return sorted(pairs, key=lambda pair: _hash(f"order:{seed}:{pair[0]}+{pair[1]}"))


def load(path: Path | None) -> list[Sample]:
    """The held-out two-digit sums, or the samples of a file in the format of `exact`."""
    if path is not None:
        return exact.load(path)
    return [
        Sample(f"{a}+{b}", {"messages": [{"role": "user", "content": f"{a}+{b}"}]}, str(a + b))
        for a, b in problems("held_out")
    ]


def _hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


TASK = Task(
    name="addition",
    summary="held-out two-digit sums, such as 17+46; exact match of the final channel",
    source="generated; or --data addition=FILE.jsonl in the format of 'exact'",
    version=1,
    reads="final",
    load=load,
    grade=exact.grade,
)
