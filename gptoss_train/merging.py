"""Write all experts of a projection with an adapter's delta in them: blocks, scales, corrected biases, and the account.

Where the mean input of an expert is known (`gptoss_train.calibration`), its bias takes back the mean of the rounding
errors. At most one expert is dense at a time. Used by `gptoss_train.export`, which puts them on disk, and by
`gptoss_train.study`, which puts them into a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gptoss_infer import rounding
from gptoss_infer.adapter import Adapter, Target
from gptoss_infer.checkpoint.changes import Pair
from gptoss_infer.checkpoint.survival import Survival, decoded
from gptoss_infer.rounding import Rounding
from gptoss_train.calibration import Calibration, mean_shift

# Returns what is written for an expert of a projection, from its base and its delta (out, in).
WriteExpert = Callable[[Pair, Tensor, Target, int], Pair]


class Projection(NamedTuple):
    """All experts of `gate_up_proj` or `down_proj` of a layer."""

    blocks: Tensor  # uint8 (E, out, G, 16)
    scales: Tensor  # uint8 (E, out, G)
    bias: Tensor  # (E, out)


def by_rule(rule: Rounding, seed: int) -> WriteExpert:
    """Return how a rule of `gptoss_infer.rounding` writes an expert: on the base's scales."""

    def write(base: Pair, delta: Tensor, target: Target, expert: int) -> Pair:
        return rounding.merge(base, delta, rule, seed=seed, name=f"{target.module}.{expert}"), base[1]

    return write


def write_projection(
    base: Projection, adapter: Adapter, target: Target, write: WriteExpert, calibration: Calibration | None
) -> tuple[Projection, Survival]:
    """Return the experts of `target` as `write` leaves them, and what survived of their deltas.

    A bias is corrected in fp32 and rounded to its own dtype; it keeps its bytes where the calibration lacks its expert,
    and where the expert has no delta.
    """
    written = Projection(torch.empty_like(base.blocks), torch.empty_like(base.scales), base.bias.clone())
    survival = Survival(target.module)
    for expert in range(len(base.blocks)):
        before, delta = (base.blocks[expert], base.scales[expert]), adapter.delta(target, expert)
        after = write(before, delta, target, expert)
        written.blocks[expert], written.scales[expert] = after
        survival.add_expert(before, delta, after)
        mean = None if calibration is None else calibration.mean(target, expert)
        if mean is not None and bool(delta.any()):
            mean = mean.to(delta.device)
            shift = torch.cat([mean_shift(w.add_(d), q, mean) for w, d, q in decoded(before, delta, after)])  # (out,)
            written.bias[expert] = (base.bias[expert].float() + shift).to(base.bias.dtype)
            survival.experts_with_bias += 1
    return written, survival
