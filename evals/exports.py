"""What an export kept, as charts and tables: from its `export.json`, and from the directory of a study of exports.

Both are written by `gptoss-train`. A chart whose numbers a file lacks is left out; the tables show all that is there.
Used by `evals.report`.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evals.charts import SMALL_HEIGHT, SMALL_WIDTH, Axis, LineChart, Point, Series, line_chart
from evals.dots import DotChart, Panel, Value, dot_charts
from evals.records import read_json
from evals.task import Json
from gptoss_infer.errors import DataError

EXPORT_FILE = "export.json"
GRID_FILE, SUMMARY_FILE = "grid.json", "summary.json"
_KINDS = {"gate_up_proj": "first", "down_proj": "second", "attention": "third", "router": "fourth"}
_SUMS = ("values", "changed", "delta_squared", "along", "residual_squared")
_LOSSES = "losses on "  # starts the key of each set of samples
_MODELS = {"base": "none", "merge": "first", "export": "second"}
_KEPT = Axis(shown=(0.0, 100.0), limits=(-50.0, 150.0), reference=100.0)  # of a study's methods, in %
_FAR = 4.0  # times the median method's loss increase, or its interval's end, is off the scale


class Table(NamedTuple):
    """A part of a JSON report as a table; `head` is empty for names and values."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Export:
    """What an `export.json` tells: how each layer's update survived, what it cost on samples, and everything in it."""

    layers: tuple[LineChart, ...]
    losses: tuple[DotChart, ...]
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Study:
    """What a study of exports found, method by method and size by size."""

    path: str
    charts: tuple[DotChart, ...]
    table: Table
    has_control: bool  # some methods are held against a control of their own
    grid: str


def is_export(directory: Path) -> bool:
    """Whether the directory is an exported checkpoint with its report."""
    return (directory / EXPORT_FILE).is_file()


def is_study(directory: Path) -> bool:
    """Whether the directory is that of `gptoss-train study`."""
    return (directory / GRID_FILE).is_file()


def read_export(path: Path) -> Export:
    """Read an export's report."""
    report = read_json(path)
    return Export(tuple(_layer_charts(report)), tuple(_loss_charts(report)), tuple(_tables(report)))


