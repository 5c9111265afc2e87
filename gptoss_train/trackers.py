"""Copies of `metrics.jsonl` in wandb, trackio and TensorBoard, through accelerate's trackers.

Here: `Trackers`, which the training loop opens on rank 0 and closes; and the process that feeds one tracker. Not here:
the records themselves (`gptoss_train.metrics`), which are complete whatever happens to a dashboard.

Each tracker is a process of its own that reads `metrics.jsonl` as it grows. So training pays nothing per step; a
tracker that raises or hangs can only end itself (one line on stderr says so); what a library prints, patches or
registers at exit stays out of training; and after `kill -9` of training the tracker still takes in all that was logged,
then ends. It gets a chosen environment: no tokens except wandb's own when online, nothing of a distributed launch.

All files are below RUN/trackers: `wandb/`, `trackio/`, `tensorboard/`, and what each printed in `NAME.log`.

On resuming, every tracker is given the whole of the rewound `metrics.jsonl` again and forgets what it had: trackio's
run is replaced, TensorBoard purges from step 0, offline wandb starts a new `offline-run-*` with the same run id (`wandb
sync` the newest: it alone is the full curve). Online wandb cannot take steps back: it goes on after the server's last.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias

from gptoss_infer.errors import DataError, MachineError
from gptoss_train.metrics import Record, parse_record

TrackerName: TypeAlias = Literal["wandb", "trackio", "tensorboard"]

CLOSE_TIMEOUT_S = 30.0  # online wandb may need it to upload
_KILL_TIMEOUT_S = 1.0  # a process that hangs in the kernel, on a dead network disk, cannot even be killed
_POLL_S = 0.25  # how far a dashboard lags behind

# What a tracker's process inherits. Everything else (tokens, the variables of `accelerate launch`) stays out.
_INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "LANG", "LC_ALL", "TZ"),
    *("LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"),
)
_INHERITED_ONLINE = (
    *("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "NETRC"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
)


class _Spec(NamedTuple):
    """What a tracker's process is told, as one line of JSON on its stdin."""

    tracker: TrackerName
    training_pid: int
    close_timeout_s: float
    metrics: str
    directory: str  # RUN/trackers
    project: str
    name: str
    run_id: str
    config: dict[str, Any]
    wandb_mode: Literal["offline", "online"]


