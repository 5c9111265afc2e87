"""How much of a change D to weights W survived in what was written, Q: sums over experts and layers, and their ratios.

Used by what rounds a bf16 checkpoint (`quantize`) and by what merges an adapter (`gptoss_train.export`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.checkpoint.changes import Pair, kind_of

CACHED_VALUES = 2**18  # accounted for at a time: 1 MiB of fp32
KEPT = (0.9, 1.1)  # shares of a kind of weight's delta that are no reason to warn; more of it is another update


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

    def add_expert(self, base: Pair, delta: Tensor, written: Pair) -> None:
        """Account for one expert's (out, in), as MXFP4 bytes."""
        self.experts += 1
        self.blocks += base[1].numel()
        self.blocks_changed += int(((written[0] != base[0]).any(-1) | (written[1] != base[1])).sum())
        for w, d, q in decoded(base, delta, written):
            self.add(w, d, q)

    @property
    def kept(self) -> float:
        """Share of the delta that Q carries in its direction: 1 is all, 0 is none."""
        return self.along / self.delta_squared if self.delta_squared else 1.0

    @property
    def is_kept(self) -> bool:
        """Whether that is no reason to warn."""
        return KEPT[0] <= self.kept <= KEPT[1]

    @property
    def residual(self) -> float:
        """|Q - (W + D)| / |D|: what is missing or added, relative to the delta; 1 is as bad as not training."""
        return (self.residual_squared / self.delta_squared) ** 0.5 if self.delta_squared else 0.0

    @property
    def delta_to_base(self) -> float:
        """|D| / |W|."""
        return (self.delta_squared / self.base_squared) ** 0.5 if self.base_squared else 0.0

    @property
    def error_to_base(self) -> float:
        """|Q - (W + D)| / |W|: without a delta, the error of rounding W."""
        return (self.residual_squared / self.base_squared) ** 0.5 if self.base_squared else 0.0

    def to_json(self) -> dict[str, float | str]:
        """The sums and what follows from them."""
        return {
            "name": self.name,
            "delta_to_base": self.delta_to_base,
            "changed_share": self.changed / self.values,
            "blocks_changed_share": self.blocks_changed / self.blocks if self.blocks else 0.0,
            "kept": self.kept,
            "residual": self.residual,
            **{key: value for key, value in asdict(self).items() if key != "name"},
        }


def survival_by_kind(weights: Iterable[Survival]) -> list[Survival]:
    """Return sums over the weights of each kind, in the order in which kinds first occur."""
    sums: dict[str, Survival] = {}
    for one in weights:
        total = sums.setdefault(kind_of(one.name), Survival(kind_of(one.name)))
        for key, value in asdict(one).items():
            if key != "name":
                setattr(total, key, getattr(total, key) + value)
    return list(sums.values())


def decoded(base: Pair, delta: Tensor, written: Pair) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield W, D and Q (rows, in) of one expert in fp32, some rows at a time that stay in a core's cache."""
    size = max(1, CACHED_VALUES // delta.shape[-1])
    for start in range(0, len(delta), size):
        rows = slice(start, start + size)
        w, q = (mxfp4.decode(blocks[rows], scales[rows], torch.float32) for blocks, scales in (base, written))
        yield w, delta[rows].float(), q


def _dot(a: Tensor, b: Tensor) -> float:
    """Return <a, b> of two matrices: rows in fp32, where squares of values above 1e19 overflow, their sum in fp64."""
    return float(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))
