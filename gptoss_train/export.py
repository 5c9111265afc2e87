"""From an adapter to a checkpoint: merge expert by expert, round to MXFP4 (or write bf16), and say what survived.

Attention deltas go into bf16 weights. An expert's delta is rounded onto the grid of its base (`gptoss_infer.rounding`):
the scales stay, a block without a delta keeps its bytes, a tensor that no adapter touches is copied. At most one expert
is dense at a time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gptoss_infer import rounding
from gptoss_infer.adapter import Adapter, Target, read_adapter, write_adapter
from gptoss_infer.checkpoint import Checkpoint, atomic_directory, rewrite_checkpoint
from gptoss_infer.checkpoint.convert import write_bf16
from gptoss_infer.checkpoint.survival import Survival, survival_by_kind
from gptoss_infer.checkpoint.writer import MAX_SHARD_BYTES
from gptoss_infer.errors import DataError, UsageError
from gptoss_infer.rounding import Rounding
from gptoss_train.calibration import MIN_TOKENS, Calibration
from gptoss_train.measure import Measured, Reference
from gptoss_train.merging import Projection, by_rule, write_projection

Format = Literal["mxfp4", "bf16", "adapter"]
REPORT = "export.json"
KEPT_GAIN = (0.98, 1.02)  # shares of the gain that are no reason to warn; more is chance or a wrong update


@dataclass(frozen=True)
class Rule:
    """How deltas become MXFP4."""

    rounding: Rounding = rounding.DEFAULT
    seed: int = 0
    calibration: Calibration | None = None


class Result(NamedTuple):
    """What an export did."""

    survival: list[Survival]  # per adapted weight
    measured: Measured | None  # losses per set of samples


class _Merge:
    """Edits the tensors of a base while they are copied, and keeps the account."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter, rule: Rule) -> None:
        self.checkpoint, self.adapter, self.rule = checkpoint, adapter, rule
        self.survival: dict[Target, Survival] = {}
        self.pending: dict[str, Tensor] = {}  # blocks or biases computed with the other, not yet written

    def weight(self, name: str, tensor: Tensor) -> Tensor:
        """Merge into a dense tensor, by canonical name; anything that is not adapted is returned as it is."""
        target = self._target(name)
        if target is None or target.is_expert:
            return tensor
        delta = self.adapter.delta(target)
        written = (tensor.float() + delta).to(tensor.dtype)
        self._survival(target).add(tensor, delta, written)
        return tensor if torch.equal(written, tensor) else written

    def expert(self, layer: int, weight: str, expert: int, values: Tensor) -> Tensor:
        """Merge into one expert's (out, in) values for a bf16 checkpoint."""
        target = Target(layer, weight)
        if target not in self.adapter.factors:
            return values
        delta = self.adapter.delta(target, expert)
        written = (values + delta).to(torch.bfloat16)
        self._survival(target).add(values, delta, written)
        return written

    def expert_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Merge into all experts' blocks, scales or biases, by canonical name; the later one is kept till then."""
        target = self._target(name)
        if target is None or name.endswith("_scales"):
            return tensor
        if name not in self.pending:
            self.pending |= self._rounded(target, name.removesuffix("_blocks").removesuffix("_bias"))
        written = self.pending.pop(name)
        return tensor if torch.equal(written, tensor) else written

    def _rounded(self, target: Target, prefix: str) -> dict[str, Tensor]:
        """Round all experts of a projection."""
        blocks, scales, bias = (self.checkpoint.tensor(f"{prefix}_{part}") for part in ("blocks", "scales", "bias"))
        write = by_rule(self.rule.rounding, self.rule.seed)
        base = Projection(blocks, scales, bias)
        written, self.survival[target] = write_projection(base, self.adapter, target, write, self.rule.calibration)
        return {f"{prefix}_blocks": written.blocks, f"{prefix}_bias": written.bias}

    def _target(self, name: str) -> Target | None:
        """Return the adapted target that a stored tensor belongs to."""
        parts = name.split(".")
        if len(parts) < 5 or parts[1] != "layers" or parts[-1] == "bias":
            return None
        weight = parts[-2]
        if "experts" in parts:
            weight = parts[-1].removesuffix("_blocks").removesuffix("_scales").removesuffix("_bias")
        target = Target(int(parts[2]), weight)
        return target if target in self.adapter.factors else None

    def _survival(self, target: Target) -> Survival:
        return self.survival.setdefault(target, Survival(target.module))


