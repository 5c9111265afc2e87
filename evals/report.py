"""One self-contained HTML file about training runs and evaluations: `gptoss-eval report`.

Reads files only: `metrics.jsonl`, `recipe.yaml`, `model/export.json` and `environment.json` of a run directory,
evaluation directories, reports of exports and studies of them. No scripts and nothing fetched: styles and SVG are
inline, and a content security policy in the page forbids the rest. What a model wrote is untrusted text, so the
template escapes everything.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from evals.compare import Evaluation, Pair, compare, notes_on, read_evaluation
from evals.curves import TrainingCharts, read_curves, training_charts
from evals.exports import EXPORT_FILE, GRID_FILE, Export, Study, is_export, is_study, read_export, read_study
from evals.records import Record, is_evaluation, read_json, write_text
from evals.scores import NamedScore, Score, score
from evals.table import interval, outcome_text, percent
from evals.target import VARIANTS, is_run, read_recipe
from evals.task import Outcome
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


@dataclass(frozen=True)
class TrainingRun:
    """What a run directory tells of the training; parts that are not there (yet) are empty."""

    path: str
    charts: TrainingCharts
    recipe: str
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
    """A run directory with its export and evaluations, an export or a study alone, or all bare evaluations together.

    `groups` are the scores by task and effort; `settings` the `run.json` of each evaluation by name.
    """

    title: str
    run: TrainingRun | None
    groups: dict[tuple[str, str], list[NamedScore]]
    pairs: list[Pair]
    transcripts: list[Transcripts]
    settings: dict[str, str]
    export: Export | None = None
    study: Study | None = None

    @property
    def scores(self) -> list[NamedScore]:
        """All scores, task by task."""
        return [score for group in self.groups.values() for score in group]


def build_sections(directories: Sequence[Path]) -> list[Section]:
    """Read everything that a report of these directories shows.

    Raises: UsageError for a directory that is none of these; DataError for a damaged file in one.
    """
    sections, loose = [], []
    for path in directories:
        if is_run(path):
            sections.append(_run_section(path))
        elif is_evaluation(path):
            loose.append(_scored(path, str(path)))
        elif is_study(path):
            sections.append(replace(_section(path.resolve().name, None, []), study=read_study(path)))
        elif is_export(path):
            sections.append(replace(_section(path.resolve().name, None, []), export=read_export(path / EXPORT_FILE)))
        else:
            raise UsageError(
                f"{path}: neither a run directory (recipe.yaml) nor an evaluation (run.json), an exported checkpoint "
                f"({EXPORT_FILE}) or a study ({GRID_FILE})"
            )
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
    export = run / "model" / EXPORT_FILE
    environment = run / "environment.json"
    evaluations = [_scored(path, path.name) for path in sorted((run / "evals").glob("*")) if is_evaluation(path)]
    training = TrainingRun(
        path=str(run),
        charts=training_charts(read_curves(run / "metrics.jsonl")),
        recipe=(run / "recipe.yaml").read_text(encoding="utf-8"),
        environment=json.dumps(read_json(environment), indent=2) if environment.is_file() else "",
    )
    section = _section(run.resolve().name, training, sorted(evaluations, key=_variant_order))
    return replace(section, export=read_export(export) if export.is_file() else None)


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
    return Pair(a.name, b.name, comparisons, " ".join(notes_on(a.evaluation, b.evaluation)))


def _transcripts(evaluation: Evaluation, task: str, effort: str) -> list[tuple[Outcome, int, list[Record]]]:
    """For every outcome that occurred: how often, and the first few records."""
    records = [record for record in evaluation.records if (record.task, record.effort) == (task, effort)]
    by_outcome = [(outcome, [record for record in records if record.outcome is outcome]) for outcome in Outcome]
    return [(outcome, len(some), some[:_TRANSCRIPTS_PER_OUTCOME]) for outcome, some in by_outcome if some]


def _clip(text: str) -> str:
    """The text, cut where it is very long; the whole of it is in `samples.jsonl`."""
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}\n[{len(text) - _MAX_TEXT:,} more characters]"
