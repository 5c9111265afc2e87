"""Two evaluations of the same questions, compared question by question: `gptoss-eval compare`.

The difference is B - A. It refuses to compare what was not asked in the same way. The header that an evaluation forced
(`--header`) is not held against it: it belongs to a model that never saw harmony, and is named in the result instead.
Nor is the seed: the questions are paired, the sampling noise need not be; nor a server's precision, which it chooses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.records import RUN_FILE, Record, is_evaluation, read_json, read_records
from evals.statistics import Interval, paired_difference, sign_test
from evals.task import Outcome
from gptoss_infer.errors import DataError, UsageError

MUST_AGREE = ("epochs", "max_tokens", "temperature", "top_p", "date", "dtype")


@dataclass(frozen=True)
class Evaluation:
    """An evaluation directory as read from disk: its `run.json` and its records."""

    directory: Path
    run: dict[str, Any]
    records: tuple[Record, ...]

    @property
    def rows(self) -> list[tuple[str, str]]:
        """The (task, effort) pairs that it asked for."""
        return [(task, effort) for task in self.run["tasks"] for effort in self.run["settings"]["efforts"]]


@dataclass(frozen=True)
class Comparison:
    """The paired difference of one task at one effort.

    `gained` and `lost` are the questions where B is right more often, or less often, than A (the flips, for one epoch).
    `n_unpaired` questions lack a scored sample on one side. `non_inferior` is None where no margin was asked for.
    """

    task: str
    effort: str
    n_questions: int
    n_unpaired: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    interval: Interval
    p_value: float
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    margin: float | None
    non_inferior: bool | None


@dataclass(frozen=True)
class Pair:
    """Two named evaluations, compared where they can be; `note` says why not, or what else to know."""

    name_a: str
    name_b: str
    comparisons: list[Comparison]
    note: str


def read_evaluation(directory: Path) -> Evaluation:
    """The evaluation in a directory; UsageError where there is none, DataError where its `run.json` lacks parts."""
    if not is_evaluation(directory):
        raise UsageError(f"{directory}: no {RUN_FILE} in it; expected a directory written by gptoss-eval run")
    run = read_json(directory / RUN_FILE)
    missing = [part for part in ("settings", "target", "tasks") if not isinstance(run.get(part), dict)]
    if missing:
        raise DataError(f"{directory / RUN_FILE}: lacks {', '.join(missing)}; it was not written by gptoss-eval run")
    return Evaluation(directory, run, tuple(read_records(directory).values()))


def compare(a: Evaluation, b: Evaluation, *, margin: float | None = None) -> list[Comparison]:
    """Every task and effort that both have, B against A.

    With a margin, B is non-inferior where the whole 95% interval of the difference lies above -margin; a verdict needs
    every question on both sides.

    Raises: UsageError where data or settings differ, or nothing is in both.
    """
    _check_same_questions(a, b)
    rows = [row for row in a.rows if row in b.rows]
    if not rows:
        raise UsageError(f"{a.directory} has {a.rows}, {b.directory} has {b.rows}: no task and effort is in both")
    return [_compare_row(a, b, task, effort, margin) for task, effort in rows]


def notes_on(a: Evaluation, b: Evaluation) -> list[str]:
    """Notes for the reader: an assistant header that one model was given and the other was not, and servers."""
    one, other = (evaluation.run["settings"].get("header") for evaluation in (a, b))
    notes = []
    if one != other:
        notes.append(f"note: the assistant header put in front of every answer was {one!r} for A and {other!r} for B")
    for name, target in (("A", a.run["target"]), ("B", b.run["target"])):
        if target.get("server"):
            notes.append(f"note: {name} was asked in {target.get('mode')} mode at {target['server']}.")
    return notes


def _check_same_questions(a: Evaluation, b: Evaluation) -> None:
    precisions = {evaluation.run["settings"].get("dtype") for evaluation in (a, b)}
    must_agree = [name for name in MUST_AGREE if name != "dtype" or "served" not in precisions]
    differing = [
        f"{name}: {a.run['settings'].get(name)!r} and {b.run['settings'].get(name)!r}"
        for name in must_agree
        if a.run["settings"].get(name) != b.run["settings"].get(name)
    ]
    for task in a.run["tasks"].keys() & b.run["tasks"].keys():
        for part in ("version", "samples_sha256"):
            one, other = a.run["tasks"][task].get(part), b.run["tasks"][task].get(part)
            if one != other:
                differing.append(f"{task} {part}: {one!r} and {other!r}")
    if differing:
        raise UsageError(
            f"{a.directory} and {b.directory} were not asked alike ({'; '.join(differing)}); "
            "evaluate one of them again with the settings and data of the other"
        )


def _compare_row(a: Evaluation, b: Evaluation, task: str, effort: str, margin: float | None) -> Comparison:
    means_a, means_b = (_question_means(one.records, task, effort) for one in (a, b))
    paired = [question for question in means_a if question in means_b]
    n_unpaired = a.run["tasks"][task]["n_samples"] - len(paired)
    if not paired:
        raise UsageError(f"{task} at {effort} effort: no question has a scored sample in both; finish the runs first")
    if margin is not None and n_unpaired:
        raise UsageError(
            f"{task} at {effort} effort: {n_unpaired} questions lack a scored sample in {a.directory} or "
            f"{b.directory}; a verdict with --margin needs all of them, so run gptoss-eval run again to finish them"
        )
    differences = {question: means_b[question] - means_a[question] for question in paired}
    gained = tuple(question for question, value in differences.items() if value > 0)
    lost = tuple(question for question, value in differences.items() if value < 0)
    mean, interval = paired_difference(list(differences.values()))
    return Comparison(
        task=task,
        effort=effort,
        n_questions=len(paired),
        n_unpaired=n_unpaired,
        accuracy_a=sum(means_a[question] for question in paired) / len(paired),
        accuracy_b=sum(means_b[question] for question in paired) / len(paired),
        difference=mean,
        interval=interval,
        p_value=sign_test(len(gained), len(lost)),
        gained=gained,
        lost=lost,
        margin=margin,
        non_inferior=None if margin is None else interval.low > -margin,
    )


def _question_means(records: Iterable[Record], task: str, effort: str) -> dict[str, float]:
    """Share of correct epochs of every question that has a scored sample."""
    epochs: dict[str, list[bool]] = {}
    for record in records:
        if (record.task, record.effort) == (task, effort) and record.outcome is not Outcome.INFRA_ERROR:
            epochs.setdefault(record.sample_id, []).append(record.outcome is Outcome.CORRECT)
    return {question: sum(values) / len(values) for question, values in epochs.items()}
