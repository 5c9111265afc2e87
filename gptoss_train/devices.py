"""What a device can do at most: memory and dense bf16 operations per second, from its maker's data sheet.

Used by the training loop (utilisation) and by `gptoss-train plan` (does it fit, how long does it take).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from gptoss_infer.errors import UsageError


class Gpu(NamedTuple):
    """A card: what people call it, the whole name that drivers report, memory, and peak operations per second."""

    name: str
    pattern: str  # a part of a card (MIG), a laptop's or a Ti is another device
    memory_gib: int
    peak_flops: float | None  # bf16 with fp32 accumulation, dense: half of what is printed "with sparsity"

    @property
    def memory_bytes(self) -> float:
        """What its memory holds."""
        return self.memory_gib * 2**30


GPUS = (
    Gpu("a100-40gb", r"(NVIDIA )?A100-(SXM4|PCIE)-40GB", 40, 312e12),  # NVIDIA A100 data sheet: 312
    Gpu("a100-80gb", r"(NVIDIA )?A100-(SXM4|PCIE)-80GB|NVIDIA A100 80GB PCIe", 80, 312e12),
    Gpu("h100", r"NVIDIA H100 80GB HBM3", 80, 989.4e12),  # SXM. NVIDIA H100 architecture white paper, table 2
    Gpu("h100-pcie", r"NVIDIA H100 PCIe", 80, 756e12),  # NVIDIA H100 architecture white paper, table 2
    Gpu("h200", r"NVIDIA H200", 141, 989.4e12),  # SXM. NVIDIA H200 data sheet: the H100's chip and clock
    Gpu("b200", r"NVIDIA B200", 180, 2250e12),  # NVIDIA HGX B200 data sheet: 36,000 with sparsity for eight
    Gpu("l4", r"NVIDIA L4", 24, 121e12),  # NVIDIA L4 data sheet: 242 with sparsity
    Gpu("l40s", r"NVIDIA L40S", 48, 362e12),  # NVIDIA L40S data sheet: 362.05 (733 with sparsity)
    Gpu("rtx3090", r"NVIDIA GeForce RTX 3090", 24, 71e12),  # NVIDIA Ampere GA102 white paper
    Gpu("rtx4090", r"NVIDIA GeForce RTX 4090", 24, 165.2e12),  # NVIDIA Ada white paper
    Gpu("rtx5090", r"NVIDIA GeForce RTX 5090", 32, 209.5e12),  # NVIDIA RTX Blackwell white paper
    Gpu("mi300x", r"AMD Instinct MI300X( OAM)?", 192, 1307.4e12),  # AMD Instinct MI300X data sheet
)


def peak_flops(device_name: str) -> float | None:
    """Return a device's peak in dense bf16 operations per second; None for one that is not in `GPUS`.

    Args:
        device_name: as `torch.cuda.get_device_name` reports it.
    """
    return next((gpu.peak_flops for gpu in GPUS if re.fullmatch(gpu.pattern, device_name)), None)


def named(name: str) -> Gpu:
    """Return the card of a name of `GPUS`, or one of unknown speed for a size such as 24GB.

    Raises: UsageError for another name.
    """
    size = re.fullmatch(r"(\d+)\s*gi?b", name, re.IGNORECASE)
    if size:
        return Gpu(name, "", int(size[1]), None)
    found = next((gpu for gpu in GPUS if gpu.name == name.lower()), None)
    if found is None:
        known = ", ".join(gpu.name for gpu in GPUS)
        raise UsageError(f"device {name!r} is not known; known are cpu, {known}, and sizes such as 24GB")
    return found
