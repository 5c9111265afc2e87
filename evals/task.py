"""What a task is: samples, how they are asked, and a pure function that grades a reply.

Here are only the types; the tasks themselves are in `evals.tasks`, one file each, and `evals.grading` decides in which
outcome a completion ends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from gptoss_infer.errors import DataError

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"


class Outcome(StrEnum):
    """How a sample ended: exactly one of these, chosen by `evals.grading.settle` in the order stated there."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TRUNCATED = "truncated"
    MALFORMED_HARMONY = "malformed_harmony"
    INFRA_ERROR = "infra_error"


@dataclass(frozen=True)
class Sample:
    """One question: `chat` is a chat record (`messages`, and `tools` where the task has them), `gold` what is
    expected."""

    id: str
    chat: dict[str, Json]
    gold: Json


class Call(NamedTuple):
    """A tool call as the model made it; `arguments` is None where its text is no JSON object."""

    name: str
    arguments: dict[str, Json] | None


class Reply(NamedTuple):
    """What a grader may see of a completion: the text of its `final` channel and its tool calls, never its
    reasoning."""

    final: str | None
    calls: tuple[Call, ...] = ()


class Grade(NamedTuple):
    """A verdict, the answer that was read from the reply, and why."""

    outcome: Outcome
    answer: str | None
    explanation: str


@dataclass(frozen=True)
class Task:
    """A benchmark: where its samples come from and how a reply to one is graded.

    `load(path)` reads the samples from `path`, or from the task's own source for None. `grade(sample, reply)` is pure
    and returns CORRECT, WRONG or NO_ANSWER; it is called only with a reply that has what the task `reads`. `version`
    goes up whenever the grading of the same reply could change, so that old scores are not compared with new ones.
    """

    name: str
    summary: str
    source: str
    version: int
    reads: Literal["final", "calls"]
    load: Callable[[Path | None], list[Sample]]
    grade: Callable[[Sample, Reply], Grade]


def samples_sha256(samples: Sequence[Sample]) -> str:
    """Hash of everything that is asked and expected: ids, prompts, tools and gold answers, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        line = json.dumps([sample.id, sample.chat, sample.gold], sort_keys=True, ensure_ascii=False)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def check_unique(samples: Sequence[Sample], source: str) -> list[Sample]:
    """The same samples as a list; DataError when there are none or two share an id."""
    if not samples:
        raise DataError(f"{source}: no samples; expected at least one line")
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise DataError(f"{source}: the id {sample.id!r} occurs twice; records are joined by id, so make it unique")
        seen.add(sample.id)
    return list(samples)
