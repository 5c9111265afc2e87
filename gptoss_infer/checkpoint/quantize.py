"""Round a bf16 checkpoint's experts to MXFP4: onto the grid of the base they came from, or onto scales chosen anew.

With a base, the difference to its decoded values is merged into it by `gptoss_infer.rounding`, under the same names and
seed as an export of an adapter: scales are the base's, a block whose values did not change keeps its bytes, and a small
change is kept on average. The difference is exactly 0 where nothing changed, since bf16 holds MXFP4's values exactly.
Without a base, `mxfp4.encode` chooses scales and rounds to nearest, which loses what is smaller than half a step.

Every other tensor keeps its bytes. One expert is dense at a time. The opposite direction is `convert`'s.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from gptoss_infer import mxfp4, rounding
from gptoss_infer.checkpoint.atomic import atomic_directory
from gptoss_infer.checkpoint.changes import KINDS, Changes, Pair, by_kind, dense_changes, kind_lines, kind_of, weight_of
from gptoss_infer.checkpoint.convert import HF_CONFIG, hf_config, spec_of
from gptoss_infer.checkpoint.layouts import expected_shapes
from gptoss_infer.checkpoint.reader import Checkpoint
from gptoss_infer.checkpoint.survival import Survival
from gptoss_infer.checkpoint.writer import MAX_SHARD_BYTES, TensorSpec, Values, copy_other_files, write_checkpoint
from gptoss_infer.config import QUANTIZATION_CONFIG, ModelConfig, read_json
from gptoss_infer.errors import DataError, UsageError
from gptoss_infer.rounding import Rounding

# Fine-tunes change weights by 0.01% to a few percent. Two unrelated checkpoints differ by about 140%.
LARGE_CHANGE = 0.25


def _is_finite(values: Tensor) -> bool:
    """Return whether all values are finite, without a mask as large as they are."""
    return all(math.isfinite(bound) for bound in values.aminmax())


@dataclass
class Quantized:
    """What a quantization wrote."""

    survival: list[Survival]  # per kind of expert weight; without a base, of no change to what was rounded
    against_base: list[Changes]  # per kind of weight; empty without a base


def quantize(
    source: str | Path,
    target: Path,
    *,
    like: str | Path | None = None,
    rule: Rounding = rounding.DEFAULT,
    seed: int = 0,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    notify: Callable[[str], object] = lambda _: None,
) -> Quantized:
    """Write the bf16 checkpoint `source` as `target` with MXFP4 experts in Hugging Face's layout; complete or absent.

    Args:
        like: the MXFP4 checkpoint that `source` was fine-tuned from, in either layout.
        rule: how differences to `like` are rounded; not used without it.
        seed: of the rounding.
        notify: told how far it is, in a line per expert projection.
    Raises: UsageError if `source` is no bf16 checkpoint, `like` no MXFP4 one of its architecture, or `target` exists
        and `overwrite` is False; DataError naming tensor and expert if a weight is not finite.
    """
    checkpoint = Checkpoint.open(source)
    if checkpoint.experts != "bf16":
        raise UsageError(
            f"{source} holds MXFP4 experts already: there is nothing to round. Use --to hf for Hugging Face's layout"
        )
    base = None if like is None else Checkpoint.open(like)
    if base is not None:
        _check_base(checkpoint, base)
    writer = _Quantizer(checkpoint, base, rule, seed, notify)
    shapes = expected_shapes(checkpoint.config, "mxfp4")
    specs = [
        spec_of(checkpoint, name, shape) if weight_of(name) is None else TensorSpec(name, shape, torch.uint8)
        for name, shape in shapes.items()
    ]
    with atomic_directory(target, overwrite=overwrite) as directory:
        copy_other_files(checkpoint.directory, directory)
        (directory / HF_CONFIG).unlink(missing_ok=True)
        config, same_as = _config(checkpoint, base)
        write_checkpoint(directory, config, specs, writer.read, max_shard_bytes=max_shard_bytes)
        if same_as is not None:
            shutil.copyfile(same_as, directory / "config.json")
    return Quantized(
        sorted(writer.survival.values(), key=lambda one: KINDS.index(one.name)), by_kind(writer.changes.values())
    )


def _check_base(checkpoint: Checkpoint, base: Checkpoint) -> None:
    if base.experts != "mxfp4":
        raise UsageError(
            f"{base.directory} holds bf16 experts, which have no scales to keep; --like needs the MXFP4 checkpoint "
            f"that {checkpoint.directory} was fine-tuned from"
        )
    # Tokens may have been added: the experts know nothing of them.
    theirs = replace(base.config, vocab_size=checkpoint.config.vocab_size)
    names = [f.name for f in fields(ModelConfig)]
    differing = [name for name in names if getattr(checkpoint.config, name) != getattr(theirs, name)]
    if differing:
        name = differing[0]
        raise UsageError(
            f"{base.directory} is no base of {checkpoint.directory}: their configs differ in {', '.join(differing)} "
            f"({name} is {getattr(theirs, name)}, expected {getattr(checkpoint.config, name)}); give --like the "
            "checkpoint that was fine-tuned"
        )


def _config(checkpoint: Checkpoint, base: Checkpoint | None) -> tuple[dict[str, object], Path | None]:
    """Return the config.json to write, and the base's file if it says the same, whose bytes are better kept."""
    raw = hf_config(checkpoint, quantized=False)
    if base is None:
        return raw | {"quantization_config": QUANTIZATION_CONFIG}, None
    theirs = hf_config(base, quantized=True)
    raw |= {"quantization_config": theirs.get("quantization_config", QUANTIZATION_CONFIG)}
    file = base.directory / ("config.json" if base.layout == "hf" else HF_CONFIG)
    return raw, file if file.exists() and read_json(file) == raw else None


