"""Charts of what exports keep: what is drawn and written is what the files say, read back from the SVG by its ticks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from evals.__main__ import main
from evals.report import build_sections, render_report
from gptoss_infer.errors import run_command

Element = ElementTree.Element
HALF_PIXEL = 0.051  # positions are rounded to a tenth of a unit


class Figure:
    """One chart of a page: its caption, and its SVG."""

    def __init__(self, html: str) -> None:
        self.caption = re.sub(r"<[^>]*>", "", re.findall(r"<figcaption>(.*?)</figcaption>", html, re.DOTALL)[0])
        self.svg = ElementTree.fromstring(re.findall(r"<svg.*?</svg>", html, re.DOTALL)[0])
        self.texts = self.svg.findall("text")

    def marks(self) -> dict[str, Element]:
        """Dots and arrows by what their tooltip says before the colon, with `text` after it."""
        found = {}
        for element in self.svg:
            title = element.findtext("title")
            if title is not None:
                name, _, text = title.partition(": ")
                element.text = text
                found[name] = element
        return found

    def axis(self, along: str, *, within: tuple[float, float] = (0, 1e9)) -> Callable[[float], float]:
        """From a position to a value, by the first and the last tick of an axis whose labels lie `within` some x."""
        ticks = [
            (float(text.get(along, 0)), float((text.text or "").rstrip("%")))
            for text in self.texts
            if text.get("class") == "tick" and text.text not in ("layer", "")
            if (text.get("text-anchor") == "middle") == (along == "x")
            if within[0] <= float(text.get("x", 0)) <= within[1]
        ]
        (p0, v0), (p1, v1) = ticks[0], ticks[-1]
        return lambda position: v0 + (position - p0) * (v1 - v0) / (p1 - p0)

    def panels(self) -> list[tuple[float, float]]:
        rects = self.svg.findall("rect")
        return [(float(r.get("x", 0)), float(r.get("x", 0)) + float(r.get("width", 0))) for r in rects]


def figures_of(directory: Path) -> dict[str, Figure]:
    html = render_report(build_sections([directory]))
    found = [Figure(part) for part in re.findall(r"<figure.*?</figure>", html, re.DOTALL)]
    return {" ".join(figure.caption.split()): figure for figure in found}


def figure(figures: dict[str, Figure], start: str) -> Figure:
    (name,) = [name for name in figures if name.startswith(start)]
    return figures[name]


def weight(layer: int, name: str, *sums: float) -> dict[str, Any]:
    owner = "mlp.experts" if name in ("gate_up_proj", "down_proj") else "self_attn"
    keys = ("values", "changed", "delta_squared", "along", "residual_squared")
    return {"name": f"model.layers.{layer}.{owner}.{name}", **dict(zip(keys, sums, strict=True))}


WEIGHTS = [
    weight(0, "gate_up_proj", 1000, 510, 2.0, 1.9, 0.5),
    weight(1, "gate_up_proj", 1000, 430, 2.0, 2.1, 0.8),
    weight(0, "down_proj", 500, 40, 1.0, 0.97, 4.0),
    weight(1, "down_proj", 500, 60, 1.0, 12.5, 9.0),  # kept 1250%
    weight(0, "q_proj", 300, 300, 1.0, 1.0, 0.0),
    weight(0, "o_proj", 100, 50, 3.0, 2.8, 0.01),
]
LOSSES = {
    "task": {"base": (1.9, 2.5, 0.6), "merge": (0.8, 1.0, 0.3), "export": (0.81, 1.02, 0.29)},
    "unrelated": {"base": (0.0012, 0.002, 0.0), "merge": (0.0025, 0.004, 0.0), "export": (0.0094, 0.015, 0.0)},
}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A run's directory of which the export is all that is there."""
    (tmp_path / "recipe.yaml").write_text("version: 1\n")
    (tmp_path / "model").mkdir()
    report: dict[str, Any] = {"format": "mxfp4", "rounding": "systematic"}
    for name, models in LOSSES.items():
        keys = ("loss", "loss_analysis", "loss_final")
        report[f"losses on {name}"] = {m: dict(zip(keys, v, strict=True)) | {"exact": 1.0} for m, v in models.items()}
    compared = {"labels": 99.0, "loss_increase": 0.01, "gain": 1.1, "kl_to_merge": 0.002, "gain_kept": 0.9909}
    report |= {"compared": {"task": compared}, "weights": WEIGHTS}
    (tmp_path / "model" / "export.json").write_text(json.dumps(report))
    return tmp_path