def export(
    adapter: str | Path | Adapter,
    base: str | Path,
    target: Path,
    *,
    format: Format = "mxfp4",
    rule: Rule = Rule(),
    reference: Reference | None = None,
    allow_unchanged: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Result:
    """Write the merge of `adapter` (any PEFT LoRA over this architecture) and `base` to `target`, complete or absent.

    Args:
        rule: how deltas are rounded (MXFP4 only).
        reference: base and merge on held-out samples; what was written is then measured on them too (MXFP4 only: a bf16
            merge is the merge, and in fp32 too large to measure).
    Returns: what survived; also written to `target/export.json` unless nothing changed.
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
            return Result([], None)
        merge = _Merge(checkpoint, adapter, rule)
        if format == "bf16":
            write_bf16(
                checkpoint, directory, edit=merge.weight, edit_expert=merge.expert, max_shard_bytes=max_shard_bytes
            )
        else:
            rewrite_checkpoint(checkpoint, directory, _editor(checkpoint, merge))
        survival = list(merge.survival.values())
        _check(merge, adapter, allow_unchanged)
        measured = None
        if any(item.changed for item in survival):
            measured = reference.measure_directory(directory) if reference is not None else None
            report = _report(format, rule, survival, measured)
            (directory / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return Result(survival, measured)


def _report(format: Format, rule: Rule, survival: list[Survival], measured: Measured | None) -> dict[str, object]:
    """Return what export.json holds: how, what it cost in held-out loss, and what survived of each weight."""
    report: dict[str, object] = {"format": format}
    if format == "mxfp4":
        report |= {"rounding": rule.rounding, "seed": rule.seed, "bias_correction": rule.calibration is not None}
    if measured is not None:  # as tables of the HTML report: models by loss, then sets of samples by what they cost
        for name, models in measured.items():
            report[f"losses on {name}"] = {model: models[model] for model in ("base", "merge", "export")}
        report["compared"] = {name: models["compared"] for name, models in measured.items()}
    return report | {"kinds": summary(survival), "weights": [item.to_json() for item in survival]}


def _editor(checkpoint: Checkpoint, merge: _Merge) -> Callable[[str, Tensor], Tensor]:
    """Return the edit of a stored tensor: canonical names are edited directly, OpenAI's fused qkv row by row."""
    canonical: dict[str, list[str]] = {}
    for name, slot in checkpoint.slots.items():
        canonical.setdefault(slot.name, []).append(name)

    def edit_one(name: str, tensor: Tensor) -> Tensor:
        return merge.expert_tensor(name, tensor) if ".experts." in name else merge.weight(name, tensor)

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
            "rounding to nearest lost every delta: all are smaller than half a step of the grid. Use "
            "--rounding systematic, or export --format bf16"
            if trained
            else "the adapter is all zeros: it was not trained"
        )
        raise DataError(
            f"the export would be the base, byte for byte: {cause}; --allow-unchanged writes it all the same"
        )


def summary(survival: list[Survival]) -> list[dict[str, float | str]]:
    """Return one row per kind of weight: attention and each expert projection, summed over layers."""
    return [row.to_json() for row in survival_by_kind(survival)]


def print_summary(result: Result) -> None:
    """Print, on stderr, how much of the fine-tune was written and what it costs; warn where it is not what was
    trained."""
    rows = summary(result.survival)
    for row in rows:
        print(
            f"  {row['name']}: |delta|/|W| {row['delta_to_base']:.3%}, values changed {row['changed_share']:.2%}, "
            f"delta kept {row['kept']:.1%}, residual {row['residual']:.2f} of |delta|",
            file=sys.stderr,
        )
    for name, models in (result.measured or {}).items():
        base, merge, export = (models[model]["loss"] for model in ("base", "merge", "export"))
        compared = models["compared"]
        kept = f"; kept {compared['gain_kept']:.1%} of the gain" if "gain_kept" in compared else ""
        print(
            f"  loss on {name}: base {base:.4f}, merge {merge:.4f}, export {export:.4f} "
            f"({compared['loss_increase']:+.4f}{kept}), "
            f"KL to the merge {compared['kl_to_merge']:.4f}, {compared['labels']:.0f} labels",
            file=sys.stderr,
        )
    for warning in warnings(result):
        print(f"  warning: {warning}", file=sys.stderr)


def falls_short(result: Result, max_loss_increase: float | None) -> int:
    """Return 1, and say so, if the export's loss is over the merge's by more than is allowed on some data; else 0."""
    if max_loss_increase is None:
        return 0
    if result.measured is None:
        print(
            "  nothing was measured, so nothing is known about max_loss_increase: give held-out data", file=sys.stderr
        )
        return 1
    worst = max(models["compared"]["loss_increase"] for models in result.measured.values())
    if worst <= max_loss_increase:
        return 0
    print(f"  loss increase {worst:.4f} is more than the {max_loss_increase} that is allowed", file=sys.stderr)
    return 1


def warnings(result: Result) -> Iterator[str]:
    """Yield what makes an export another update than the one that was trained, with the cure."""
    survival = result.survival
    lost = [item.name for item in survival if item.delta_squared > 0 and item.changed == 0]
    if lost:
        yield (
            f"rounding lost the whole delta of {len(lost)} of {len(survival)} weights, such as {lost[0]}; "
            "compare the evaluations of adapter and model"
        )
    off = [f"{kind.kept:.0%} of {kind.name}'s" for kind in survival_by_kind(survival) if not kind.is_kept]
    if off:
        yield (
            f"{' and '.join(off)} delta was written: this checkpoint is not what was trained. Use --rounding "
            "systematic, serve the adapter over its base, export --format bf16, or train with lora.experts=[], which "
            "rounds nothing"
        )
    experts, with_bias = (sum(getattr(item, name) for item in survival) for name in ("experts", "experts_with_bias"))
    if 0 < with_bias < experts:
        yield (
            f"{experts - with_bias} of {experts} expert weights keep the mean of their rounding errors: they were not "
            f"adapted, or the expert saw fewer than {MIN_TOKENS} tokens of calibration; collect more"
        )
    for name, models in (result.measured or {}).items():
        kept = models["compared"].get("gain_kept", 1.0)
        if name == "task" and not KEPT_GAIN[0] <= kept <= KEPT_GAIN[1]:
            yield (
                f"the export kept {kept:.1%} of the gain on {name}"
                + (": more than all of it is another update, not a better one" if kept > 1 else "")
                + "; export with another --seed or --rounding to see how much of that is chance"
            )
