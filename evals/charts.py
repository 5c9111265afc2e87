"""Geometry of the charts in the HTML report: where lines, dots, ticks and labels go, in SVG user units. Pure.

The SVG itself is written by `report.html.j2`, so that all text in it is escaped by the template engine. Used by
`evals.report`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

_MAX_POINTS = 400  # of one line; more are averaged in groups, since no screen shows them apart
SMALL_WIDTH, SMALL_HEIGHT = 300.0, 170.0  # of a chart that shares its line of the page with two others
_MAX_NOTED = 3  # values off the scale that are named in the caption; all are in tooltips
Beyond = Literal["", "low", "high"]
_MARGIN_LEFT, _MARGIN_RIGHT, _MARGIN_TOP, _MARGIN_BOTTOM = 56.0, 16.0, 10.0, 28.0


class Point(NamedTuple):
    """A step and a value."""

    x: float
    y: float


class Tick(NamedTuple):
    """A position along an axis and its label."""

    position: float
    label: str


class Dot(NamedTuple):
    """A marked value: where, what a tooltip says, and whether it lies beyond the `low` or `high` end of the scale."""

    x: float
    y: float
    label: str
    beyond: Beyond = ""


class Axis(NamedTuple):
    """A scale of values: what it shows in any case, and which values it need not show, to be drawn on its edge."""

    shown: tuple[float, ...] = ()
    limits: tuple[float, float] = (-math.inf, math.inf)
    reference: float | None = None  # a value that is drawn as a line
    is_share: bool = False  # written as percentages

    def span(self, values: Iterable[float]) -> tuple[float, float]:
        """The least and the largest of what is shown in any case and of the values that are within the limits."""
        within = [value for value in values if not beyond(value, *self.limits)]
        return min([*within, *self.shown], default=0.0), max([*within, *self.shown], default=1.0)

    def text(self, value: float) -> str:
        """The value as it is written."""
        return f"{round(100 * value, 10):.4g}%" if self.is_share else f"{value:.4g}"


_PLAIN = Axis()


def beyond(value: float, low: float, high: float) -> Beyond:
    """Which end of a scale the value is beyond."""
    return "low" if value < low else "high" if value > high else ""


@dataclass(frozen=True)
class Series:
    """A named line; `style` is the CSS class that colours it, `dots` marks each of its points."""

    name: str
    points: tuple[Point, ...]
    style: str
    dots: bool = False


@dataclass(frozen=True)
class Line:
    """A series as drawn: SVG path data, and dots where it has them."""

    name: str
    style: str
    path: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class LineChart:
    """Lines over steps or layers, ready to be drawn; positions are in user units of the `width` x `height` view box.

    `n_not_finite` points could not be drawn: a loss that diverged must not vanish from the picture unsaid.
    """

    title: str
    over: str
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    reference: float | None
    lines: tuple[Line, ...]
    n_not_finite: int

    @property
    def notes(self) -> str:
        """What could not be drawn where it is."""
        notes = [f"{self.n_not_finite} values that are not finite are left out"] if self.n_not_finite else []
        off = [f"{line.name}, {dot.label}" for line in self.lines for dot in line.dots if dot.beyond]
        if off:
            more = f" and {len(off) - _MAX_NOTED} more" if len(off) > _MAX_NOTED else ""
            notes.append(f"off the scale: {'; '.join(off[:_MAX_NOTED])}{more}")
        return "; ".join(notes)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    width: float = 720,
    height: float = 260,
    over: str = "step",
    axis: Axis = _PLAIN,
) -> LineChart | None:
    """A chart of the series over a common scale; None when none of them has a finite point."""
    thinned = [(one, thin([point for point in one.points if math.isfinite(point.y)])) for one in series]
    drawn = [(one, points) for one, points in thinned if points]
    if not drawn:
        return None
    left, right, top, bottom = _MARGIN_LEFT, width - _MARGIN_RIGHT, _MARGIN_TOP, height - _MARGIN_BOTTOM
    every = [point for _, points in drawn for point in points]
    x_low, x_high = min(point.x for point in every), max(point.x for point in every)
    y_values = nice_ticks(*axis.span(point.y for point in every), 5)
    y_low, y_high = y_values[0], y_values[-1]

    def place(point: Point) -> tuple[float, float]:
        x = left + (right - left) * ((point.x - x_low) / (x_high - x_low) if x_high > x_low else 0.5)
        y = min(max(point.y, y_low), y_high)
        return round(x, 1), round(bottom - (bottom - top) * (y - y_low) / (y_high - y_low), 1)

    lines = []
    for one, points in drawn:
        places = [place(point) for point in points]
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in places)
        dots = [
            Dot(x, y, f"{over} {point.x:g}: {axis.text(point.y)}", beyond(point.y, y_low, y_high))
            for (x, y), point in zip(places, points, strict=True)
        ]
        lines.append(Line(one.name, one.style, path, tuple(dots) if one.dots else ()))
    x_values = [value for value in nice_ticks(x_low, x_high, 6) if x_low <= value <= x_high and value == int(value)]
    return LineChart(
        title=title,
        over=over,
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        x_ticks=tuple(Tick(place(Point(value, y_low))[0], f"{value:,g}") for value in x_values),
        y_ticks=tuple(Tick(place(Point(x_low, value))[1], axis.text(value)) for value in y_values),
        reference=None if axis.reference is None else place(Point(x_low, axis.reference))[1],
        lines=tuple(lines),
        n_not_finite=sum(not math.isfinite(point.y) for one in series for point in one.points),
    )


def smooth(points: Sequence[Point], weight: float = 0.9) -> tuple[Point, ...]:
    """Exponential moving average without start-up bias (divided by 1 - weight^t, as in Adam)."""
    average, result = 0.0, []
    for count, point in enumerate((point for point in points if math.isfinite(point.y)), start=1):
        average = weight * average + (1 - weight) * point.y
        result.append(Point(point.x, average / (1 - weight**count)))
    return tuple(result)


def thin(points: Sequence[Point]) -> list[Point]:
    """At most 400 points: the means of equal groups, where there are more."""
    size = math.ceil(len(points) / _MAX_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [Point(group[-1].x, sum(point.y for point in group) / len(group)) for group in groups]


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values from at or below `low` to at or above `high`; at least two."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / max(count - 1, 1)
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]
