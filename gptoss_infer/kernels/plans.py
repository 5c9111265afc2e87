"""Tiles of the kernels around the experts, and whose a device takes: fixed tables, so that no run differs from another.

The interpreter, which runs tests on CPU tensors, has tiles of its own, small enough that short inputs have edges too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch

from gptoss_infer.kernels.tuning import target_of


class Tile(NamedTuple):
    """What a program works on, and how it is compiled."""

    rows: int
    cols: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, object]:
        """What Triton's launch and `cases.Case` take; fusing is said, since its default depends on Triton's version."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


PlanT = TypeVar("PlanT")


def plan_for(device: torch.device, plans: Mapping[str, PlanT], interpreted: PlanT) -> PlanT:
    """Return a device's entry of a table by target, or what the interpreter takes."""
    return interpreted if device.type == "cpu" else plans[target_of(device)]