def test_every_layer_shows_what_changed_what_was_kept_and_what_is_left_of_each_kind_of_weight(export: Path) -> None:
    figures = figures_of(export)
    expected = {  # values changed, kept, residual; attention over its weights
        "gate_up_proj, layer 0": (0.51, 0.95, math.sqrt(0.25)),
        "gate_up_proj, layer 1": (0.43, 1.05, math.sqrt(0.4)),
        "down_proj, layer 0": (0.08, 0.97, 2.0),
        "attention, layer 0": (350 / 400, 3.8 / 4, math.sqrt(0.01 / 4)),
    }
    charts = ("values changed", "update kept", "residual")
    for index, (title, factor) in enumerate(zip(charts, (100, 100, 1), strict=True)):
        chart = figure(figures, title)
        marks, value_at = chart.marks(), chart.axis("y")
        # A tick's label stands 4 units under its line.
        per_unit = abs(value_at(1) - value_at(0))
        for name, values in expected.items():
            assert marks[name].text == (f"{factor * values[index]:.4g}" + ("%" if factor == 100 else ""))
            drawn = value_at(float(marks[name].get("cy", "nan")) + 4)
            assert drawn == pytest.approx(factor * values[index], abs=2 * HALF_PIXEL * per_unit)


def test_a_layer_that_is_off_the_scale_is_an_arrow_with_its_value_in_the_caption(export: Path) -> None:
    chart = figure(figures_of(export), "update kept")
    assert "off the scale: down_proj, layer 1: 1250%" in " ".join(chart.caption.split())
    arrow = chart.marks()["down_proj, layer 1"]
    assert arrow.tag == "path"
    assert arrow.text == "1250%, off the scale"
    # The others are as far apart as if it were not there: from 95% to 105% takes at least a thirtieth of the height.
    value_at = chart.axis("y")
    assert abs(value_at(170) - value_at(0)) < 300


def test_losses_of_base_merge_and_export_are_drawn_and_written_per_set_and_channel(export: Path) -> None:
    chart = figure(figures_of(export), "loss of base, merge and export")
    written = [text.text for text in chart.texts if text.get("text-anchor") == "end"]
    marks = [element for element in chart.svg if element.find("title") is not None]
    for (name, models), panel in zip(LOSSES.items(), chart.panels(), strict=True):
        value_at = chart.axis("x", within=panel)
        per_unit = value_at(1) - value_at(0)
        assert f"on {name}" in [text.text for text in chart.texts]
        for index, channel in enumerate(("all labels", "analysis", "final")):
            for model, losses in models.items():
                assert f"{losses[index]:.4f}" in written
                title = f"{channel}, {model}: {losses[index]:.4f}"
                (mark,) = [
                    m for m in marks if m.findtext("title") == title and panel[0] <= float(m.get("cx", 0)) <= panel[1]
                ]
                assert value_at(float(mark.get("cx", 0))) == pytest.approx(losses[index], abs=2 * HALF_PIXEL * per_unit)
    assert "99.1% of the gain kept, loss +0.0100 over the merge's" in [text.text for text in chart.texts]


def test_a_loss_that_diverged_is_written_though_it_cannot_be_drawn(export: Path) -> None:
    path = export / "model" / "export.json"
    path.write_text(json.dumps({"losses on task": {"base": {"loss": 1.5}, "export": {"loss": math.nan}}}))
    chart = figure(figures_of(export), "loss of base, merge and export")
    assert chart.marks().keys() == {"all labels, base"}
    assert "nan" in [text.text for text in chart.texts]