class Trackers:
    """Starts a process per tracker; a context manager. Open it on rank 0 alone, after `MetricsLog.rewind`.

    Args:
        names: trackers to feed; may be empty.
        run_dir: the run directory; everything is written below its `trackers/`.
        metrics: the log to follow; it exists.
        project: project name in wandb and trackio.
        name: run name there.
        config: the resolved recipe, shown beside the curves.
        wandb_mode: offline opens no connection; online needs wandb's key in the environment or in ~/.netrc.
        close_timeout_s: how long `close` waits for all of them together; one more second to stop each that hangs.
    Raises: MachineError if a tracker's package is not installed.
    """

    def __init__(
        self,
        names: Sequence[TrackerName],
        *,
        run_dir: Path,
        metrics: Path,
        project: str,
        name: str,
        config: Mapping[str, Any],
        wandb_mode: Literal["offline", "online"] = "offline",
        close_timeout_s: float = CLOSE_TIMEOUT_S,
    ) -> None:
        for tracker in names:
            package = importlib.util.find_spec(tracker)
            if package is None or package.origin is None:  # without an origin it is a mere folder of that name
                raise MachineError(
                    f"tracker {tracker}: the package is not installed; `pip install {tracker}`, "
                    "or take it out of log.trackers"
                )
        self._close_timeout_s = close_timeout_s
        self._feeds: list[_Feed] = []
        if not names:
            return
        directory = (run_dir / "trackers").resolve()
        directory.mkdir(parents=True, exist_ok=True)
        run_id = _stable_id(directory / "run_id")
        for tracker in names:
            spec = _Spec(
                tracker=tracker,
                training_pid=os.getpid(),
                close_timeout_s=close_timeout_s,
                metrics=str(metrics.resolve()),
                directory=str(directory),
                project=project,
                name=name,
                run_id=run_id,
                config=dict(config),
                wandb_mode=wandb_mode,
            )
            self._feeds.append(_Feed(spec))

    def close(self) -> None:
        """Let every tracker take in the rest of the log and finish; stop those that need too long."""
        for feed in self._feeds:
            feed.end()
        deadline = time.monotonic() + self._close_timeout_s
        for feed in self._feeds:
            feed.join(deadline)
        self._feeds = []

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Feed:
    """One tracker's process, and the thread that waits for its end and warns if it was not a clean one."""

    def __init__(self, spec: _Spec) -> None:
        self._spec = spec
        self._log = Path(spec.directory, f"{spec.tracker}.log")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gptoss_train.trackers"],
                bufsize=0,  # else closing the pipe of a dead tracker would try to write once more
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_environment(spec),
                start_new_session=True,  # Ctrl-C is for training, which then closes its trackers
            )
        self._too_slow = False
        self._thread = threading.Thread(target=self._watch, name=f"tracker-{spec.tracker}", daemon=True)
        self._thread.start()
        self._tell(json.dumps(spec._asdict()).encode() + b"\n")

    def end(self) -> None:
        """Say that nothing more will be logged. A byte, not only the pipe's end: forked workers may hold it open."""
        self._tell(b"\n")
        assert self._process.stdin is not None
        self._process.stdin.close()

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._too_slow = True
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                os.killpg(self._process.pid, signal.SIGKILL)  # wandb has a process of its own in the group
            self._thread.join(_KILL_TIMEOUT_S)

    def _tell(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
        except BrokenPipeError:
            return  # it has ended; `_watch` says why

    def _watch(self) -> None:
        code = self._process.wait()
        if code == 0:
            return
        cause = "did not finish in time and was stopped" if self._too_slow else f"failed: {self._last_words(code)}"
        print(
            f"warning: tracker {self._spec.tracker} {cause}. Training is not affected and metrics.jsonl is complete; "
            f"details: {self._log}",
            file=sys.stderr,
            flush=True,
        )

    def _last_words(self, code: int) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        if code < 0 or not lines:
            return f"ended with {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return lines[-1]


def _environment(spec: _Spec) -> dict[str, str]:
    online = spec.tracker == "wandb" and spec.wandb_mode == "online"
    names = (*_INHERITED, *(_INHERITED_ONLINE if online else ()))
    inherited = {name: os.environ[name] for name in names if name in os.environ}
    package_root = str(Path(__file__).resolve().parent.parent)
    return inherited | {
        "PYTHONPATH": os.pathsep.join(filter(None, (package_root, inherited.get("PYTHONPATH")))),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",  # trackio asks the hub for the user's name otherwise
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRACKIO_DIR": os.path.join(spec.directory, "trackio"),
        "TRACKIO_STORAGE_MODE": "sqlite",  # there is one writer, so a network disk needs no other mode
        "WANDB_MODE": spec.wandb_mode,
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_CACHE_DIR": os.path.join(spec.directory, "wandb", "cache"),
        "WANDB_DATA_DIR": os.path.join(spec.directory, "wandb", "cache"),
    }


def _stable_id(path: Path) -> str:
    """The id of this run in wandb: made once and kept in the run directory, so that a resumed run is the same curve."""
    if not path.exists() or not path.read_text().strip():  # a kill can leave it empty
        path.write_text(uuid.uuid4().hex[:16] + "\n")
    return path.read_text().strip()


# What follows runs in the tracker's process.


def _main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # training decides when to end; its death is noticed in `_follow`
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # a buffer would swallow the byte that says it is over
        spec = _Spec(**json.loads(stdin.readline()))
    threading.Thread(target=_exit_if_stuck, args=(spec,), daemon=True).start()
    fcntl.flock(sys.stdout, fcntl.LOCK_EX)  # the tracker of a killed training may still be finishing
    feed = {"wandb": _feed_wandb, "trackio": _feed_trackio, "tensorboard": _feed_tensorboard}[spec.tracker]
    try:
        with open(spec.metrics, "rb") as metrics:  # before slow imports: resuming a killed training replaces the file
            from accelerate.state import PartialState

            PartialState(cpu=True)  # accelerate's trackers refuse to work without it
            feed(spec, _follow(metrics, spec.training_pid))
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # exit handlers of a library that has just failed may hang, and hide the cause in the log


def _training_is_over(training_pid: int) -> bool:
    """Wait a moment for training to say so, or to die."""
    told, _, _ = select.select([sys.stdin], [], [], _POLL_S)
    return bool(told) or os.getppid() != training_pid


def _exit_if_stuck(spec: _Spec) -> None:
    """Bound what a hanging library can do after a killed training: hold the lock against the resumed run's tracker."""
    while not _training_is_over(spec.training_pid):
        pass
    time.sleep(2 * spec.close_timeout_s)  # twice: a living training stops this process first
    os._exit(1)


def _follow(metrics: BinaryIO, training_pid: int) -> Iterator[Record]:
    """All records of the log, and those to come until training is over."""
    line = b""
    over = False
    while not over:
        over = _training_is_over(training_pid)  # asked before reading, so that nothing logged before the end is missed
        while part := metrics.readline():
            line += part
            if not line.endswith(b"\n"):
                continue
            record = parse_record(line)
            if record is None:
                raise DataError(f"{metrics.name}: not a metrics record: {line[:80]!r}")
            yield record
            line = b""


def _feed_wandb(spec: _Spec, records: Iterator[Record]) -> None:
    import wandb
    from accelerate.tracking import WandBTracker

    # Without these, wandb records the command line, host, git remote, packages and everything printed.
    settings = wandb.Settings(
        silent=True,
        console="off",
        host="",
        program="gptoss_train",
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    tracker = WandBTracker(
        spec.project,
        dir=spec.directory,
        id=spec.run_id,
        name=spec.name,
        resume="allow",
        mode=spec.wandb_mode,
        config=spec.config,
        settings=settings,
    )
    tracker.start()
    for record in records:
        if record.step >= tracker.tracker.starting_step:  # 0 unless the server knows the run
            tracker.log({**record.values, "_timestamp": record.time}, step=record.step)
    tracker.finish()


def _feed_trackio(spec: _Spec, records: Iterator[Record]) -> None:
    import trackio
    from accelerate.tracking import TrackioTracker
    from trackio.sqlite_storage import SQLiteStorage

    if SQLiteStorage.get_project_db_path(spec.project).exists():
        for run in trackio.Api().runs(spec.project):
            run.delete()
    tracker = TrackioTracker(
        spec.project, name=spec.name, config=spec.config, embed=False, auto_log_gpu=False, auto_log_cpu=False
    )
    tracker.start()
    count = 0
    for record in records:
        tracker.log(dict(record.values), step=record.step)
        count += 1
    tracker.finish()
    stored = SQLiteStorage.get_log_count(spec.project, spec.name)
    if stored != count:  # trackio only prints its own write errors
        raise MachineError(f"trackio stored {stored} of {count} records")


def _feed_tensorboard(spec: _Spec, records: Iterator[Record]) -> None:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker("tensorboard", spec.directory, purge_step=0)
    tracker.start()
    tracker.log({"recipe": textwrap.indent(json.dumps(spec.config, indent=2), "    ")}, step=0)
    for record in records:
        tracker.log(record.values, step=record.step, walltime=record.time)
    tracker.finish()


if __name__ == "__main__":
    _main()
