"""Results as tables for people: scores of a run, and comparisons. Printed on stdout by `gptoss-eval`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evals.compare import Pair
from evals.scores import NamedScore
from evals.task import Outcome, Task

_PIPE_WIDTH = 140  # columns where there is no terminal to ask


def print_scores(scores: Sequence[NamedScore], file: TextIO | None = None) -> None:
    """One row per evaluation, task and effort."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("model", "task", "effort"):
        table.add_column(heading)
    for heading in ("n", "accuracy", "95% interval", "valid harmony", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("outcomes")
    for name, score in scores:
        n = f"{score.n_scored:,}" if score.is_complete else f"{score.n_scored:,} of {score.n_expected:,}"
        table.add_row(
            escape(name),
            score.task,
            score.effort,
            n,
            percent(score.accuracy),
            interval(score.accuracy_interval),
            percent(score.format_validity),
            "-" if score.mean_completion_tokens is None else f"{score.mean_completion_tokens:,.0f}",
            outcome_text(score.outcomes),
        )
    _console(file).print(table)


def print_pairs(pairs: Sequence[Pair], file: TextIO | None = None) -> None:
    """One row per pair, task and effort, B - A in percentage points; notes below."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("B with A", "task", "effort"):
        table.add_column(heading)
    for heading in ("questions", "A", "B", "B - A", "95% interval", "p", "gained", "lost"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [(pair, one) for pair in pairs for one in pair.comparisons]
    margins = {one.margin for _, one in rows if one.margin is not None}
    for margin in margins:  # one at most: a comparison has one margin
        table.add_column(f"not worse by {100 * margin:g} points")
    for pair, one in rows:
        row = [
            escape(f"{pair.name_b} with {pair.name_a}"),
            one.task,
            one.effort,
            f"{one.n_questions:,}",
            percent(one.accuracy_a),
            percent(one.accuracy_b),
            f"{100 * one.difference:+.1f}",
            f"{100 * one.interval.low:+.1f} to {100 * one.interval.high:+.1f}",
            f"{one.p_value:.2g}",
            str(len(one.gained)),
            str(len(one.lost)),
        ]
        table.add_row(*row, *(["shown" if one.non_inferior else "not shown"] if margins else []))
    console = _console(file)
    if rows:
        console.print(table)
    for pair in pairs:
        if pair.note:
            console.print(f"{pair.name_b} with {pair.name_a}: {pair.note}", markup=False, highlight=False)


def print_tasks(tasks: Sequence[Task], file: TextIO | None = None) -> None:
    """One row per task, with where its data comes from."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("task", "what it asks", "data"):
        table.add_column(heading)
    for task in tasks:
        table.add_row(task.name, escape(task.summary), escape(task.source))
    _console(file).print(table)


def percent(value: float | None) -> str:
    """A share as a percentage; a dash for none."""
    return "-" if value is None else f"{100 * value:.1f}%"


def interval(ends: Sequence[float] | None) -> str:
    """The ends of an interval as percentages; a dash for none."""
    return "-" if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


def outcome_text(outcomes: dict[str, int]) -> str:
    """The outcomes that occurred, with their counts."""
    return ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in Outcome if outcomes.get(outcome)) or "-"


def _console(file: TextIO | None) -> Console:
    file = file or sys.stdout
    return Console(file=file, width=None if file.isatty() else _PIPE_WIDTH)
