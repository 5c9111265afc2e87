"""What an evaluation was asked to do, and whether a directory on disk was asked the same: `run.json`.

Used by `evals.runner`. A directory is continued only by a run that would give the same records: same settings, weights,
samples and graders. How fast they are made (`--batch`, `--device`) may differ.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from evals.records import RUN_FILE, SAMPLES_FILE, SCORES_FILE, is_evaluation, read_json, write_json
from evals.target import Served, Target
from evals.task import Sample, Task, samples_sha256
from gptoss_infer.errors import UsageError

RUN_VERSION = 1
Effort = Literal["low", "medium", "high"]
EFFORTS: tuple[Effort, ...] = ("low", "medium", "high")
_PACKAGES = ("gptoss", "torch", "openai-harmony", "numpy")


@dataclass(frozen=True)
class Settings:
    """What decides the answers besides the model and the samples.

    `date` is the one in the system message (None: no date line). `header` is text with control tokens that is put in
    front of every answer, for models that never saw harmony. `limit` takes the first samples of each task (None: all).
    `dtype` is that of activations; a server has chosen its own.
    """

    efforts: tuple[Effort, ...]
    epochs: int
    limit: int | None
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    date: str | None
    header: str | None
    dtype: Literal["bfloat16", "float32", "served"]

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name, value in (("--epochs", self.epochs), ("--max-tokens", self.max_tokens), ("--limit", self.limit)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, expected at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UsageError(f"--temperature {self.temperature} and --top-p {self.top_p}: expected >= 0 and in (0, 1]")
        if self.temperature == 0 and self.epochs > 1:
            raise UsageError(f"--epochs {self.epochs} at --temperature 0 would ask the same thing {self.epochs} times")
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError as error:
                raise UsageError(f"--date is {self.date!r}, expected YYYY-MM-DD ({error})") from None


@dataclass(frozen=True)
class Question:
    """One sample of a task at one effort in one epoch: what becomes one record."""

    task: Task
    sample: Sample
    effort: Effort
    epoch: int

    def seed(self, base: int) -> int:
        """Seed of its random draws: equal across models, so that two of them see the same noise, and across efforts."""
        text = f"{base}:{self.task.name}:{self.sample.id}:{self.epoch}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def questions(samples: dict[str, list[Sample]], tasks: Sequence[Task], settings: Settings) -> list[Question]:
    """Everything that a run asks, in order: task, effort, epoch, sample."""
    return [
        Question(task, sample, effort, epoch)
        for task in tasks
        for effort in settings.efforts
        for epoch in range(settings.epochs)
        for sample in samples[task.name]
    ]


def describe_run(
    target: Target | Served,
    tasks: Sequence[Task],
    samples: dict[str, list[Sample]],
    data: dict[str, Path],
    settings: Settings,
    device: str,
) -> dict[str, Any]:
    """What `run.json` holds for a new run."""
    return {
        "version": RUN_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings) | {"efforts": list(settings.efforts)},
        "target": target.describe(),
        "tasks": {
            task.name: {
                "version": task.version,
                "source": str(data[task.name]) if task.name in data else task.source,
                "n_samples": len(samples[task.name]),
                "samples_sha256": samples_sha256(samples[task.name]),
            }
            for task in tasks
        },
        "device": device,
        "versions": {"python": platform.python_version()} | _package_versions(),
    }


def prepare_directory(directory: Path, run: dict[str, Any], *, overwrite: bool) -> None:
    """Make `directory` ready for the run: a new one with `run.json`, or one to go on with, left as it is.

    Raises: UsageError where the directory holds another evaluation or anything else; nothing is deleted but the three
    files of an evaluation, and those only with `overwrite`.
    """
    if is_evaluation(directory) and not overwrite:
        differences = _differences(read_json(directory / RUN_FILE), run)
        if differences:
            raise UsageError(
                f"{directory} holds another evaluation ({'; '.join(differences)}); "
                "give another --out, or --overwrite to replace it"
            )
        return
    names = {RUN_FILE, SAMPLES_FILE, SCORES_FILE}
    if directory.exists():
        if not directory.is_dir():
            raise UsageError(f"{directory}: is a file, expected a directory for the results")
        others = sorted(path.name for path in directory.iterdir() if path.name not in names)
        if others or (not overwrite and any(directory.iterdir())):
            raise UsageError(
                f"{directory} exists and holds {', '.join(others[:3]) or 'an incomplete evaluation'}; "
                "give an empty or new directory with --out"
            )
        for name in (RUN_FILE, SCORES_FILE, SAMPLES_FILE):
            (directory / name).unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / RUN_FILE, run)


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between two `run.json` that could change a record."""
    pairs = [
        *((name, _part(there, "settings", name), value) for name, value in here["settings"].items()),
        *(
            (name, _part(there, "target", name), here["target"].get(name))
            for name in ("checkpoint_sha256", "adapter_sha256", "server", "model", "mode", "tokens")
        ),
        ("tasks", sorted(there.get("tasks", {})), sorted(here["tasks"])),
        *(
            (f"{task} {name}", _part(there.get("tasks", {}), task, name), values[name])
            for task, values in here["tasks"].items()
            if task in there.get("tasks", {})
            for name in ("version", "samples_sha256")
        ),
    ]
    return [f"{name}: {old!r} there, {new!r} here" for name, old, new in pairs if old != new]


def _part(run: dict[str, Any], section: str, name: str) -> object:
    values = run.get(section)
    return values.get(name) if isinstance(values, dict) else None


def _package_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None  # run from a checkout, or not needed by the engine in use
    return versions
