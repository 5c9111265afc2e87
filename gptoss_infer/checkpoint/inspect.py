"""What a checkpoint holds, and how two differ, as data and as text.

Here: `inspect` (opening checks every tensor against the config, and the manifest), `tensor_table`, `compare`, and the
lines that `gptoss-infer inspect` prints. Reads tensors only to compare them, one pair at a time. Experts that are bf16
on one side and MXFP4 on the other are compared by their values.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gptoss_infer.checkpoint.atomic import verify_manifest
from gptoss_infer.checkpoint.changes import (
    Changes,
    by_kind,
    dense_changes,
    expert_list,
    kind_lines,
    shares,
    weight_of,
)
from gptoss_infer.checkpoint.layouts import ExpertFormat, Layout, expected_shapes
from gptoss_infer.checkpoint.reader import Checkpoint, Stored
from gptoss_infer.checkpoint.writer import ITEM_BYTES, tensor_bytes
from gptoss_infer.config import ModelConfig


@dataclass(frozen=True)
class Summary:
    """A checkpoint in numbers."""

    directory: str
    layout: Layout
    experts: ExpertFormat
    manifest: Literal["verified", "absent"]  # a damaged one is a DataError
    num_tensors: int
    parameters: int  # values of the model: an MXFP4 byte holds two, a scale none
    num_bytes: int  # of tensors
    bytes_by_dtype: dict[str, int]
    files: list[str]
    config: ModelConfig


class TensorRow(NamedTuple):
    """One tensor as it is stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    file: str


@dataclass(frozen=True)
class Difference:
    """A tensor, under its canonical name, whose bytes, dtype or shape differ."""

    name: str
    sha256: str
    base_sha256: str
    changed: int | None  # elements (bytes, in MXFP4 tensors) that differ; None if dtype or shape do
    elements: int


@dataclass(frozen=True)
class Comparison:
    """How a checkpoint differs from `base`, by canonical names, so that layouts may differ."""

    base: str
    experts: tuple[ExpertFormat, ExpertFormat]  # here and in the base
    identical: int
    differing: list[Difference]
    missing: list[str]  # only in the base, except experts in another format: their values are compared
    added: list[str]  # not in the base; likewise
    weights: list[Changes]  # expert projections that differ
    kinds: list[Changes]  # sums over all weights that both have


def inspect(directory: str | Path) -> tuple[Checkpoint, Summary]:
    """Open and check a checkpoint; DataError if it is damaged or disagrees with its config."""
    verified = verify_manifest(Path(directory))
    checkpoint = Checkpoint.open(directory, verify=False)
    table = tensor_table(checkpoint)
    sizes: Counter[str] = Counter()
    for row in table:
        sizes[row.dtype] += row.num_bytes
    return checkpoint, Summary(
        directory=str(directory),
        layout=checkpoint.layout,
        experts=checkpoint.experts,
        manifest="verified" if verified else "absent",
        num_tensors=len(table),
        parameters=sum(_num_values(name, stored) for name, stored in checkpoint.stored.items()),
        num_bytes=sizes.total(),
        bytes_by_dtype=dict(sizes),
        files=sorted({row.file for row in table}),
        config=checkpoint.config,
    )


def tensor_table(checkpoint: Checkpoint) -> list[TensorRow]:
    """Return every stored tensor under the name it has in the files."""
    return [
        TensorRow(name, t.dtype, t.shape, torch.Size(t.shape).numel() * ITEM_BYTES[t.dtype], t.file.name)
        for name, t in sorted(checkpoint.stored.items())
    ]


def _num_values(name: str, stored: Stored) -> int:
    per_element = {"blocks": 2, "scales": 0}.get(name[-6:], 1) if stored.dtype == "U8" else 1
    return torch.Size(stored.shape).numel() * per_element


def compare(checkpoint: Checkpoint, base: Checkpoint) -> Comparison:
    """Compare all tensors byte for byte, then expert by expert those that differ or are stored in another format."""
    differing, changes = [], []
    shared = [name for name in checkpoint.slots if name in base.slots]
    for name in shared:
        ours, theirs = checkpoint.tensor(name), base.tensor(name)
        hashes = _sha256(ours), _sha256(theirs)
        same_form = ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if hashes[0] == hashes[1] and same_form:
            one = Changes(name, values=ours.numel())
        else:
            one = dense_changes(name, ours, theirs)
            differing.append(Difference(name, *hashes, one.values_changed if same_form else None, ours.numel()))
        if weight_of(name) is None:
            changes.append(one)
    weights = _compare_experts(checkpoint, base, {one.name for one in differing})
    changes += weights.values()
    return Comparison(
        base=str(base.directory),
        experts=(checkpoint.experts, base.experts),
        identical=len(shared) - len(differing),
        differing=differing,
        missing=[name for name in base.slots if name not in checkpoint.slots and weight_of(name) not in weights],
        added=[name for name in checkpoint.slots if name not in base.slots and weight_of(name) not in weights],
        weights=[one for one in weights.values() if one.weights_changed],
        kinds=by_kind(changes),
    )


