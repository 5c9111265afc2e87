"""Scores from records: accuracy with its interval, outcomes, format validity and tokens, per task and effort. Pure.

Every sample but an infra_error counts in the accuracy, whatever became of it; an infra_error says nothing about the
model and is only counted. A completion is valid harmony when it stopped by itself and parsed without a defect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from evals.records import Record
from evals.statistics import Estimate, Interval, clustered_proportion
from evals.task import Outcome

SCORES_VERSION = 1


@dataclass(frozen=True)
class Score:
    """The result of one task at one effort.

    `accuracy`, `format_validity` and the token means are None where no sample was scored, `format_validity` also where
    a server took the answers apart. `n_expected` is the number of samples that the run asked for: questions times
    epochs.
    """

    task: str
    effort: str
    n_questions: int
    n_scored: int
    n_expected: int
    accuracy: float | None
    accuracy_interval: Interval | None
    format_validity: float | None
    format_validity_interval: Interval | None
    outcomes: dict[str, int]
    mean_prompt_tokens: float | None
    mean_completion_tokens: float | None

    @property
    def is_complete(self) -> bool:
        """Whether every sample that was asked for has been scored."""
        return self.n_scored == self.n_expected


class NamedScore(NamedTuple):
    """A score, and what the evaluation it is from is called where several are shown together."""

    name: str
    score: Score


def score(records: Iterable[Record], *, task: str, effort: str, n_expected: int) -> Score:
    """The score of one task at one effort; records of others are left out."""
    chosen = [record for record in records if (record.task, record.effort) == (task, effort)]
    scored = [record for record in chosen if record.outcome is not Outcome.INFRA_ERROR]
    accuracy = _proportion([(record.sample_id, record.outcome is Outcome.CORRECT) for record in scored])
    known = [(record.sample_id, record.well_formed) for record in scored if record.well_formed is not None]
    validity = _proportion(known)
    counts = Counter(record.outcome for record in chosen)
    return Score(
        task=task,
        effort=effort,
        n_questions=len({record.sample_id for record in scored}),
        n_scored=len(scored),
        n_expected=n_expected,
        accuracy=accuracy.mean if accuracy else None,
        accuracy_interval=accuracy.interval if accuracy else None,
        format_validity=validity.mean if validity else None,
        format_validity_interval=validity.interval if validity else None,
        outcomes={outcome.value: counts[outcome] for outcome in Outcome},
        mean_prompt_tokens=_mean([record.prompt_tokens for record in scored]),
        mean_completion_tokens=_mean([record.completion_tokens for record in scored]),
    )


def to_json(scores: Sequence[Score]) -> dict[str, Any]:
    """What `scores.json` holds."""
    return {"version": SCORES_VERSION, "scores": [asdict(one) | {"is_complete": one.is_complete} for one in scores]}


def _proportion(rows: Sequence[tuple[str, bool]]) -> Estimate | None:
    """The share that holds, over (question, whether it held) rows, clustered by question."""
    questions: dict[str, list[bool]] = {}
    for sample_id, holds in rows:
        questions.setdefault(sample_id, []).append(holds)
    return clustered_proportion(list(questions.values())) if questions else None


def _mean(values: Sequence[int]) -> float | None:
    return sum(values) / len(values) if values else None