def read_study(directory: Path) -> Study:
    """Read a study's summary.

    Raises: DataError if it is not there yet, or damaged.
    """
    path = directory / SUMMARY_FILE
    if not path.is_file():
        raise DataError(f"{path} is not there yet: no cell of the study is done; the same command goes on with it")
    try:
        rows = [_study_row(row) for row in read_json(path)["rows"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not the summary of a study ({type(error).__name__}: {error})") from None
    return Study(
        str(directory), tuple(_study_charts(rows)), _study_table(rows), any(row.method == "control" for row in rows),
        json.dumps(read_json(directory / GRID_FILE), indent=2),
    )  # fmt: skip


# An export's report


def _layer_charts(report: dict[str, Json]) -> Iterator[LineChart]:
    """Lines over layers, by kind of weight: how many values changed, and how much of the update is in them."""
    layers = _layer_sums(report.get("weights"))
    ratios = (
        ("values changed", Axis(shown=(0.0,), is_share=True), lambda s: _ratio(s["changed"], s["values"])),
        (
            "update kept",
            Axis(shown=(0.9, 1.1), limits=(-0.5, 1.5), reference=1.0, is_share=True),
            lambda s: _ratio(s["along"], s["delta_squared"]),
        ),
        (
            "residual, relative to the update",
            Axis(shown=(0.0,)),
            lambda s: math.sqrt(_ratio(s["residual_squared"], s["delta_squared"])),
        ),
    )
    for title, axis, ratio in ratios:
        series = []
        for kind, by_layer in layers.items():
            points = tuple(Point(layer, ratio(by_layer[layer])) for layer in sorted(by_layer))
            series.append(Series(kind, points, _KINDS[kind], dots=True))
        chart = line_chart(title, series, width=SMALL_WIDTH, height=SMALL_HEIGHT, over="layer", axis=axis)
        if chart is not None:
            yield chart


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _layer_sums(weights: Json) -> dict[str, dict[int, dict[str, float]]]:
    """An export's sums by kind of weight and layer; weights without sums, or of no layer, are left out."""
    layers: dict[str, dict[int, dict[str, float]]] = {}
    for row in weights if isinstance(weights, list) else []:
        sums = [row.get(name) for name in _SUMS] if isinstance(row, dict) else [None]
        match = re.search(r"\blayers\.(\d+)\..*?(\w+)$", str(row.get("name"))) if isinstance(row, dict) else None
        numbers = [float(value) for value in sums if isinstance(value, int | float)]
        if match is None or len(numbers) < len(_SUMS):
            continue
        kind = match[2] if match[2] in _KINDS else "attention"
        total = layers.setdefault(kind, {}).setdefault(int(match[1]), dict.fromkeys(_SUMS, 0.0))
        for name, number in zip(_SUMS, numbers, strict=True):
            total[name] += number
    return {kind: layers[kind] for kind in _KINDS if kind in layers}


def _loss_charts(report: dict[str, Json]) -> list[DotChart]:
    """Losses of base, merge and export on each set of samples, by channel."""
    compared = report.get("compared")
    panels = []
    for key, models in report.items():
        if not key.startswith(_LOSSES) or not isinstance(models, dict):
            continue
        name = key.removeprefix(_LOSSES)
        channels = [key for key in _numbers(models.get("base")) if key == "loss" or key.startswith("loss_")]
        rows = {
            channel.removeprefix("loss_") if channel != "loss" else "all labels": tuple(
                Value(model, losses[channel], math.nan, f"{losses[channel]:.4f}", style)
                for model, style in _MODELS.items()
                if channel in (losses := _numbers(models.get(model)))
            )
            for channel in channels
        }
        if rows:
            figures = _numbers(compared.get(name)) if isinstance(compared, dict) else {}
            panels.append(Panel(f"on {name}", _compared_text(figures), rows, Axis(shown=(0.0,))))
    return dot_charts("loss of base, merge and export, in nats", panels)


def _numbers(value: Json) -> dict[str, float]:
    """The numbers of an object; empty for anything else."""
    items = value.items() if isinstance(value, dict) else ()
    return {key: float(number) for key, number in items if isinstance(number, int | float)}


def _compared_text(figures: dict[str, float]) -> str:
    """What the export costs on a set of samples."""
    parts = []
    if "gain_kept" in figures:
        parts.append(f"{100 * figures['gain_kept']:.1f}% of the gain kept")
    if "loss_increase" in figures:
        parts.append(f"loss {figures['loss_increase']:+.4f} over the merge's")
    return ", ".join(parts)


# A study


class _StudyRow(NamedTuple):
    """A method at one size of update; pairs are a mean over cells and half of its 95% interval, in shares or nats."""

    rate: float
    size: float
    gain: float
    method: str
    cells: int
    kept: tuple[float, float]
    increase: tuple[float, float]
    exact: float


def _study_row(row: dict[str, Any]) -> _StudyRow:
    kept, increase = ((float(row[key]["mean"]), float(row[key]["half"])) for key in ("kept", "unrelated_increase"))
    rate, size, gain, exact = (float(row[key]) for key in ("rate", "delta_to_base", "gain", "exact"))
    return _StudyRow(rate, size, gain, str(row["method"]), int(row["cells"]), kept, increase, exact)


def _study_charts(rows: list[_StudyRow]) -> list[DotChart]:
    """Gain kept, on one scale for all sizes of update, and loss increase, on one for each, both against the merge."""
    groups: dict[float, list[_StudyRow]] = {}
    for row in rows:
        if row.method != "merge":
            groups.setdefault(row.rate, []).append(row)
    ends = [100 * end for group in groups.values() for row in group for end in _ends(row.kept)]
    axis = _KEPT._replace(shown=_KEPT.span(ends))
    kept, increases = [], []
    for group in groups.values():
        heading = f"|D|/|W| {100 * group[0].size:.2g}%"
        marks = {row.method: (_value("kept", row.kept, 100, 1),) for row in group}
        kept.append(Panel(heading, f"gain {group[0].gain:.2g} nats", marks, axis))
        far = [1000 * max(map(abs, _ends(row.increase))) for row in group if any(_ends(row.increase))]
        if far:
            limit = _FAR * statistics.median(far)
            marks = {row.method: (_value("increase", row.increase, 1000, 3),) for row in group}
            increases.append(Panel(heading, "", marks, Axis((0.0,), (-limit, limit), reference=0.0)))
    interval = ", with 95% interval" if any(row.cells > 1 for row in rows) else ""
    differ = "; scales differ" if len(increases) > 1 else ""
    return [
        *dot_charts(f"share of the gain kept, in %{interval}", kept),
        *dot_charts(f"loss increase on unrelated data, in 0.001 nats{interval}{differ}", increases),
    ]


def _value(name: str, pair: tuple[float, float], factor: float, digits: int) -> Value:
    """A mean and its interval in another unit, marked and written."""
    mean, half = factor * pair[0], factor * pair[1]
    return Value(name, mean, half, _plus_minus(mean, half, digits), "first")


def _plus_minus(mean: float, half: float, digits: int) -> str:
    """A mean with half of its interval, where it is known; large ones need no digits after the point."""
    if not math.isfinite(mean):
        return "-"
    digits = digits if abs(mean) < 1000 else 0
    return f"{mean:z,.{digits}f}" + (f" ± {half:,.{digits}f}" if math.isfinite(half) else "")


def _study_table(rows: list[_StudyRow]) -> Table:
    head = ["rate", "|D|/|W|", "gain, nats", "method", "cells", "gain kept, %", "unrelated, 0.001 nats", "exact"]
    cells = [
        [
            f"{row.rate:g}", f"{row.size:.4%}", f"{row.gain:.4f}", row.method, str(row.cells),
            _plus_minus(100 * row.kept[0], 100 * row.kept[1], 2),
            _plus_minus(1000 * row.increase[0], 1000 * row.increase[1], 4), f"{row.exact:.1%}",
        ]
        for row in rows
    ]  # fmt: skip
    return Table("all figures", head, cells)


def _ends(pair: tuple[float, float]) -> list[float]:
    """The ends of an interval that are known."""
    mean, half = pair
    return [end for end in ((mean - half, mean + half) if math.isfinite(half) else (mean,)) if math.isfinite(end)]


# Tables


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
