"""How many experts, blocks of 32, codes, values and scales of a weight differ from another version of it.

Used by `inspect --against` and by what rounds a checkpoint. Here is the counting and its text; reading is the caller's.
Legend: E experts, G blocks of 32 along the input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from gptoss_infer import mxfp4
from gptoss_infer.checkpoint.layouts import EXPERT_WEIGHTS, expected_shapes
from gptoss_infer.config import ModelConfig

Pair = tuple[Tensor, Tensor]  # blocks (out, G, 16) and scales (out, G) of one expert
DENSE_ROWS = 4096  # compared at a time
KINDS = (
    "embedding", "attention", "norms", "router", "experts.gate_up_proj", "experts.down_proj", "experts' biases",
    "unembedding",
)  # fmt: skip


@dataclass
class Changes:
    """Counts for one weight, or summed over a kind of weight. An expert projection with its scales is one weight."""

    name: str
    weights: int = 1
    weights_changed: int = 0
    values: int = 0  # of weights whose shape is the base's, and dtype, unless they are experts
    values_changed: int = 0  # experts: by value, so -0 equals 0 and NaN equals NaN; all others: by their bits
    experts: int = 0
    experts_changed: int = 0  # with a changed block
    blocks: int = 0
    blocks_changed: int = 0  # with another code or scale where both sides are MXFP4, else with another value
    codes_changed: int | None = None  # 4-bit codes, of `values`; None unless both sides are MXFP4
    scales_changed: int | None = None  # scale bytes, of `blocks`; None as above
    which_experts: list[int] = field(default_factory=list)  # those changed, of one weight; empty in a sum

    @classmethod
    def of_experts(cls, name: str, config: ModelConfig, *, coded: bool) -> Changes:
        """Return an expert projection's counts before anything is compared; `coded` if both sides are MXFP4."""
        experts, columns, rows = expected_shapes(config, "bf16")[name]
        per_row = -(-columns // mxfp4.BLOCK)
        zero = 0 if coded else None
        return cls(
            name, values=experts * columns * rows, experts=experts, blocks=experts * rows * per_row,
            codes_changed=zero, scales_changed=zero,
        )  # fmt: skip

    def add_codes(self, expert: int, ours: Pair, base: Pair) -> None:
        """Count the bytes of one expert that differ, and the values that do for it."""
        assert self.codes_changed is not None
        assert self.scales_changed is not None
        flipped = ours[0] ^ base[0]
        rescaled = ours[1] != base[1]  # (out, G)
        changed = (flipped.view(torch.int64) != 0).any(-1) | rescaled  # eight bytes at a time
        self.codes_changed += _count(flipped & 0x0F) + _count(flipped & 0xF0)
        self.scales_changed += _count(rescaled)
        dense = [mxfp4.decode(blocks[changed], scales[changed], torch.float32) for blocks, scales in (ours, base)]
        self._add(expert, _count(changed), _count(_differs(*dense)))

    def add_values(self, expert: int, ours: Tensor, base: Tensor) -> None:
        """Count the values (out, in) of one expert that differ, whatever they are stored as."""
        differs = _differs(ours, base)
        blocks = pad(differs, (0, -differs.shape[-1] % mxfp4.BLOCK)).unflatten(-1, (-1, mxfp4.BLOCK)).any(-1)
        self._add(expert, _count(blocks), _count(differs))

    def _add(self, expert: int, blocks: int, values: int) -> None:
        self.blocks_changed += blocks
        self.values_changed += values
        if blocks:
            self.weights_changed = 1
            self.experts_changed += 1
            self.which_experts.append(expert)


def _differs(ours: Tensor, base: Tensor) -> Tensor:
    """Return where values differ; NaN equals NaN."""
    differs = ours != base
    return differs.logical_and_((ours == ours).logical_or_(base == base))


def _count(tensor: Tensor) -> int:
    return int(torch.count_nonzero(tensor))


def dense_changes(name: str, ours: Tensor, base: Tensor) -> Changes:
    """Compare two tensors by their bits, so that NaN equals itself and -0 is not 0.

    What has another shape or dtype is a changed weight, but its values are not counted.
    """
    if ours.shape != base.shape or ours.dtype != base.dtype:
        return Changes(name, weights_changed=1)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
    parts = zip(ours.view(bits).split(DENSE_ROWS), base.view(bits).split(DENSE_ROWS), strict=True)
    changed = sum(_count(a != b) for a, b in parts)
    return Changes(name, weights_changed=int(changed > 0), values=ours.numel(), values_changed=changed)


def weight_of(name: str) -> str | None:
    """Return the expert projection that a canonical tensor holds, or a part of; None for every other tensor."""
    weight = name.removesuffix("_blocks").removesuffix("_scales")
    return weight if weight.endswith(EXPERT_WEIGHTS) else None


def kind_of(name: str) -> str:
    """Return the kind of a weight, one of KINDS, by its canonical name."""
    if name.endswith(EXPERT_WEIGHTS):
        return f"experts.{name.rpartition('.')[2]}"
    if ".experts." in name:
        return "experts' biases"
    parts = (("norm", "norms"), ("self_attn", "attention"), ("router", "router"), ("lm_head", "unembedding"))
    return next((kind for part, kind in parts if part in name), "embedding")


def by_kind(changes: Iterable[Changes]) -> list[Changes]:
    """Return sums over the weights of each kind, in the order of KINDS."""
    sums: dict[str, Changes] = {}
    for one in changes:
        total = sums.setdefault(kind_of(one.name), Changes(kind_of(one.name), weights=0))
        for key, value in vars(one).items():
            if isinstance(value, int):
                setattr(total, key, (getattr(total, key) or 0) + value)
    return sorted(sums.values(), key=lambda total: KINDS.index(total.name))


def shares(changes: Changes) -> str:
    """Return how much of a weight or kind changed, as text."""
    parts = []
    if changes.blocks:
        parts.append(f"blocks {share(changes.blocks_changed, changes.blocks)}")
    if changes.codes_changed is not None:
        parts.append(f"codes {share(changes.codes_changed, changes.values)}")
    if changes.values:
        parts.append(f"values {share(changes.values_changed, changes.values)}")
    if changes.scales_changed is not None:
        parts.append(
            f"scales {share(changes.scales_changed, changes.blocks) if changes.scales_changed else 'the same'}"
        )
    return ", ".join(parts) or "another dtype or shape"


def share(part: int, whole: int) -> str:
    """Return a share as a percentage of three digits, so that one of a million is not nothing."""
    return f"{100 * part / whole:.3g}%"


def kind_lines(kinds: list[Changes]) -> Iterator[str]:
    """Yield one line per kind of weight."""
    width = max((len(kind.name) for kind in kinds), default=0)
    for kind in kinds:
        line = f"  {kind.name:<{width}}  {kind.weights_changed} of {kind.weights} changed"
        if kind.weights_changed and kind.experts:
            line += f", {kind.experts_changed} of {kind.experts} experts"
        yield f"{line}: {shares(kind)}" if kind.weights_changed else line


def expert_list(which: list[int], total: int) -> str:
    """Return experts as text, with runs joined: `0-3, 7`; `all` if they are."""
    if len(which) == total:
        return "all"
    runs: list[list[int]] = []
    for expert in which:
        if runs and runs[-1][-1] == expert - 1:
            runs[-1][1:] = [expert]
        else:
            runs.append([expert])
    return ", ".join("-".join(map(str, run)) for run in runs)