def _compare_experts(checkpoint: Checkpoint, base: Checkpoint, differing: set[str]) -> dict[str, Changes]:
    """Return the changes of each expert projection of both: by codes if both are MXFP4, else by value."""
    same_format = checkpoint.experts == base.experts
    coded = same_format and checkpoint.experts == "mxfp4"
    shapes = [expected_shapes(one.config, "bf16") for one in (checkpoint, base)]
    found = {}
    for name, shape in shapes[0].items():
        if weight_of(name) is None or name not in shapes[1]:
            continue
        parts = [f"{name}_blocks", f"{name}_scales"] if coded else [name]
        if shapes[1][name] != shape:
            if same_format:  # else their tensors are listed as missing and added
                found[name] = Changes(name, weights_changed=1)
            continue
        found[name] = Changes.of_experts(name, checkpoint.config, coded=coded)
        if same_format and differing.isdisjoint(parts):
            continue
        _, _, layer, _, _, weight = name.split(".")
        for expert in range(shape[0]):
            where = int(layer), weight, expert
            if coded:
                found[name].add_codes(expert, checkpoint.expert_blocks(*where), base.expert_blocks(*where))
            else:
                found[name].add_values(expert, checkpoint.expert(*where), base.expert(*where))
    return found


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def summary_lines(summary: Summary) -> Iterator[str]:
    """Yield a summary as text."""
    config = summary.config
    sizes = ", ".join(f"{dtype} {_size(size)}" for dtype, size in sorted(summary.bytes_by_dtype.items()))
    yield summary.directory
    yield f"  layout      {summary.layout}, experts in {summary.experts}"
    yield f"  tensors     {summary.num_tensors} in {len(summary.files)} file(s), all as config.json asks"
    yield f"  parameters  {summary.parameters:,}"
    yield f"  size        {_size(summary.num_bytes)}: {sizes}"
    yield f"  manifest    {'verified' if summary.manifest == 'verified' else 'absent: flipped bits would go unseen'}"
    yield (
        f"  layers      {config.num_hidden_layers} of width {config.hidden_size}; {config.num_attention_heads} query, "
        f"{config.num_key_value_heads} key/value heads of {config.head_dim}, window {config.sliding_window}"
    )
    yield (
        f"  experts     {config.num_local_experts} of width {config.intermediate_size}, "
        f"{config.num_experts_per_tok} active per token"
    )
    yield f"  vocabulary  {config.vocab_size}; context {config.max_position_embeddings} tokens"
    if config.hidden_size == config.intermediate_size and summary.experts == "bf16":
        yield "  note        down_proj is square: no shape can tell whether it is transposed; (E, in, out) is assumed"


def table_lines(table: list[TensorRow]) -> Iterator[str]:
    """Yield a tensor table as text."""
    width = max(len(row.name) for row in table)
    for row in table:
        yield f"{row.name:<{width}}  {row.dtype:<4}  {_size(row.num_bytes):>10}  {row.file}  {list(row.shape)}"


def comparison_lines(comparison: Comparison) -> Iterator[str]:
    """Yield a comparison as text."""
    yield f"against {comparison.base}"
    ours, theirs = comparison.experts
    if ours == theirs and not (comparison.differing or comparison.missing or comparison.added):
        yield f"  identical: all {comparison.identical} tensors have the same bytes"
        return
    yield (
        f"  {comparison.identical} tensors identical, {len(comparison.differing)} differ, "
        f"{len(comparison.missing)} missing here, {len(comparison.added)} missing there"
    )
    if ours != theirs:
        equal = "" if comparison.weights else ": all are equal"
        yield f"  experts are {ours} here and {theirs} there, so compared by value{equal}"
    counted = {one.name for one in comparison.weights if one.values}
    for one in comparison.differing:
        if weight_of(one.name) not in counted:
            how = "another dtype or shape" if one.changed is None else f"{one.changed:,} of {one.elements:,} elements"
            yield f"  differs   {one.name}: {how}  sha256 {one.sha256[:12]} against {one.base_sha256[:12]}"
    for weight in comparison.weights:
        if weight.values:
            which = expert_list(weight.which_experts, weight.experts)
            yield f"  differs   {weight.name}: {shares(weight)}; experts {which}"
    for kind, names in (("missing", comparison.missing), ("added", comparison.added)):
        yield from (f"  {kind:<8}  {name}" for name in names)
    if comparison.differing or comparison.weights:
        yield "  weights by kind:"
        yield from kind_lines(comparison.kinds)


def _size(num_bytes: int) -> str:
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.2f} {unit}" if unit != "B" else f"{num_bytes} B"
