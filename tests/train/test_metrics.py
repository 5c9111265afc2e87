"""The metrics log: what is written reads back bit for bit, through kills and rewinds, and nothing is lost."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_infer.errors import DataError
from gptoss_train.metrics import MetricsLog, Rewound, read_metrics

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def steps(path: Path) -> list[int]:
    return [record.step for record in read_metrics(path)]


@given(value=st.floats())
def test_every_float_reads_back_bit_for_bit_from_strict_json(
    tmp_path_factory: pytest.TempPathFactory, value: float
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log(3, {"loss": value})
    line = path.read_text()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (record,) = read_metrics(path)
    assert record.values["loss"].hex() == value.hex()


def test_a_diverged_loss_is_spelled_so_that_other_readers_understand_it(path: Path) -> None:
    with MetricsLog(path) as log:
        log.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    fields = json.loads(path.read_text())
    assert (fields["a"], fields["b"], fields["c"]) == ("NaN", "Infinity", "-Infinity")


def test_a_record_carries_its_step_and_the_time_it_was_logged(path: Path) -> None:
    before = time.time()
    with MetricsLog(path) as log:
        log.log(7, {"loss": 1.5, "eval/loss": 2})
    (record,) = read_metrics(path)
    assert (record.step, record.values) == (7, {"loss": 1.5, "eval/loss": 2})
    assert before <= record.time <= time.time()


def test_a_record_can_be_read_before_the_next_is_written(path: Path) -> None:
    with MetricsLog(path) as log:
        for step in range(3):
            log.log(step, {"loss": 1.0})
            assert steps(path)[-1] == step


def test_every_record_logged_before_a_kill_is_there(path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from gptoss_train.metrics import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]))\n"
        "for step in range(10**9):\n    log.log(step, {'loss': 1 / (1 + step)}); print(step, flush=True)"
    )
    training = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert training.stdout is not None
    seen = [int(training.stdout.readline()) for _ in range(200)]
    os.kill(training.pid, signal.SIGKILL)
    seen += [int(line) for line in training.stdout if line.endswith("\n")]
    training.wait()
    training.stdout.close()
    assert steps(path)[: len(seen)] == seen


def test_rewinding_keeps_the_bytes_up_to_the_checkpoint_and_moves_the_rest_aside(path: Path) -> None:
    with MetricsLog(path) as log:
        for step in range(6):
            log.log(step, {"loss": step / 3})
        log.log(5, {"eval/loss": 1.0})
        log.sync()
        lines = path.read_bytes().splitlines(keepends=True)
        assert log.rewind(3) == Rewound(kept=4, dropped=3, damaged=0)
        assert path.read_bytes() == b"".join(lines[:4])
        assert log.superseded.read_bytes() == b"".join(lines[4:])
        log.log(4, {"loss": -1.0})
        log.log(5, {"loss": -1.0})
        assert log.rewind(4) == Rewound(kept=5, dropped=1, damaged=0)
    assert steps(path) == [0, 1, 2, 3, 4]
    assert len(log.superseded.read_bytes().splitlines()) == 4


def test_rewinding_past_the_end_changes_nothing(path: Path) -> None:
    with MetricsLog(path) as log:
        log.log(1, {"loss": 1.0})
        before = path.stat()
        assert log.rewind(5) == Rewound(kept=1, dropped=0, damaged=0)
        assert path.stat().st_ino == before.st_ino
        assert not log.superseded.exists()


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_half_written_last_line_is_moved_aside_on_opening(path: Path, cut: int) -> None:
    with MetricsLog(path) as log:
        log.log(1, {"loss": 1.0})
        log.log(2, {"loss": 2.0})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert steps(path) == [1]
    with MetricsLog(path) as log:
        log.log(2, {"loss": 3.0})
    assert steps(path) == [1, 2]
    half = whole.splitlines(keepends=True)[1][:-cut]
    assert log.superseded.read_bytes() == half + b"\n"


def test_lines_that_power_loss_turned_to_zeros_do_not_stop_a_resume(path: Path) -> None:
    with MetricsLog(path) as log:
        log.log(1, {"loss": 1.0})
    with path.open("ab") as file:
        file.write(b"\0" * 50 + b"\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a metrics record"):
        list(read_metrics(path))
    with MetricsLog(path) as log:
        assert log.rewind(1) == Rewound(kept=1, dropped=0, damaged=1)
    assert steps(path) == [1]


@pytest.mark.parametrize(
    "line", ["[]", "3", '{"step": 1}', '{"step": "1", "time": 1}', '{"step": 1, "time": 1, "a": {}}']
)
def test_a_line_that_is_no_record_is_named(path: Path, line: str) -> None:
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:1"):
        list(read_metrics(path))


def test_a_step_cannot_be_logged_twice_over_without_a_rewind(path: Path) -> None:
    with MetricsLog(path) as log:
        log.log(5, {"loss": 1.0})
    with MetricsLog(path) as log:
        with pytest.raises(ValueError, match="step is 4, expected 5 or more"):
            log.log(4, {"loss": 1.0})
        log.rewind(3)
        log.log(4, {"loss": 1.0})


def test_what_is_no_number_is_refused_by_name(path: Path) -> None:
    with MetricsLog(path) as log:
        with pytest.raises(TypeError, match="'loss' is a str"):
            log.log(1, {"loss": "low"})  # type: ignore[dict-item]
        with pytest.raises(ValueError, match="'time' is a field of every record"):
            log.log(1, {"time": 1.0})
    assert path.read_bytes() == b""
