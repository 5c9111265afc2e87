"""The progress display: plain lines where nobody looks at a terminal, a bar where somebody does."""

from __future__ import annotations

import io

import pytest

from gptoss_train.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, *, steps: int, seconds_per_step: float, start_step: int = 0) -> list[str]:
    clock = Clock()
    with Progress(steps, start_step=start_step, stream=stream, clock=clock) as progress:
        for step in range(start_step + 1, steps + 1):
            clock.now += seconds_per_step
            progress.update(step, loss=2 / step, tokens_per_s=1234.5)
    return stream.getvalue().splitlines()


def test_plain_lines_come_at_the_first_step_every_ten_seconds_and_at_the_last() -> None:
    lines = run(io.StringIO(), steps=25, seconds_per_step=1.0)
    assert [line.split()[1] for line in lines] == ["1/25", "11/25", "21/25", "25/25"]
    assert lines[0] == "step 1/25  loss 2.0000  1,234 tokens/s  0m24s left"


def test_time_left_counts_only_the_steps_of_this_process() -> None:
    lines = run(io.StringIO(), steps=200, start_step=100, seconds_per_step=100.0)
    assert lines[0].endswith("2h45m left")


def test_a_terminal_gets_a_bar_and_no_colour_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = "".join(run(Terminal(), steps=3, seconds_per_step=1.0))
    assert "3/3" in coloured
    assert "loss 0.6667" in coloured
    assert "\x1b[38;5" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[38;5" not in "".join(run(Terminal(), steps=3, seconds_per_step=1.0))


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("TERM", "dumb")])
def test_ci_and_dumb_terminals_get_plain_lines(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    assert run(Terminal(), steps=1, seconds_per_step=1.0) == ["step 1/1  loss 2.0000  1,234 tokens/s  0m00s left"]
