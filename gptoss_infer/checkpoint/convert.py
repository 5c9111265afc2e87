"""Convert a checkpoint between layouts: the two MXFP4 ones are byte-exact renames, bf16 is their exact expansion.

Nothing here rounds; from bf16 to MXFP4 is the work of `quantize`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gptoss_infer.checkpoint.atomic import atomic_directory
from gptoss_infer.checkpoint.layouts import EXPERT_WEIGHTS, Layout, expected_shapes, original_slot
from gptoss_infer.checkpoint.reader import FLOATS, Checkpoint
from gptoss_infer.checkpoint.writer import MAX_SHARD_BYTES, TensorSpec, Values, copy_other_files, write_checkpoint
from gptoss_infer.config import parse_config, read_json, to_hf_json, to_original_json
from gptoss_infer.errors import DataError, UsageError

Target = Literal["hf", "original", "bf16"]
# Beside an original/ config.json, which has no room for them: the fields that Hugging Face's file adds.
HF_CONFIG = "hf_config.json"
EditExpert = Callable[[int, str, int, Tensor], Tensor]


def convert(
    source: str | Path, target: Path, to: Target, *, overwrite: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `source` as `target` in another layout; complete or absent.

    Raises: UsageError if the experts would have to be rounded, or `target` exists and `overwrite` is False.
    """
    checkpoint = Checkpoint.open(source)
    if checkpoint.experts == "bf16" and to != "bf16":
        raise UsageError(
            f"{source} holds bf16 experts; writing them as MXFP4 rounds, which `convert --to {to}` never does. "
            "Round them with `convert --to mxfp4`, best with --like BASE, the MXFP4 checkpoint they came from."
        )
    with atomic_directory(target, overwrite=overwrite) as directory:
        copy_other_files(checkpoint.directory, directory)
        (directory / HF_CONFIG).unlink(missing_ok=True)
        if to == "bf16":
            write_bf16(checkpoint, directory, max_shard_bytes=max_shard_bytes)
            return
        layout: Layout = "original" if to == "original" else "hf"
        if layout == "original":
            config = to_original_json(checkpoint.config)
            specs, parts = _original_specs(checkpoint)
        else:
            config = hf_config(checkpoint, quantized=True)
            specs = [
                spec_of(checkpoint, name, shape) for name, shape in expected_shapes(checkpoint.config, "mxfp4").items()
            ]
            parts = {spec.name: [spec.name] for spec in specs}

        def read(name: str) -> Iterator[Tensor]:
            return (checkpoint.tensor(part) for part in parts[name])

        write_checkpoint(directory, config, specs, read, layout=layout, max_shard_bytes=max_shard_bytes)
        _keep_config_bytes(checkpoint, directory, layout)


def _keep_config_bytes(checkpoint: Checkpoint, directory: Path, layout: Layout) -> None:
    """Carry Hugging Face's config.json through both layouts byte by byte, so that hf -> original -> hf returns it."""
    source = checkpoint.directory / ("config.json" if checkpoint.layout == "hf" else HF_CONFIG)
    target = directory / ("config.json" if layout == "hf" else HF_CONFIG)
    if source.exists():
        shutil.copyfile(source, target)
    elif layout == "original":
        target.write_text(json.dumps(hf_config(checkpoint, quantized=True), indent=2) + "\n")


def write_bf16(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    edit: Callable[[str, Tensor], Tensor] | None = None,
    edit_expert: EditExpert | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a bf16 checkpoint in Hugging Face's layout, expanding one expert at a time.

    Args:
        edit: changes a tensor that is no expert weight, by canonical name.
        edit_expert: changes (layer, weight, expert, values (out, in) fp32); rounded to bf16 afterwards.
    """
    specs = []
    for name, shape in expected_shapes(checkpoint.config, "bf16").items():
        dense = name.endswith(EXPERT_WEIGHTS)
        specs.append(TensorSpec(name, shape, torch.bfloat16) if dense else spec_of(checkpoint, name, shape))

    def read(name: str) -> Values:
        if not name.endswith(EXPERT_WEIGHTS):
            tensor = checkpoint.tensor(name)
            return tensor if edit is None else edit(name, tensor)
        _, _, n, _, _, weight = name.split(".")
        return _expanded(checkpoint, int(n), weight, edit_expert)

    config = hf_config(checkpoint, quantized=False)
    write_checkpoint(directory, config, specs, read, max_shard_bytes=max_shard_bytes)


def _expanded(checkpoint: Checkpoint, layer: int, weight: str, edit: EditExpert | None) -> Iterator[Tensor]:
    """Yield each expert's weight as (in, out) bf16."""
    for expert in range(checkpoint.config.num_local_experts):
        values = checkpoint.expert(layer, weight, expert)
        if edit is not None:
            values = edit(layer, weight, expert, values)
        yield values.T.to(torch.bfloat16)


def hf_config(checkpoint: Checkpoint, *, quantized: bool) -> dict[str, Any]:
    """Return the Hugging Face config.json of a checkpoint, with every field its own file or side file had."""
    if checkpoint.layout == "hf":
        raw = dict(checkpoint.raw_config)
    else:
        side = checkpoint.directory / HF_CONFIG
        raw = read_json(side) if side.exists() else to_hf_json(checkpoint.config, quantized=True)
        if parse_config(raw, str(side)) != checkpoint.config:
            raise UsageError(f"{side} and config.json describe different models; remove the wrong one")
    if not quantized:
        raw.pop("quantization_config", None)
    return raw


def spec_of(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> TensorSpec:
    """Return the spec of a canonical tensor in the dtype that a checkpoint stores it in."""
    stored = checkpoint.stored[checkpoint.slots[name].name]
    return TensorSpec(name, shape, torch.uint8 if stored.dtype == "U8" else FLOATS[stored.dtype])


def _original_specs(checkpoint: Checkpoint) -> tuple[list[TensorSpec], dict[str, list[str]]]:
    """Return the tensors of OpenAI's layout, and for each the canonical ones whose rows make it up, in order."""
    parts: dict[str, list[str]] = {}
    specs: dict[str, TensorSpec] = {}
    for name, shape in expected_shapes(checkpoint.config, "mxfp4").items():
        target = original_slot(name, checkpoint.config).name
        spec = spec_of(checkpoint, name, shape)
        rows = specs[target].shape[0] if target in specs else 0
        if target in specs and specs[target].dtype != spec.dtype:
            raise DataError(f"{name} is {spec.dtype}, but {specs[target].dtype} is what it would share {target} with")
        parts.setdefault(target, []).append(name)
        specs[target] = TensorSpec(target, (rows + shape[0], *shape[1:]), spec.dtype)
    return list(specs.values()), parts
