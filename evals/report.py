"""One self-contained HTML file about training runs and evaluations: `gptoss-eval report`.

Reads files only: `metrics.jsonl`, `recipe.yaml`, `model/export.json` and `environment.json` of a run directory,
and evaluation directories. No scripts and nothing fetched: styles and SVG are inline, and a content security policy in
the page forbids the rest. What a model wrote is untrusted text, so the template escapes everything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from evals.compare import Evaluation, Pair, compare, header_notes, read_evaluation
from evals.curves import TrainingCharts, read_curves, training_charts
from evals.records import Record, is_evaluation, read_json, write_text
from evals.scores import NamedScore, Score, score
from evals.table import interval, outcome_text, percent
from evals.target import VARIANTS, is_run, read_recipe
from evals.task import Json, Outcome
from gptoss_infer.errors import UsageError

GENERATOR = "gptoss-eval report"
_TRANSCRIPTS_PER_OUTCOME = 3
_MAX_TEXT = 4000  # characters of one message that are shown


@dataclass(frozen=True)
class ScoredEvaluation:
    """An evaluation with its name in the report and its scores."""

    name: str
    evaluation: Evaluation
    scores: tuple[Score, ...]


class Table(NamedTuple):
    """A part of a JSON report as a table; `head` is empty for names and values."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class TrainingRun:
    """What a run directory tells of the training; parts that are not there (yet) are empty."""

    path: str
    charts: TrainingCharts
    recipe: str
    export: list[Table]
    environment: str


@dataclass(frozen=True)
class Transcripts:
    """Samples of one evaluation at one task and effort: for every outcome how often it occurred, and the first few."""

    name: str
    task: str
    effort: str
    outcomes: list[tuple[Outcome, int, list[Record]]]


@dataclass(frozen=True)
class Section:
    """A run directory with its evaluations, or (`run` None) all bare evaluation directories together.

    `groups` are the scores by task and effort; `settings` the `run.json` of each evaluation by name.
    """

    title: str
    run: TrainingRun | None
    groups: dict[tuple[str, str], list[NamedScore]]
    pairs: list[Pair]
    transcripts: list[Transcripts]
    settings: dict[str, str]

    @property
    def scores(self) -> list[NamedScore]:
        """All scores, task by task."""
        return [score for group in self.groups.values() for score in group]


def build_sections(directories: Sequence[Path]) -> list[Section]:
    """Read everything that a report of these directories shows.

    Raises: UsageError for a directory that is neither a run nor an evaluation; DataError for a damaged file in one.
    """
    unknown = [str(path) for path in directories if not is_run(path) and not is_evaluation(path)]
    if unknown:
        raise UsageError(f"{', '.join(unknown)}: neither a run directory (recipe.yaml) nor an evaluation (run.json)")
    sections = [_run_section(path) for path in directories if is_run(path)]
    loose = [_scored(path, str(path)) for path in directories if not is_run(path)]
    return sections + ([_section("Evaluations", None, loose)] if loose else [])


def write_report(sections: Sequence[Section], path: Path) -> None:
    """Write the HTML file; UsageError where `path` is there and no earlier report."""
    if path.exists() and GENERATOR.encode() not in path.read_bytes()[:2000]:
        raise UsageError(f"{path} exists and is no report of ours; give another --out")
    html = render_report(sections)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html)


