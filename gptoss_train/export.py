"""From an adapter to a checkpoint: merge expert by expert, re-quantize to MXFP4 (or write bf16), and say what survived.

Attention deltas go into bf16 weights. An expert is decoded, its delta added in fp32, and encoded again; a block of 32
whose values did not change keeps its bytes, and a tensor that no adapter touches is copied. At most one expert is dense
at a time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.adapter import EXPERTS, ROUTER, Adapter, Target, read_adapter, write_adapter
from gptoss_infer.checkpoint import Checkpoint, atomic_directory, rewrite_checkpoint
from gptoss_infer.checkpoint.convert import write_bf16
from gptoss_infer.checkpoint.writer import MAX_SHARD_BYTES
from gptoss_infer.errors import DataError, UsageError

Format = Literal["mxfp4", "bf16", "adapter"]
Rounding = Literal["nearest"]
REPORT = "export_report.json"
KEPT_ENOUGH = 0.9  # of a kind of weight's delta; below it the export warns


@dataclass
class Survival:
    """How much of one weight's delta D is in the written weight Q, summed over experts; W is the base's."""

    name: str
    values: int = 0
    changed: int = 0  # values of Q that differ from W
    delta_squared: float = 0.0  # |D|²
    base_squared: float = 0.0  # |W|²
    along: float = 0.0  # <Q - W, D>
    residual_squared: float = 0.0  # |Q - (W + D)|²

    def add(self, base: Tensor, delta: Tensor, written: Tensor) -> None:
        """Account for one matrix, all in one shape."""
        base, delta, written = base.float(), delta.float(), written.float()
        moved = written - base
        self.values += base.numel()
        self.changed += int((moved != 0).sum())
        self.delta_squared += float(delta.double().square().sum())
        self.base_squared += float(base.double().square().sum())
        self.along += float((moved.double() * delta.double()).sum())
        self.residual_squared += float((moved.double() - delta.double()).square().sum())

    @property
    def kept(self) -> float:
        """Share of the delta that Q carries in its direction: 1 is all, 0 is none."""
        return self.along / self.delta_squared if self.delta_squared else 1.0

    @property
    def residual(self) -> float:
        """|Q - (W + D)| / |D|: what is missing or added, relative to the delta; 1 is as bad as not training."""
        return (self.residual_squared / self.delta_squared) ** 0.5 if self.delta_squared else 0.0

    def to_json(self) -> dict[str, float | str]:
        """The sums and what follows from them."""
        ratio = (self.delta_squared / self.base_squared) ** 0.5 if self.base_squared else 0.0
        return {
            "name": self.name,
            "delta_to_base": ratio,
            "changed_share": self.changed / self.values,
            "kept": self.kept,
            "residual": self.residual,
            **{key: value for key, value in asdict(self).items() if key != "name"},
        }


class _Merge:
    """Edits the tensors of a base while they are copied, and keeps the account."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter) -> None:
        self.checkpoint, self.adapter = checkpoint, adapter
        self.survival: dict[Target, Survival] = {}
        self.pending: dict[str, Tensor] = {}  # blocks or scales computed with the other, not yet written

    def weight(self, name: str, tensor: Tensor) -> Tensor:
        """Merge into a dense tensor, by canonical name; anything that is not adapted is returned as it is."""
        target = self._target(name)
        if target is None or target.is_expert:
            return tensor
        delta = self.adapter.delta(target)
        written = (tensor.float() + delta).to(tensor.dtype)
        self._account(target, tensor, delta, written)
        return tensor if torch.equal(written, tensor) else written

    def expert(self, layer: int, weight: str, expert: int, values: Tensor) -> Tensor:
        """Merge into one expert's (out, in) values for a bf16 checkpoint."""
        target = Target(layer, weight)
        if target not in self.adapter.factors:
            return values
        delta = self.adapter.delta(target, expert)
        written = (values + delta).to(torch.bfloat16)
        self._account(target, values, delta, written)
        return written

    def expert_bytes(self, name: str, tensor: Tensor) -> Tensor:
        """Merge into all experts' blocks or scales, by canonical name; the later one in the file is kept till then."""
        target = self._target(name)
        if target is None:
            return tensor
        if name not in self.pending:
            prefix = name.removesuffix("_blocks").removesuffix("_scales")
            self.pending |= self._requantized(target, f"{prefix}_blocks", f"{prefix}_scales")
        written = self.pending.pop(name)
        return tensor if torch.equal(written, tensor) else written

    def _requantized(self, target: Target, blocks_name: str, scales_name: str) -> dict[str, Tensor]:
        blocks, scales = self.checkpoint.tensor(blocks_name), self.checkpoint.tensor(scales_name)
        new_blocks, new_scales = torch.empty_like(blocks), torch.empty_like(scales)
        for expert in range(len(blocks)):
            base = blocks[expert], scales[expert]
            values, delta = mxfp4.decode(*base, torch.float32), self.adapter.delta(target, expert)
            new_blocks[expert], new_scales[expert] = mxfp4.encode(values + delta, like=base)
            written = mxfp4.decode(new_blocks[expert], new_scales[expert], torch.float32)
            self._account(target, values, delta, written)
        return {blocks_name: new_blocks, scales_name: new_scales}

    def _target(self, name: str) -> Target | None:
        """Return the adapted target that a stored tensor belongs to."""
        parts = name.split(".")
        if len(parts) < 5 or parts[1] != "layers" or parts[-1] == "bias":
            return None
        weight = parts[-1].removesuffix("_blocks").removesuffix("_scales") if "experts" in parts else parts[-2]
        target = Target(int(parts[2]), weight)
        return target if target in self.adapter.factors else None

    def _account(self, target: Target, base: Tensor, delta: Tensor, written: Tensor) -> None:
        if target not in self.survival:
            self.survival[target] = Survival(target.module)
        self.survival[target].add(base, delta, written)


