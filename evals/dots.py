"""Geometry of dot charts in the HTML report: rows of marked values with intervals, in panels side by side. Pure.

A row is a method or a channel, a panel a size of update or a set of samples. Every value is also written, so that one
that is off the scale (drawn as an arrow on the edge) can be read. The SVG is written by `report.html.j2`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evals.charts import Axis, Beyond, Tick, beyond, nice_ticks

_WIDTH = 960.0
_MAX_PANELS = 2  # side by side
_CHARACTER = 6.6  # width in the labels' size, at most for digits and on average for letters
_HEADING, _BOTTOM = 18.0, 24.0
_GAP = 18.0
_PADDING = 0.05  # of a scale, on both sides
_TICK_SPACE = 48.0


class Value(NamedTuple):
    """A value of a row: `half` is that of its interval (NaN for none), `text` what is written of it."""

    name: str
    number: float
    half: float
    text: str
    style: str


class Panel(NamedTuple):
    """Values by row on a scale of their own, under two lines of heading."""

    heading: str
    subheading: str
    rows: Mapping[str, tuple[Value, ...]]
    axis: Axis


class Mark(NamedTuple):
    """A value as drawn: its dot or, off the scale, arrow; and SVG path data of its interval, capped where it ends."""

    x: float
    y: float
    style: str
    label: str
    beyond: Beyond
    whisker: str


class Text(NamedTuple):
    """A value as written; `x` is its right end."""

    x: float
    y: float
    text: str
    style: str


@dataclass(frozen=True)
class PlacedPanel:
    """A panel as drawn."""

    heading: str
    subheading: str
    left: float
    right: float
    ticks: tuple[Tick, ...]
    reference: float | None
    marks: tuple[Mark, ...]
    texts: tuple[Text, ...]


@dataclass(frozen=True)
class DotChart:
    """Panels over common rows, ready to be drawn; all positions are in user units of the view box."""

    title: str
    width: float
    height: float
    top: float
    bottom: float
    rows: tuple[Tick, ...]
    panels: tuple[PlacedPanel, ...]
    keys: tuple[tuple[str, str], ...]  # name and style of each value of a row, where a row has several


def dot_charts(title: str, panels: Sequence[Panel]) -> list[DotChart]:
    """Charts of the panels, two side by side at most; rows are in the order in which they first occur."""
    count = math.ceil(len(panels) / _MAX_PANELS)
    size = math.ceil(len(panels) / count) if count else 1
    return [_chart(title, panels[start : start + size]) for start in range(0, len(panels), size)]


def _chart(title: str, panels: Sequence[Panel]) -> DotChart:
    names = list(dict.fromkeys(name for panel in panels for name in panel.rows))
    values = [value for panel in panels for row in panel.rows.values() for value in row]
    keys = list(dict.fromkeys((value.name, value.style) for value in values))
    row_height = 16.0 + 6.0 * len(keys)
    label_width = _CHARACTER * max((len(name) for name in names), default=0) + 12
    column = _CHARACTER * max((len(value.text) for value in values), default=0) + 10
    texts_width = column * len(keys)
    plot_width = (_WIDTH - label_width) / len(panels) - texts_width - _GAP
    top = 8.0 + _HEADING * (2 if any(panel.subheading for panel in panels) else 1)
    rows = {name: top + row_height * (index + 0.5) for index, name in enumerate(names)}
    placed = []
    for index, panel in enumerate(panels):
        left = round(label_width + index * (plot_width + texts_width + _GAP), 1)
        placed.append(_place(panel, rows, (left, round(left + plot_width, 1)), column))
    bottom = top + row_height * len(names)
    return DotChart(
        title, _WIDTH, bottom + _BOTTOM, top, bottom, tuple(Tick(y, name) for name, y in rows.items()), tuple(placed),
        tuple(keys) if len(keys) > 1 else (),
    )  # fmt: skip


def _place(panel: Panel, rows: dict[str, float], span: tuple[float, float], column: float) -> PlacedPanel:
    """Draw a panel between two x; `column` is the width of one written value."""
    axis, (left, right) = panel.axis, span
    low, high = _scale(panel)

    def place(number: float) -> float:
        inside = min(max(number, low), high)
        return round(left + (right - left) * (inside - low) / (high - low), 1)

    marks, texts = [], []
    for name, values in panel.rows.items():
        for index, value in enumerate(values):
            style = value.style if len(values) > 1 else ""
            texts.append(Text(round(right + column * (index + 1), 1), round(rows[name], 1), value.text, style))
            if not math.isfinite(value.number):
                continue
            y = round(rows[name] + 6.0 * (index - (len(values) - 1) / 2), 1)
            label = f"{name}, {value.name}: {value.text}"
            ends = [value.number - value.half, value.number + value.half]
            whisker = _whisker(ends, (low, high), [place(end) for end in ends], y) if value.half > 0 else ""
            marks.append(Mark(place(value.number), y, value.style, label, beyond(value.number, low, high), whisker))
    wanted = nice_ticks(low, high, max(2, int((right - left) / _TICK_SPACE)))
    ticks = tuple(Tick(place(number), axis.text(number)) for number in wanted if low <= number <= high)
    reference = None if axis.reference is None else place(axis.reference)
    return PlacedPanel(panel.heading, panel.subheading, left, right, ticks, reference, tuple(marks), tuple(texts))


def _scale(panel: Panel) -> tuple[float, float]:
    """The ends of a panel's scale: those of all intervals that are within the limits, and some room."""
    low, high = panel.axis.span(_ends(panel))
    room = _PADDING * (high - low) or abs(high) or 1.0
    return low - room, high + room


def _ends(panel: Panel) -> Iterator[float]:
    for values in panel.rows.values():
        for value in values:
            if math.isfinite(value.number):
                half = value.half if math.isfinite(value.half) else 0.0
                yield from (value.number - half, value.number + half)


def _whisker(ends: Sequence[float], scale: tuple[float, float], places: Sequence[float], y: float) -> str:
    """SVG path data of an interval, with a cap at each end that is on the scale."""
    caps = [
        f" M{place:g} {y - 3:g} V{y + 3:g}"
        for end, place in zip(ends, places, strict=True)
        if scale[0] <= end <= scale[1]
    ]
    return f"M{places[0]:g} {y:g} H{places[1]:g}{''.join(caps)}"