def test_an_exported_checkpoint_has_a_report_of_its_own(export: Path, tmp_path: Path) -> None:
    out = tmp_path / "export.html"
    assert run_command(main, ["report", str(export / "model"), "--out", str(out)]) == 0
    assert "values changed" in out.read_text()


@pytest.mark.parametrize(
    "report",
    [
        {"format": "bf16", "weights": [{"name": "model.layers.0.self_attn.q_proj", "kept": 0.9}]},
        {"format": "mxfp4", "weights": "none", "losses on task": {"base": 3}, "compared": []},
        {"format": "mxfp4", "losses on task": {"base": {"exact": 0.5}}, "weights": [3, {"values": 1}]},
        {},
    ],
)
def test_an_export_without_these_parts_still_gives_a_report(export: Path, report: dict[str, Any]) -> None:
    (export / "model" / "export.json").write_text(json.dumps(report))
    assert not figures_of(export)


# A study: method -> (kept, half, unrelated increase, half) at two sizes

STUDY = {
    0.0001: {
        "merge": (1.0, 0.0, 0.0, 0.0), "nearest": (0.0, 0.0, 1e-6, 2e-6), "systematic": (0.91, 0.37, -2e-6, 5e-6),
        "torchao ceil": (-4.887, 19.7, 1e-3, 1e-5), "control": (1.13, 0.003, 3e-7, 1e-7),
    },
    0.019: {
        "merge": (1.0, 0.0, 0.0, 0.0), "nearest": (0.003, 0.002, -1.4e-4, 1e-4),
        "systematic": (0.9925, 0.01, 4e-5, 3e-5), "torchao ceil": (12.33, 3.7, 8.6e-3, 6.4e-3),
        "control": (1.165, 0.02, 2.4e-4, 2.4e-4),
    },
}  # fmt: skip


def write_study(directory: Path, sizes: dict[float, dict[str, tuple[float, ...]]], cells: int = 6) -> Path:
    rows = [
        {
            "rate": 0.1 * size, "delta_to_base": size, "gain": 10 * size, "method": method, "cells": cells,
            "kept": {"mean": kept, "half": half}, "unrelated_increase": {"mean": paid, "half": paid_half}, "exact": 0.5,
        }
        for size, methods in sizes.items()
        for method, (kept, half, paid, paid_half) in methods.items()
    ]  # fmt: skip
    directory.mkdir(exist_ok=True)
    (directory / "grid.json").write_text(json.dumps({"checkpoint": "builtin:addition", "draws": 3}))
    (directory / "summary.json").write_text(json.dumps({"rows": rows, "seconds": 1.0}))
    return directory


def interval_of(figure: Figure, mark: Element) -> tuple[float, float]:
    """Both ends of the line that is drawn right before a mark."""
    before = list(figure.svg)[list(figure.svg).index(mark) - 1]
    match = re.match(r"M([\d.]+) [\d.]+ H([\d.]+)", before.get("d", ""))
    assert match is not None
    return float(match[1]), float(match[2])


@pytest.mark.parametrize(
    ("title", "column", "factor", "digits"),
    [("share of the gain kept", 0, 100, 1), ("loss increase on unrelated", 2, 1000, 3)],
)
def test_a_study_shows_each_methods_mean_and_interval_at_each_size(
    tmp_path: Path, title: str, column: int, factor: float, digits: int
) -> None:
    chart = figure(figures_of(write_study(tmp_path / "study", STUDY)), title)
    headings = [text.text for text in chart.texts]
    assert headings.index("|D|/|W| 0.01%") < headings.index("|D|/|W| 1.9%")
    elements = [element for element in chart.svg if element.find("title") is not None]
    for (size, methods), panel in zip(STUDY.items(), chart.panels(), strict=True):
        value_at = chart.axis("x", within=panel)
        tolerance = 2 * HALF_PIXEL * (value_at(1) - value_at(0))
        inside = {
            (e.findtext("title") or "").split(",")[0]: e
            for e in elements
            if panel[0] <= float(e.get("cx") or re.findall(r"[\d.]+", e.get("d", ""))[0]) <= panel[1]
        }
        assert inside.keys() == methods.keys() - {"merge"}, "the merge is the line at 100% or 0"
        for method in ("nearest", "systematic", "control"):
            mean, half = (factor * number for number in methods[method][column : column + 2])
            mark = inside[method]
            assert value_at(float(mark.get("cx", "nan"))) == pytest.approx(mean, abs=tolerance), (size, method)
            if half:
                ends = [value_at(end) for end in interval_of(chart, mark)]
                assert ends == pytest.approx([mean - half, mean + half], abs=tolerance)
            assert f"{mean:z.{digits}f} ± {half:.{digits}f}" in [text.text for text in chart.texts]