def render_report(sections: Sequence[Section]) -> str:
    """The report as HTML."""
    environment = Environment(
        loader=PackageLoader("evals", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "interval": interval, "outcomes": outcome_text, "clip": _clip}
    title = sections[0].title if len(sections) == 1 else f"{len(sections)} runs"
    return environment.get_template("report.html.j2").render(
        title=title, generator=GENERATOR, sections=sections, outcomes=list(Outcome)
    )


def _run_section(run: Path) -> Section:
    read_recipe(run)  # refuses a damaged one; it is shown as written
    export_report = run / "model" / "export.json"
    environment = run / "environment.json"
    evaluations = [_scored(path, path.name) for path in sorted((run / "evals").glob("*")) if is_evaluation(path)]
    training = TrainingRun(
        path=str(run),
        charts=training_charts(read_curves(run / "metrics.jsonl")),
        recipe=(run / "recipe.yaml").read_text(encoding="utf-8"),
        export=list(_tables(read_json(export_report))) if export_report.is_file() else [],
        environment=json.dumps(read_json(environment), indent=2) if environment.is_file() else "",
    )
    return _section(run.resolve().name, training, sorted(evaluations, key=_variant_order))


def _variant_order(scored: ScoredEvaluation) -> tuple[int, str]:
    """From base over adapter to the exported model."""
    variant = scored.evaluation.run["target"].get("variant")
    return -VARIANTS.index(variant) if variant in VARIANTS else 1, scored.name


def _scored(directory: Path, name: str) -> ScoredEvaluation:
    evaluation = read_evaluation(directory)
    epochs = evaluation.run["settings"]["epochs"]
    scores = [
        score(
            evaluation.records,
            task=task,
            effort=effort,
            n_expected=evaluation.run["tasks"][task]["n_samples"] * epochs,
        )
        for task, effort in evaluation.rows
    ]
    return ScoredEvaluation(name, evaluation, tuple(scores))


def _section(title: str, run: TrainingRun | None, scored: Sequence[ScoredEvaluation]) -> Section:
    groups: dict[tuple[str, str], list[NamedScore]] = {}
    for one in scored:
        for result in one.scores:
            groups.setdefault((result.task, result.effort), []).append(NamedScore(one.name, result))
    return Section(
        title=title,
        run=run,
        groups=groups,
        pairs=[_pair(a, b) for a, b in combinations(scored, 2)],
        transcripts=[
            Transcripts(one.name, task, effort, _transcripts(one.evaluation, task, effort))
            for one in scored
            for task, effort in one.evaluation.rows
        ],
        settings={one.name: json.dumps(one.evaluation.run, indent=2) for one in scored},
    )


def _pair(a: ScoredEvaluation, b: ScoredEvaluation) -> Pair:
    try:
        comparisons = compare(a.evaluation, b.evaluation)
    except UsageError as error:
        return Pair(a.name, b.name, [], str(error))
    return Pair(a.name, b.name, comparisons, " ".join(header_notes(a.evaluation, b.evaluation)))


def _transcripts(evaluation: Evaluation, task: str, effort: str) -> list[tuple[Outcome, int, list[Record]]]:
    """For every outcome that occurred: how often, and the first few records."""
    records = [record for record in evaluation.records if (record.task, record.effort) == (task, effort)]
    by_outcome = [(outcome, [record for record in records if record.outcome is outcome]) for outcome in Outcome]
    return [(outcome, len(some), some[:_TRANSCRIPTS_PER_OUTCOME]) for outcome, some in by_outcome if some]


def _tables(value: dict[str, Json]) -> Iterator[Table]:
    """A JSON report as tables: its plain values as one, then one for each list of objects or object of objects in
    it."""
    plain = [[key, _cell(item)] for key, item in value.items() if _rows(item) is None]
    if plain:
        yield Table("", [], plain)
    for key, item in value.items():
        rows = _rows(item)
        if rows:
            head = list(dict.fromkeys(name for row in rows for name in row))
            yield Table(key, head, [[_cell(row.get(name, "")) for name in head] for row in rows])


def _rows(value: Json) -> list[dict[str, Json]] | None:
    """A list of objects, or an object of objects with their keys put in as `name`; None for anything else."""
    if isinstance(value, dict):
        items: Iterable[Json] = [{"name": key, **item} for key, item in value.items() if isinstance(item, dict)]
        size = len(value)
    else:
        items, size = (value, len(value)) if isinstance(value, list) else ([], 0)
    rows = [item for item in items if isinstance(item, dict)]
    return rows if rows and len(rows) == size else None


def _cell(value: Json) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _clip(text: str) -> str:
    """The text, cut where it is very long; the whole of it is in `samples.jsonl`."""
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}\n[{len(text) - _MAX_TEXT:,} more characters]"
