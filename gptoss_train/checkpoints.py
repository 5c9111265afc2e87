"""Checkpoints of a run: factors, optimizer moments and position, so that a resumed run is bitwise the undisturbed one.

`RUN/checkpoints/step-000100/` is complete or absent (`gptoss_infer.checkpoint.atomic`). Tensors are in safetensors, the
rest in JSON. No random state is kept: the order of the data and every dropout mask are functions of seed, step and
rank.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
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


def save(root: Path, position: Position, names: Sequence[str], optimizer: torch.optim.Optimizer, keep: int) -> Path:
    """Write `root/step-NNNNNN` and remove all but the newest `keep`."""
    target = root / f"step-{position.step:06d}"
    tensors: dict[str, Tensor] = {}
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        tensors[name] = parameter.detach().cpu().contiguous()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
    with atomic_directory(target, overwrite=True) as directory:
        save_tensors(directory / TENSORS, tensors)
        (directory / STATE).write_text(json.dumps(asdict(position), indent=2) + "\n")
    for old in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return target


def load_latest(
    root: Path, names: Sequence[str], optimizer: torch.optim.Optimizer, fingerprint: str
) -> Position | None:
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
        _restore(load_file(directory / TENSORS), names, optimizer, position.step)
        return position
    return None


def _restore(tensors: Mapping[str, Tensor], names: Sequence[str], optimizer: torch.optim.Optimizer, step: int) -> None:
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        parameter.data.copy_(tensors[name])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            **{moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS},
        }


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
