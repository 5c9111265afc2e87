"""wandb, trackio and TensorBoard: really run, killed and resumed offline, then read back and held against the log."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from gptoss_infer.errors import MachineError
from gptoss_train.metrics import MetricsLog, read_metrics
from gptoss_train.trackers import Trackers

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"optim": {"lr": 1e-4, "betas": [0.9, 0.999]}, "lora": {"rank": 8}}
CANARY = "canary-7f3a91"

# Stands for training: logs steps FIRST..LAST, then is killed, or closes its trackers and prints how many packets its
# network namespace, which has no route anywhere, refused: one for every connection and name lookup that was tried.
TRAINING = """
import json, math, os, signal, sys
from pathlib import Path
from gptoss_train.metrics import MetricsLog
from gptoss_train.trackers import Trackers

run, first, last, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
with MetricsLog(run / "metrics.jsonl") as log:
    log.rewind(first - 1)
    with Trackers(["wandb", "trackio", "tensorboard"], run_dir=run, metrics=log.path, project="a project",
                  name="first try", config=json.loads(sys.argv[5]), close_timeout_s=120):
        for step in range(first, last + 1):
            loss = math.nan if step == 7 else 1 / (3 + step)
            log.log(step, {"train/loss": loss, "lr": 1e-4 * step, "tokens": 1000 * step, "attempt": first})
            if step % 10 == 0:
                log.log(step, {"eval/loss": math.pi / step})
        if end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
