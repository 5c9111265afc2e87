"""From an adapter to a checkpoint: merge expert by expert, round to MXFP4 (or write bf16), and say what survived.

Attention deltas go into bf16 weights. An expert's delta is rounded onto the grid of its base (`gptoss_infer.rounding`):
the scales stay, a block without a delta keeps its bytes, a tensor that no adapter touches is copied. Where the mean
input of an expert is known (`gptoss_train.calibration`), its bias takes back the mean of the rounding errors. At most
one expert is dense at a time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gptoss_infer import mxfp4, rounding
from gptoss_infer.adapter import EXPERTS, ROUTER, Adapter, Target, read_adapter, write_adapter
from gptoss_infer.checkpoint import Checkpoint, atomic_directory, rewrite_checkpoint
from gptoss_infer.checkpoint.convert import write_bf16
from gptoss_infer.checkpoint.writer import MAX_SHARD_BYTES
from gptoss_infer.errors import DataError, UsageError
from gptoss_infer.rounding import Rounding
from gptoss_train.calibration import MIN_TOKENS, Calibration, mean_shift
from gptoss_train.measure import Measured, Reference

Format = Literal["mxfp4", "bf16", "adapter"]
REPORT = "export.json"
CACHED_VALUES = 2**18  # accounted for at a time: 1 MiB of fp32
KEPT = (0.9, 1.1)  # shares of a kind of weight's delta that are no reason to warn; more of it is another update
KEPT_GAIN = (0.98, 1.02)  # and of the gain in loss; below, or above by chance or by a wrong update


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


@dataclass
class Survival:
    """How much of one weight's delta D is in the written weight Q, summed over experts; W is the base's."""

    name: str
    values: int = 0
    changed: int = 0  # values of Q that differ from W
    blocks: int = 0  # of 32, if the weight is MXFP4
    blocks_changed: int = 0
    experts: int = 0
    experts_with_bias: int = 0  # whose bias took back the mean error
    delta_squared: float = 0.0  # |D|²
    base_squared: float = 0.0  # |W|²
    along: float = 0.0  # <Q - W, D>
    residual_squared: float = 0.0  # |Q - (W + D)|²

    def add(self, base: Tensor, delta: Tensor, written: Tensor) -> None:
        """Account for one matrix, all in one shape."""
        self.values += base.numel()
        size = max(1, CACHED_VALUES // base.shape[-1])
        parts = zip(*(tensor.flatten(0, -2).split(size) for tensor in (base, delta, written)), strict=True)
        for w, d, q in parts:  # some rows that stay in a core's cache
            w, d = w.float(), d.float()
            moved = q.float() - w
            self.changed += int(moved.count_nonzero())
            self.delta_squared += _dot(d, d)
            self.base_squared += _dot(w, w)
            self.along += _dot(moved, d)
            moved -= d
            self.residual_squared += _dot(moved, moved)

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
            "blocks_changed_share": self.blocks_changed / self.blocks if self.blocks else 0.0,
            "kept": self.kept,
            "residual": self.residual,
            **{key: value for key, value in asdict(self).items() if key != "name"},
        }


def _dot(a: Tensor, b: Tensor) -> float:
    """Return <a, b> of two matrices: rows in fp32, their sum in fp64."""
    return float(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))


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
        """Round all experts of a projection; the bias of each takes back the mean error, where that is known."""
        blocks, scales = (self.checkpoint.tensor(f"{prefix}_{part}") for part in ("blocks", "scales"))
        bias = self.checkpoint.tensor(f"{prefix}_bias")
        new_blocks, new_bias = torch.empty_like(blocks), bias.clone()
        survival = self._survival(target)
        for expert in range(len(blocks)):
            base, delta = (blocks[expert], scales[expert]), self.adapter.delta(target, expert)
            name = f"{target.module}.{expert}"
            new_blocks[expert] = rounding.merge(base, delta, self.rule.rounding, seed=self.rule.seed, name=name)
            values = mxfp4.decode(*base, torch.float32)
            written = mxfp4.decode(new_blocks[expert], scales[expert], torch.float32)
            survival.add(values, delta, written)
            survival.experts += 1
            survival.blocks += scales[expert].numel()
            survival.blocks_changed += int((new_blocks[expert] != blocks[expert]).any(-1).sum())
            mean = None if self.rule.calibration is None else self.rule.calibration.mean(target, expert)
            if mean is not None and bool(delta.any()):
                shift = mean_shift(values.add_(delta), written, mean)
                new_bias[expert] = (bias[expert].float() + shift).to(bias.dtype)
                survival.experts_with_bias += 1
        return {f"{prefix}_blocks": new_blocks, f"{prefix}_bias": new_bias}

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
    rows: dict[str, Survival] = {}
    for item in survival:
        name = item.name.rpartition(".")[2]
        kind = f"experts.{name}" if name in EXPERTS else ROUTER if name == ROUTER else "attention"
        total = rows.setdefault(kind, Survival(kind))
        for key, value in asdict(item).items():
            if key != "name":
                setattr(total, key, getattr(total, key) + value)
    return [row.to_json() for row in rows.values()]


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
    survival, rows = result.survival, summary(result.survival)
    lost = [item.name for item in survival if item.delta_squared > 0 and item.changed == 0]
    if lost:
        yield (
            f"rounding lost the whole delta of {len(lost)} of {len(survival)} weights, such as {lost[0]}; "
            "compare the evaluations of adapter and model"
        )
    off = [f"{row['kept']:.0%} of {row['name']}'s" for row in rows if not KEPT[0] <= float(row["kept"]) <= KEPT[1]]
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
