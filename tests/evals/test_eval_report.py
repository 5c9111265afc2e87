"""The HTML report: self-contained, escaped, complete; and the geometry of its charts."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evals.__main__ import main
from evals.charts import Point, Series, line_chart, nice_ticks, smooth, thin
from evals.curves import read_curves, training_charts
from evals.report import build_sections, render_report
from gptoss_infer.errors import DataError, run_command

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += f"{data} " if self.open[-1:] != ["style"] else ""


def report_of(*directories: Path) -> str:
    return render_report(build_sections(directories))


@pytest.fixture
def run_directory(tmp_path: Path, write_evaluation: Callable, make_record: Callable) -> Path:
    """A training run with curves, a recipe, an export report and three evaluations."""
    directory = tmp_path / "myrun"
    outcomes = {str(n): "correct" if n < 8 else "wrong" for n in range(10)}
    attack = make_record(
        "10",
        "malformed_harmony",
        messages=[
            {"role": "assistant", "channel": "analysis", "recipient": None, "content": "<script>alert(1)</script>"},
            {"role": "assistant", "channel": "commentary", "recipient": "functions.f", "content": "{}"},
        ],
        defects=["missing_end@3"],
        explanation="missing_end@3",
        well_formed=False,
    )
    records = [make_record(*item) for item in outcomes.items()]
    write_evaluation("myrun/evals/model", [*records, attack])
    write_evaluation("myrun/evals/base", {str(n): "no_answer" for n in range(11)})
    write_evaluation("myrun/evals/adapter", {str(n): "correct" for n in range(11)}, max_tokens=7)
    for name, variant in (("base", "base"), ("adapter", "adapter")):
        path = directory / "evals" / name / "run.json"
        run = json.loads(path.read_text())
        path.write_text(json.dumps(run | {"target": run["target"] | {"variant": variant}}))
    (directory / "recipe.yaml").write_text("version: 1\nmodel:\n  checkpoint: builtin:addition\n")
    rows = [{"step": n, "time": 0.0, "train/loss": 3 / n, "train/lr": 1e-4} for n in range(1, 51)]
    rows += [{"step": 50, "time": 0.0, "val/loss": 0.5, "val/loss_final": 0.25}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 51, "tra')
    (directory / "model").mkdir()
    report = {"format": "mxfp4", "weights": [{"name": "layers.0.down_proj", "kept": 0.98765432}]}
    (directory / "model" / "export.json").write_text(json.dumps(report))
    return directory


def test_a_run_report_shows_everything_that_is_there(run_directory: Path) -> None:
    page = Page(report_of(run_directory))
    for part in (
        "myrun", "train/loss, smoothed", "val/loss", "train/lr", "builtin:addition", "layers.0.down_proj", "0.987654",
        "72.7%", "malformed_harmony", "to functions.f", "missing_end@3",
    ):  # fmt: skip
        assert part in page.text, part


def test_evaluations_come_in_order_and_are_compared_where_they_can_be(run_directory: Path) -> None:
    text = " ".join(Page(report_of(run_directory)).text.split())
    assert text.index("base 0.0%") < text.index("adapter 100.0%") < text.index("model 72.7%")
    assert "model with base addition medium 11 +72.7" in text
    assert "adapter with base: " in text
    assert "not asked alike (max_tokens: 64 and 7)" in text


def test_model_output_is_escaped_and_the_page_fetches_and_runs_nothing(run_directory: Path) -> None:
    html = report_of(run_directory)
    page = Page(html)
    assert "<script>alert(1)</script>" in page.text
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe", "object", "a")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "src"]
    assert "http-equiv" in html
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert "url(" not in html
    assert "@import" not in html


def test_channels_of_a_transcript_are_apart(run_directory: Path) -> None:
    page = Page(report_of(run_directory))
    classes = {attributes.get("class") for tag, attributes in page.tags if tag == "div"}
    assert {"message prompt", "message c-analysis", "message c-commentary", "message c-final"} <= classes


def test_bare_evaluations_share_a_section(write_evaluation: Callable, tmp_path: Path) -> None:
    a = write_evaluation("a", {"1": "correct"})
    b = write_evaluation("b", {"1": "wrong"})
    out = tmp_path / "both.html"
    assert run_command(main, ["report", str(a), str(b), "--out", str(out)]) == 0
    assert "-100.0" in Page(out.read_text()).text


def test_the_report_lands_in_the_run_and_is_replaced_but_nothing_else_is(run_directory: Path) -> None:
    path = run_directory / "report.html"
    for _ in range(2):
        assert run_command(main, ["report", str(run_directory)]) == 0
        assert Page(path.read_text()).text
    path.write_text("<p>notes of mine</p>")
    assert run_command(main, ["report", str(run_directory)]) == 2
    assert path.read_text() == "<p>notes of mine</p>"


def test_the_command_prints_scores_and_differences_of_all_models(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, ["report", str(run_directory)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.search(r"model +addition +medium +11 +72\.7% ", line) for line in lines)
    assert any(re.search(r"model with base +addition +medium +11 +0\.0% +72\.7% +\+72\.7", line) for line in lines)
    assert any(line.startswith("adapter with base: ") for line in lines)
    assert lines[-1] == str(run_directory / "report.html")


def test_a_directory_that_is_neither_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["report", str(tmp_path)]) == 2
    assert "neither a run directory" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("version: 1\n")
    assert "version: 1" in Page(report_of(tmp_path)).text


def test_the_template_is_installed_with_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "report.html.j2" in project["tool"]["setuptools"]["package-data"]["evals"]


def test_curves_keep_the_last_value_of_a_step_and_every_divergence(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "time": 9, "train/loss": 3.0}\n{"step": 2, "time": 9, "train/loss": "NaN"}\n'
        '{"step": 1, "time": 9, "train/loss": 2.5}\n{"step": 3, "ti'
    )
    (first, second) = read_curves(path)["train/loss"]
    assert first == (1, 2.5)
    assert math.isnan(second.y)
    chart = training_charts(read_curves(path)).loss
    assert chart is not None
    assert chart.n_not_finite == 1


def test_a_damaged_metrics_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 9}\n{"step": 2, "train/loss": "high"}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: train/loss is 'high'"):
        read_curves(path)


def test_lines_stay_inside_the_plot_and_end_where_the_values_say() -> None:
    chart = line_chart("loss", [Series("s", (Point(0, 1.0), Point(10, 3.0)), "first")])
    assert chart is not None
    assert chart.lines[0].path == f"M{chart.left:g} {chart.bottom:g} L{chart.right:g} {chart.top:g}"
    assert [tick.label for tick in chart.y_ticks] == ["1", "1.5", "2", "2.5", "3"]
    assert [tick.label for tick in chart.x_ticks] == ["0", "2", "4", "6", "8", "10"]


@pytest.mark.parametrize("points", [[], [Point(1, math.nan)]])
def test_nothing_finite_is_no_chart(points: list[Point]) -> None:
    assert line_chart("loss", [Series("s", tuple(points), "first")]) is None


def test_one_point_and_equal_values_are_drawn() -> None:
    for points in ((Point(5, 0.0),), (Point(1, 2.0), Point(2, 2.0))):
        chart = line_chart("flat", [Series("s", points, "first", dots=True)])
        assert chart is not None
        assert all(math.isfinite(dot.x) and math.isfinite(dot.y) for dot in chart.lines[0].dots)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (3.2, 3.21), (-5.0, 900.0), (1e-6, 5e-6), (0.0, 0.0), (7.0, 7.0)]
)
def test_ticks_are_few_round_and_enclose_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, 5)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low <= high <= ticks[-1]
    step = ticks[1] - ticks[0]
    assert re.fullmatch(r"(1|2|2\.5|5)0*e[+-]\d+", re.sub(r"\.?0+e", "e", f"{step:.6e}"))


def test_smoothing_starts_at_the_first_value_and_follows_a_constant() -> None:
    assert [point.y for point in smooth([Point(n, 2.0) for n in range(5)])] == pytest.approx([2.0] * 5)
    first, second = smooth([Point(0, 4.0), Point(1, 0.0)], weight=0.5)
    assert (first.y, second.y) == pytest.approx((4.0, 4 / 3))  # (0.5 * 4 + 0) * 0.5 / (1 - 0.25)


def test_long_lines_are_thinned_by_group_means() -> None:
    points = [Point(n, float(n % 2)) for n in range(1000)]
    thinned = thin(points)
    assert len(thinned) <= 400
    assert sum(point.y for point in thinned) / len(thinned) == pytest.approx(0.5, abs=0.2)
    assert thinned[-1].x == 999