names, values = Path("/proc/self/net/snmp").read_text().splitlines()[:2]
print(dict(zip(names.split(), values.split()))["OutNoRoutes"])
"""


class Run(NamedTuple):
    directory: Path
    home: Path
    stdout: str
    isolated: bool


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 12 steps killed, then resumed from a checkpoint at step 5 and trained to step 20."""
    directory, home = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("home")
    isolate = ["unshare", "--user", "--map-root-user", "--net"]
    isolated = shutil.which("unshare") is not None and subprocess.run([*isolate, "true"], check=False).returncode == 0
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HOME": str(home),
        # None of these may reach a tracker: secrets, places to send data to, and a launch with other processes.
        **{"HF_TOKEN": CANARY, "WANDB_API_KEY": CANARY, "MY_SECRET": CANARY},
        **{"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "TRACKIO_SPACE_ID": "someone/elsewhere"},
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"},
    }

    def train(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*(isolate if isolated else []), sys.executable, "-c", TRAINING, str(directory), *arguments]
        return subprocess.run(
            [*command, json.dumps(CONFIG)], env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    killed = train("1", "12", "kill")
    assert killed.returncode == -9, killed.stderr
    resumed = train("6", "20", "close")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    return Run(directory, home, resumed.stdout, isolated)


def by_step(rows: Iterator[tuple[int, dict[str, float]]]) -> dict[int, dict[str, float]]:
    """Rows of one step as one, since wandb and TensorBoard keep no rows."""
    steps: dict[int, dict[str, float]] = defaultdict(dict)
    for step, values in rows:
        steps[step] |= values
    return {step: dict(sorted(values.items())) for step, values in steps.items()}


def logged(run: Run) -> dict[int, dict[str, float]]:
    return by_step((record.step, record.values) for record in read_metrics(run.directory / "metrics.jsonl"))


def wandb_runs(run: Run) -> list[dict]:
    path = Path(__file__).with_name("wandb_offline.py")
    spec = importlib.util.spec_from_file_location("wandb_offline", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [module.read_run(file) for file in sorted(run.directory.glob("trackers/wandb/offline-run-*/*.wandb"))]


def wandb_curves(history: list) -> dict[int, dict[str, float]]:
    return by_step(
        (step, {name: value for name, value in row.items() if not name.startswith("_")}) for step, row in history
    )


def same(got: object, want: object) -> bool:
    """Equality in which NaN equals NaN."""
    return repr(got) == repr(want)


def test_the_log_holds_the_kept_steps_of_the_killed_run_and_all_of_the_resumed_one(run: Run) -> None:
    attempts = {step: values["attempt"] for step, values in logged(run).items()}
    assert attempts == {step: 1 if step <= 5 else 6 for step in range(1, 21)}


def test_the_newest_offline_wandb_run_equals_the_log_with_every_step_and_its_time(run: Run) -> None:
    newest = wandb_runs(run)[-1]
    assert same(wandb_curves(newest["history"]), logged(run))
    assert {key: newest["config"][key] for key in CONFIG} == CONFIG
    times = {step: row["_timestamp"] for step, row in newest["history"]}
    records = {record.step: record.time for record in read_metrics(run.directory / "metrics.jsonl")}
    assert times == pytest.approx(records, abs=1e-6)


def test_wandb_keeps_one_id_over_kill_and_resume(run: Run) -> None:
    killed, resumed = wandb_runs(run)
    assert killed["run_id"] == resumed["run_id"]
    assert resumed["project"] == "a project"


def test_a_tracker_takes_in_everything_logged_before_training_was_killed(run: Run) -> None:
    steps = wandb_curves(wandb_runs(run)[0]["history"])
    assert sorted(steps) == list(range(1, 13))
    assert {values["attempt"] for values in steps.values()} == {1}


def test_trackio_holds_one_run_that_equals_the_log_row_by_row(run: Run) -> None:
    (database,) = run.directory.glob("trackers/trackio/*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT step, metrics, run_name FROM metrics ORDER BY id").fetchall()
        config = json.loads(connection.execute("SELECT config FROM configs").fetchone()[0])
    got = [(step, {name: float(value) for name, value in json.loads(metrics).items()}) for step, metrics, _ in rows]
    want = [
        (record.step, {name: float(value) for name, value in record.values.items()})
        for record in read_metrics(run.directory / "metrics.jsonl")
    ]
    assert same(got, want)
    assert {name for _, _, name in rows} == {"first try"}
    assert {key: config[key] for key in CONFIG} == CONFIG


def test_tensorboard_shows_the_log_as_float32_at_the_logged_times(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.directory / "trackers" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    got = {
        tag: [(event.step, event.value, event.wall_time) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    want: dict[str, list] = defaultdict(list)
    for record in read_metrics(run.directory / "metrics.jsonl"):
        for name, value in record.values.items():
            want[name].append((record.step, float(np.float32(value)), record.time))
    assert same(sorted(got.items()), sorted(want.items()))


def test_nothing_of_the_environment_or_the_machine_is_stored_and_nothing_outside_the_run_directory(run: Run) -> None:
    for path in (path for path in run.directory.rglob("*") if path.is_file()):
        assert CANARY.encode() not in path.read_bytes(), path
    for file in run.directory.glob("trackers/wandb/offline-run-*/*.wandb"):
        content = file.read_bytes()
        assert str(run.home).encode() not in content
        assert sys.executable.encode() not in content
    assert {wandb["host"] for wandb in wandb_runs(run)} == {""} != {socket.gethostname()}
    assert list(run.home.iterdir()) == []


def test_no_tracker_tries_to_open_a_connection_and_none_prints_on_stdout(run: Run) -> None:
    if not run.isolated:
        pytest.skip("unshare cannot make a network namespace here")
    assert run.stdout == "0\n"


def test_a_tracker_that_raises_and_one_that_hangs_cost_one_line_each_and_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fakes = tmp_path / "fakes"
    for name, body in (
        ("wandb", "raise OSError('the disk of wandb is gone')"),
        ("trackio", "import time; time.sleep(600)"),
    ):
        (fakes / name).mkdir(parents=True)
        (fakes / name / "__init__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(fakes))
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        trackers = Trackers(
            ["wandb", "trackio"],
            run_dir=tmp_path,
            metrics=log.path,
            project="p",
            name="n",
            config={},
            close_timeout_s=1,
        )
        started = time.monotonic()
        for step in range(2000):
            log.log(step, {"loss": 1.0})
        assert time.monotonic() - started < 5
        stderr = wait_for("tracker wandb", capfd)
        started = time.monotonic()
        trackers.close()
        assert time.monotonic() - started < 5
    stdout, rest = capfd.readouterr()
    lines = (stderr + rest).splitlines()
    assert stdout == ""
    assert len(lines) == 2
    assert "tracker wandb failed: OSError: the disk of wandb is gone" in lines[0]
    assert "tracker trackio did not finish" in lines[1]
    assert len(list(read_metrics(log.path))) == 2000


def wait_for(text: str, capfd: pytest.CaptureFixture[str]) -> str:
    seen = ""
    deadline = time.monotonic() + 120
    while text not in seen and time.monotonic() < deadline:
        time.sleep(0.1)
        seen += capfd.readouterr().err
    return seen


def test_a_tracker_whose_package_is_missing_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="pip install trackio"):
        Trackers(["trackio"], run_dir=tmp_path, metrics=tmp_path / "m", project="p", name="n", config={})


def test_no_trackers_leave_no_trace(tmp_path: Path) -> None:
    with Trackers([], run_dir=tmp_path, metrics=tmp_path / "m", project="p", name="n", config={}):
        pass
    assert list(tmp_path.iterdir()) == []
