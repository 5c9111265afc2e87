"""How the expert products are launched, per GPU and tile height: a fixed table, so that no run differs from another.

Numbers follow from what `crosscompile` reads off the compiled code (registers and shared memory decide how many blocks
fit on a multiprocessor) and from bytes in flight; none was timed yet. Whatever is chosen here, sums over columns are
taken in the same order: results do not depend on it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from gptoss_infer.errors import MachineError
from gptoss_infer.kernels.tiles import Order


class Launch(NamedTuple):
    """One form of a product."""

    block_n: int  # rows of weights of a block, a multiple of 64
    step: int  # tiles of 64 columns taken at a time: 1 or 2
    num_warps: int
    num_stages: int
    blocks: int  # that fit on one multiprocessor: what the numbers before were chosen for


# By the most rows (tokens) of a tile. A decode step reads every weight once, for a few rows: small blocks, many stages,
# several blocks per multiprocessor. Prefill multiplies: large blocks, where they fit two of them per multiprocessor, so
# that one decodes weights while the other multiplies.
#
# Steps of two halve what a loop costs beside the work. But tensor memory (10.0) is written back between two products in
# a loop, and on 8.0 it is two products that let every warp have rows of its own, and so decode no weight twice. AMD's
# warps get rows of their own where block_n is four times the tile height.
TABLES: dict[str, dict[int, Launch]] = {
    "sm_80": {  # also for 8.6, 8.9 and 12.x, so within 99 KiB
        16: Launch(64, 2, 4, 6, blocks=3),
        32: Launch(64, 2, 4, 4, blocks=4),
        64: Launch(128, 2, 8, 4, blocks=2),
        128: Launch(128, 2, 8, 3, blocks=1),
    },
    "sm_90": {
        16: Launch(64, 2, 4, 6, blocks=4),
        32: Launch(64, 2, 4, 5, blocks=3),
        64: Launch(128, 1, 8, 5, blocks=3),
        128: Launch(128, 1, 8, 4, blocks=2),
    },
    "sm_100": {
        16: Launch(64, 1, 4, 8, blocks=6),
        32: Launch(64, 1, 4, 8, blocks=4),
        64: Launch(128, 1, 8, 5, blocks=3),
        128: Launch(128, 1, 8, 4, blocks=2),
    },
    "gfx942": {
        16: Launch(64, 2, 4, 2, blocks=6),
        32: Launch(128, 1, 4, 2, blocks=3),
        64: Launch(256, 1, 4, 2, blocks=1),
    },
}
# Of products with the transposed weight, where a tile of columns is taken at a time, whatever `step` says. On 9.0 both
# operands are in shared memory: blocks of one warpgroup, of which one decodes while the others multiply.
BACKWARD: dict[str, dict[int, Launch]] = TABLES | {
    "sm_90": TABLES["sm_90"] | {64: Launch(64, 1, 4, 4, blocks=4), 128: Launch(64, 1, 4, 3, blocks=3)},
}
ORDERS: dict[str, Order] = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "mma", "gfx942": "mfma"}


def block_m(target: str, num_tokens: int, top_k: int, num_experts: int) -> int:
    """Return the most rows of a tile: enough for one and a half times an expert's mean, so that few need two tiles."""
    mean = num_tokens * top_k / num_experts
    sizes = TABLES[target]
    return next((size for size in sizes if 1.5 * mean <= size), max(sizes))


def options(target: str, num_warps: int, num_stages: int) -> dict[str, object]:
    """Return what Triton is told with a launch of a product."""
    # Fused, the last operations on a row could be rounded in one form and not in another.
    found: dict[str, object] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    if target.startswith("gfx"):
        found["matrix_instr_nonkdim"] = 16  # the same instruction, and so order of sums, for every tile height
    return found


@functools.cache
def target_of(device: torch.device) -> str:
    """Return whose table a GPU takes; "sm_90" for the interpreter and for plans, which have no GPU."""
    if device.type in ("cpu", "meta"):
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        raise MachineError(
            f"{name} has compute capability {major}.{minor}; the expert kernels need bf16 matrix instructions, 8.0 or "
            "later: use a newer GPU, or the CPU"
        )
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")