@dataclass
class _Quantizer:
    """Gives the writer each tensor's values, and keeps the account."""

    checkpoint: Checkpoint
    base: Checkpoint | None
    rule: Rounding
    seed: int
    notify: Callable[[str], object]
    num_done: int = 0
    survival: dict[str, Survival] = field(default_factory=dict)
    changes: dict[str, Changes] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)  # chosen with the blocks, not yet written

    def read(self, name: str) -> Values:
        """Return the values of a tensor. Blocks are asked for before their scales: the writer goes by name."""
        weight = weight_of(name)
        if weight is None:
            return self._dense(name)
        if name.endswith("_scales"):
            return self.scales.pop(name) if self.base is None else self.base.tensor(name)
        return self._blocks(weight)

    def _dense(self, name: str) -> Tensor:
        values = self.checkpoint.tensor(name)
        if self.base is not None:
            self.changes[name] = dense_changes(name, values, self.base.tensor(name))
        return values

    def _blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the blocks (out, G, 16) of each expert of a projection."""
        config = self.checkpoint.config
        self.num_done += 1
        self.notify(f"{self.num_done} of {2 * config.num_hidden_layers}: {name}")
        survival = self.survival.setdefault(kind_of(name), Survival(kind_of(name)))
        if self.base is not None:
            self.changes[name] = Changes.of_experts(name, config, coded=True)
        chosen = []
        for expert in range(config.num_local_experts):
            values = self._values(name, expert)  # (out, in)
            if self.base is None:
                blocks, scales = mxfp4.encode(values)
                chosen.append(scales)
                unchanged = values.new_zeros(1).expand_as(values)
                survival.add(values, unchanged, mxfp4.decode(blocks, scales, torch.float32))
            else:
                base = _expert_blocks(self.base, name, expert)
                delta = self._delta(name, expert, values, base)
                blocks = rounding.merge(base, delta, self.rule, seed=self.seed, name=f"{name}.{expert}")
                survival.add_expert(base, delta, (blocks, base[1]))
                self.changes[name].add_codes(expert, (blocks, base[1]), base)
            yield blocks
        if self.base is None:
            self.scales[f"{name}_scales"] = torch.stack(chosen)

    def _values(self, name: str, expert: int) -> Tensor:
        """Return one expert in fp32 (out, in); DataError if MXFP4 cannot hold it."""
        _, _, layer, _, _, weight = name.split(".")
        values = self.checkpoint.expert(int(layer), weight, expert).contiguous()
        if not _is_finite(values):
            bad = values.numel() - int(values.isfinite().sum())
            raise DataError(
                f"{self.checkpoint.directory}: {name}, expert {expert}: {bad} of {values.numel()} values are NaN or "
                "infinite, which MXFP4 cannot hold; the fine-tune is damaged, take an earlier state of it"
            )
        return values

    def _delta(self, name: str, expert: int, values: Tensor, base: Pair) -> Tensor:
        """Return one expert's difference to its base, (out, in) fp32; DataError if it is not finite."""
        assert self.base is not None
        delta = mxfp4.decode(*base, torch.float32).neg_().add_(values)  # (out, in)
        if not _is_finite(delta):
            raise DataError(
                f"{name}, expert {expert}: {self.checkpoint.directory} is finite, but not its difference to "
                f"{self.base.directory}, which has scale bytes of 253 or more, or is far from it; is it the base?"
            )
        return delta


def _expert_blocks(checkpoint: Checkpoint, name: str, expert: int) -> Pair:
    _, _, layer, _, _, weight = name.split(".")
    return checkpoint.expert_blocks(int(layer), weight, expert)


def summary_lines(quantized: Quantized) -> Iterator[str]:
    """Yield what was written as text, and warnings where it is not what was trained."""
    if not quantized.against_base:
        for one in quantized.survival:
            error = f"rounding error {one.error_to_base:.3%} of |W|"
            yield f"  {one.name}: {error if one.changed else 'every value is written exactly'}"
        return
    yield "  differences from the base:"
    yield from kind_lines(quantized.against_base)
    for one in quantized.survival:
        if one.delta_squared:
            yield f"  {one.name}: |delta|/|W| {one.delta_to_base:.3%}, delta kept {one.kept:.1%}"
    yield from (f"  warning: {warning}" for warning in _warnings(quantized.survival))


def _warnings(survival: list[Survival]) -> Iterator[str]:
    if not any(one.delta_squared for one in survival):
        yield "no expert differs from the base's: if experts were trained, this is not the checkpoint that holds them"
    for one in survival:
        if one.delta_to_base > LARGE_CHANGE:
            yield (
                f"{one.name} differ from the base's by {one.delta_to_base:.0%} of their size, a fine-tune's by a few "
                "percent: is this the base it came from, and is down_proj stored as (expert, in, out)?"
            )
        elif not one.is_kept:
            yield (
                f"{one.kept:.0%} of {one.name}'s delta was written: this checkpoint is not what was trained. Use "
                "--rounding systematic, or serve the bf16 checkpoint"
            )
