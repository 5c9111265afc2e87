"""Checkpoints of a run: factors, optimizer moments and position, so that a resumed run is bitwise the undisturbed one.

`RUN/checkpoints/step-000100/` is complete or absent (`gptoss_infer.checkpoint.atomic`). Tensors are in safetensors, the
rest in JSON. No random state is kept: the order of the data and every dropout mask are functions of seed, step and
rank.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gptoss_infer.adapter import save_tensors
from gptoss_infer.checkpoint import atomic_directory, verify_manifest
from gptoss_infer.errors import DataError, UsageError

TENSORS, STATE = "state.safetensors", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's; its step count is the run's


@dataclass(frozen=True)
class Position:
    """Where a run stands, and what must not differ for it to go on."""

    step: int  # optimizer steps done
    tokens: int  # tokens seen by the model, over all processes
    fingerprint: str  # of data, base and every recipe key that changes the result


class Writer:
    """Writes `root/step-NNNNNN` and removes all but the newest `keep`; in the background, one at a time, if asked."""

    def __init__(self, root: Path, keep: int, *, background: bool) -> None:
        self.root, self.keep = root, keep
        self._pool = ThreadPoolExecutor(max_workers=1) if background else None
        self._pending: Future[None] | None = None

    def save(self, position: Position, optimizer: torch.optim.Optimizer) -> None:
        """Write what the optimizer holds now; in the background, from a copy of it."""
        self.wait()
        tensors = _snapshot(optimizer, copy=self._pool is not None)
        if self._pool is None:
            self._write(position, tensors)
        else:
            self._pending = self._pool.submit(self._write, position, tensors)

    def wait(self) -> None:
        """Return when the last checkpoint is on the disk; raises what writing it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, position: Position, tensors: dict[str, Tensor]) -> None:
        with atomic_directory(self.root / f"step-{position.step:06d}", overwrite=True) as directory:
            save_tensors(directory / TENSORS, tensors)
            (directory / STATE).write_text(json.dumps(asdict(position), indent=2) + "\n")
        for old in sorted(self.root.glob("step-*"))[: -self.keep]:
            shutil.rmtree(old)


def _snapshot(optimizer: torch.optim.Optimizer, *, copy: bool) -> dict[str, Tensor]:
    """Return the factors and their moments by name, on the CPU."""
    tensors = {}
    for name, parameter in _parameters(optimizer):
        tensors[name] = parameter.detach()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    return {name: tensor.to("cpu", copy=copy).contiguous() for name, tensor in tensors.items()}


def load_latest(root: Path, optimizer: torch.optim.Optimizer, fingerprint: str) -> Position | None:
    """Restore the newest intact checkpoint into the factors and the optimizer; None if there is none.

    A damaged checkpoint is named on stderr and the one before it is taken.
    Raises: UsageError if the checkpoint belongs to other data, another base or other settings.
    """
    for directory in sorted(root.glob("step-*"), reverse=True):
        try:
            verify_manifest(directory)
            position = Position(**json.loads((directory / STATE).read_text()))
        except DataError as error:
            print(f"warning: checkpoint skipped: {error}", file=sys.stderr)
            continue
        if position.fingerprint != fingerprint:
            raise UsageError(
                f"{directory} was written with other data, another base or other settings than this recipe has; "
                "choose another run.dir, or run.overwrite=true to start over"
            )
        _restore(load_file(directory / TENSORS), optimizer, position.step)
        return position
    return None


def _restore(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, step: int) -> None:
    for name, parameter in _parameters(optimizer):
        parameter.data.copy_(tensors[name])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device),
            **{moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS},
        }


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)