def export(
    adapter: str | Path | Adapter,
    base: str | Path,
    target: Path,
    *,
    format: Format = "mxfp4",
    allow_unchanged: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Survival]:
    """Write the merge of `adapter` (any PEFT LoRA over this architecture) and `base` to `target`, complete or absent.

    Returns: what survived, per adapted weight; also written to `target/export_report.json` unless nothing changed.
    Raises: DataError if the adapter does not fit, would be dropped in part, or changes nothing and `allow_unchanged` is
        False; with it, the copy is byte-identical. UsageError for a format that the base cannot give.
    """
    checkpoint = Checkpoint.open(base)
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter, checkpoint.config)
    if format == "mxfp4" and checkpoint.experts != "mxfp4":
        raise UsageError(
            f"{base} has bf16 experts: export it with --format bf16, or merge into the MXFP4 checkpoint it came from"
        )
    with atomic_directory(target, overwrite=overwrite) as directory:
        if format == "adapter":
            write_adapter(directory, adapter, checkpoint.config)
            return []
        merge = _Merge(checkpoint, adapter)
        if format == "bf16":
            write_bf16(
                checkpoint, directory, edit=merge.weight, edit_expert=merge.expert, max_shard_bytes=max_shard_bytes
            )
        else:
            rewrite_checkpoint(checkpoint, directory, _editor(checkpoint, merge))
        survival = list(merge.survival.values())
        _check(merge, adapter, allow_unchanged)
        if any(item.changed for item in survival):
            report = {"format": format, "rounding": "nearest", "weights": [item.to_json() for item in survival]}
            (directory / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return survival


def _editor(checkpoint: Checkpoint, merge: _Merge) -> Callable[[str, Tensor], Tensor]:
    """Return the edit of a stored tensor: canonical names are edited directly, OpenAI's fused qkv row by row."""
    canonical: dict[str, list[str]] = {}
    for name, slot in checkpoint.slots.items():
        canonical.setdefault(slot.name, []).append(name)

    def edit_one(name: str, tensor: Tensor) -> Tensor:
        is_bytes = name.endswith(("_blocks", "_scales"))
        return merge.expert_bytes(name, tensor) if is_bytes else merge.weight(name, tensor)

    def edit(stored: str, tensor: Tensor) -> Tensor:
        names = canonical[stored]
        if len(names) == 1:
            return edit_one(names[0], tensor)
        edited = tensor.clone()
        for name in names:
            rows = checkpoint.slots[name].rows
            edited[rows] = edit_one(name, tensor[rows])
        return edited

    return edit


def _check(merge: _Merge, adapter: Adapter, allow_unchanged: bool) -> None:
    """Refuse an export that dropped an adapter, or that changed nothing unless that was allowed."""
    dropped = sorted(target.module for target in adapter.factors.keys() - merge.survival.keys())
    if dropped:
        raise DataError(
            f"the export would drop the adapters of {len(dropped)} weights, such as {dropped[0]}; nothing is written"
        )
    trained = [item for item in merge.survival.values() if item.delta_squared > 0]
    if not any(item.changed for item in merge.survival.values()) and not allow_unchanged:
        cause = (
            "rounding to MXFP4 lost every delta: all are smaller than half a step of the grid. Train longer or at a "
            "higher rate, or export --format bf16"
            if trained
            else "the adapter is all zeros: it was not trained"
        )
        raise DataError(
            f"the export would be the base, byte for byte: {cause}; --allow-unchanged writes it all the same"
        )


def summary(survival: list[Survival]) -> list[dict[str, float | str]]:
    """Return one row per kind of weight: attention and each expert projection, summed over layers."""
    rows: dict[str, Survival] = {}
    for item in survival:
        name = item.name.rpartition(".")[2]
        kind = f"experts.{name}" if name in EXPERTS else ROUTER if name == ROUTER else "attention"
        total = rows.setdefault(kind, Survival(kind))
        for key, value in asdict(item).items():
            if key != "name":
                setattr(total, key, getattr(total, key) + value)
    return [row.to_json() for row in rows.values()]


def print_summary(survival: list[Survival]) -> None:
    """Print, on stderr, how much of the fine-tune the written weights carry, and warn where it was lost."""
    rows = summary(survival)
    for row in rows:
        print(
            f"  {row['name']}: |delta|/|W| {row['delta_to_base']:.3%}, values changed {row['changed_share']:.2%}, "
            f"delta kept {row['kept']:.1%}, residual {row['residual']:.2f} of |delta|",
            file=sys.stderr,
        )
    lost = [item.name for item in survival if item.delta_squared > 0 and item.changed == 0]
    if lost:
        print(
            f"  warning: rounding lost the whole delta of {len(lost)} of {len(survival)} weights, such as {lost[0]}; "
            "compare the evaluations of adapter and model",
            file=sys.stderr,
        )
    thin = [f"{row['kept']:.0%} of {row['name']}'s" for row in rows if float(row["kept"]) < KEPT_ENOUGH]
    if thin:
        print(
            f"  warning: only {' and '.join(thin)} delta was kept: this checkpoint is not what was trained. Serve the "
            "adapter over its base instead, export --format bf16, or train with lora.experts=[], which rounds nothing",
            file=sys.stderr,
        )
