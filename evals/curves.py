"""The curves of a training run, read from its `metrics.jsonl`, and the charts the report shows of them.

Each line of the file is a record with `step` and numbers under names such as `train/loss`, `train/lr`, `val/loss` and
`val/loss_final`; a number that is not finite is the text "NaN", "Infinity" or "-Infinity". Used by `evals.report`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from evals.charts import SMALL_HEIGHT, SMALL_WIDTH, LineChart, Point, Series, line_chart, smooth
from gptoss_infer.errors import DataError

Curves = dict[str, tuple[Point, ...]]
_STYLES = ("first", "second", "third", "fourth")


class TrainingCharts(NamedTuple):
    """The loss curve, large, and everything else that was logged, small."""

    loss: LineChart | None
    others: tuple[LineChart, ...]


def read_curves(path: Path) -> Curves:
    """The numbers of a metrics file by name, over steps; empty where there is no file.

    A step that was logged twice (after a resume) counts as logged last, and a half-written last line is passed over.
    Raises: DataError for a damaged line.
    """
    if not path.is_file():
        return {}
    values: dict[str, dict[float, float]] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                step = record["step"]
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{path}:{number}: not a metrics record with a step ({error})") from None
            for name, value in record.items():
                if "/" not in name:  # `step` and `time` are fields of the record
                    continue
                try:
                    values.setdefault(name, {})[step] = float(value)
                except (ValueError, TypeError):
                    raise DataError(f"{path}:{number}: {name} is {value!r}, expected a number") from None
    return {name: tuple(Point(step, steps[step]) for step in sorted(steps)) for name, steps in values.items()}


def training_charts(curves: Curves) -> TrainingCharts:
    """The loss chart, the losses by channel, and a small chart for every other curve."""
    loss = []
    if "train/loss" in curves:
        loss = [
            Series("train/loss, each step", curves["train/loss"], "faint"),
            Series("train/loss, smoothed", smooth(curves["train/loss"]), "first"),
        ]
    if "val/loss" in curves:
        loss.append(Series("val/loss", curves["val/loss"], "second", dots=True))
    by_channel = [_by_channel(curves, prefix) for prefix in ("train/loss_", "val/loss_")]
    rest = [name for name in sorted(curves) if not name.startswith(("train/loss", "val/loss"))]
    others = [chart for chart in by_channel if chart is not None]
    for name in rest:
        chart = line_chart(name, [Series(name, curves[name], "first")], width=SMALL_WIDTH, height=SMALL_HEIGHT)
        others += [chart] if chart is not None else []
    return TrainingCharts(line_chart("loss", loss), tuple(others))


def _by_channel(curves: Curves, prefix: str) -> LineChart | None:
    """The loss of each harmony channel, under names such as `val/loss_final`."""
    names = [name for name in sorted(curves) if name.startswith(prefix)]
    is_noisy = prefix.startswith("train")
    series = [
        Series(
            name.removeprefix(prefix),
            smooth(curves[name]) if is_noisy else curves[name],
            _STYLES[index % len(_STYLES)],
            dots=not is_noisy,
        )
        for index, name in enumerate(names)
    ]
    return line_chart(f"{prefix.removesuffix('_')} by channel", series, width=SMALL_WIDTH, height=SMALL_HEIGHT)
