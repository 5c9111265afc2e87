"""A whole model with its experts in tiles, for the interpreter's worker."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

import gptoss_infer as gi
from gptoss_infer import kernels
from gptoss_infer.experts import Shown
from gptoss_infer.lora import Adapters, load_adapter, round_experts
from gptoss_infer.model import GptOss, MoE
from gptoss_infer.tiled import tile_for_training, tile_layer


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


@torch.no_grad()
def swapped(checkpoint: str, adapters: list[str], input_ids: Tensor) -> list[Tensor]:
    """What a bf16 model in tiles says with each adapter, which come after the tiles; "" is none, and removes all."""
    model = gi.load(Path(checkpoint), device="cpu", dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, MoE):
            module.tiled = tile_layer(module)
    held, says = Adapters(model), []
    for adapter in adapters:
        if adapter and adapter not in held:
            held.add(adapter, adapter)
        held.use(adapter or None)
        if not adapter:
            for name in list(held):
                held.remove(name)
        says.append(model(input_ids))
    return says


def trained(
    checkpoint: str, adapter: str, tiled: bool, options: dict[str, object], input_ids: Tensor, upstream: Tensor
) -> list[Tensor]:
    """Hidden states of a bf16 model, the gradients of all factors for `upstream`, and what a watcher adds up.

    options: `recompute`, and `rounding` or None; the adapter is read from its directory.
    """
    model = gi.load(Path(checkpoint), device="cpu", dtype=torch.bfloat16)
    load_adapter(model, adapter)
    if tiled:
        with patch.object(kernels, "on_gpu", lambda x: True):
            assert tile_for_training(model) == "experts: Triton kernels, MXFP4 in tiles, forward and backward"
    return step(model, options, input_ids, upstream)


def step(model: GptOss, options: dict, input_ids: Tensor, upstream: Tensor) -> list[Tensor]:
    """What `trained` returns, for any model with factors."""
    factors = [parameter.requires_grad_(True) for name, parameter in model.named_parameters() if "lora_" in name]
    if options["rounding"] is not None:
        round_experts(model, options["rounding"], 0)
    sums = Sums()
    hidden = model.hidden(input_ids, recompute=options["recompute"], watch=sums)
    hidden.backward(upstream.to(hidden.dtype))
    return [hidden.detach(), *(factor.grad for factor in factors), torch.stack(sums.found)]


class Sums:
    """A watcher that adds up what every layer shows."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def routed(self, layer: int, chosen: Tensor, counts: list[int]) -> None:
        self.found.append(torch.zeros(4))

    def computed(self, layer: int, shown: Shown) -> None:
        parts = shown.inputs, shown.gate, shown.up, shown.hidden
        self.found[-1] += torch.stack([part.float().square().sum() for part in parts])