def test_a_value_off_the_scale_is_an_arrow_with_the_value_beside_it_and_squashes_nothing(
    tmp_path: Path,
) -> None:
    chart = figure(figures_of(write_study(tmp_path / "study", STUDY)), "share of the gain kept")
    written = [text.text for text in chart.texts]
    assert "-488.7 ± 1,970.0" in written
    assert "1,233 ± 370" in written
    arrows = [e for e in chart.svg if (e.findtext("title") or "").endswith("off the scale")]
    (low, high), panels = arrows, chart.panels()
    assert low.get("d", "").startswith(f"M{panels[0][0]:.1f} ")
    assert high.get("d", "").startswith(f"M{panels[1][1]:.1f} ")
    for panel in panels:
        value_at = chart.axis("x", within=panel)
        assert value_at(panel[1]) - value_at(panel[0]) < 220


def test_all_sizes_of_a_study_share_the_scale_of_the_gain_and_its_table_has_every_row(tmp_path: Path) -> None:
    directory = write_study(tmp_path / "study", {size: STUDY[0.019] for size in (0.001, 0.002, 0.004, 0.008, 0.016)})
    html = render_report(build_sections([directory]))
    charts = [Figure(part) for part in re.findall(r"<figure.*?</figure>", html, re.DOTALL)]
    spans = [
        tuple(round(chart.axis("x", within=panel)(end), 1) for end in panel)
        for chart in charts
        if chart.caption.strip().startswith("share")
        for panel in chart.panels()
    ]
    assert len(spans) == 5
    assert max(abs(a - b) for one in spans for a, b in zip(one, spans[0], strict=True)) < 0.3
    (table,) = re.findall(r"<table>.*?</table>", html, re.DOTALL)
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", table)]
    assert len(rows) == 1 + 5 * len(STUDY[0.019])
    assert rows[3] == [
        "0.0001", "0.1000%", "0.0100", "systematic", "6", "99.25 ± 1.00", "0.0400 ± 0.0300", "50.0%"
    ]  # fmt: skip
    assert "checkpoint&#34;: &#34;builtin:addition" in html


def test_one_cell_and_no_unrelated_data_are_shown_without_what_is_not_known(tmp_path: Path) -> None:
    methods = {"merge": (1.0, math.nan, math.nan, math.nan), "nearest": (0.02, math.nan, math.nan, math.nan)}
    figures = figures_of(write_study(tmp_path / "study", {0.0015: methods}, cells=1))
    (name,) = figures
    assert name == "share of the gain kept, in %"
    assert "2.0" in [text.text for text in figures[name].texts]


def test_a_study_that_is_not_done_or_damaged_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_study(tmp_path / "study", STUDY)
    (directory / "summary.json").write_text('{"rows": [{"rate": 1}]}')
    assert run_command(main, ["report", str(directory)]) == 4
    assert "summary.json: not the summary of a study" in capsys.readouterr().err
    (directory / "summary.json").unlink()
    assert run_command(main, ["report", str(directory)]) == 4
    assert "no cell of the study is done; the same command goes on with it" in capsys.readouterr().err


def test_the_report_of_a_study_lands_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_study(tmp_path / "study", STUDY)
    assert run_command(main, ["report", str(directory)]) == 0
    assert capsys.readouterr().out == f"{directory / 'report.html'}\n"
    assert "share of the gain kept" in (directory / "report.html").read_text()
