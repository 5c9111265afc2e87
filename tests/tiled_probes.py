"""A whole model with its experts in tiles, for the interpreter's worker."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import gptoss_infer as gi
from gptoss_infer.lora import load_adapter
from gptoss_infer.model import MoE
from gptoss_infer.tiled import tile_layer


@torch.no_grad()
def logits(checkpoint: str, adapter: str, input_ids: Tensor) -> Tensor:
    """What a bf16 model says once every layer is tiled; `adapter` is a directory or empty."""
    model = gi.load(Path(checkpoint), device="cpu", dtype=torch.bfloat16)
    if adapter:
        load_adapter(model, adapter)
    for module in model.modules():
        if isinstance(module, MoE):
            module.tiled = tile_layer(module)
    return model(input_ids)
