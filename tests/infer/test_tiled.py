"""A model whose experts were put into tiles says what it said before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import random_adapter, tiny_config, write_tiny
from interpreter import interpreted

import gptoss_infer as gi
from gptoss_infer.adapter import write_adapter
from gptoss_infer.lora import all_targets, load_adapter
from gptoss_infer.model import MoE
from gptoss_infer.tiled import tile_experts, tile_layer

pytest.importorskip("triton", reason="Triton is not installed here (it comes with torch on Linux)")
CONFIG = tiny_config(num_hidden_layers=2, num_local_experts=3)


@pytest.mark.parametrize("adapted", [(), ("down_proj",), ("gate_up_proj", "down_proj")], ids=["base", "down", "both"])
def test_tiles_change_logits_by_no_more_than_bf16_does(tmp_path: Path, adapted: tuple[str, ...]) -> None:
    checkpoint = write_tiny(tmp_path / "base", CONFIG)
    adapter = ""
    if adapted:
        adapter = str(tmp_path / "adapter")
        Path(adapter).mkdir()
        write_adapter(tmp_path / "adapter", random_adapter(CONFIG, all_targets(2, adapted)), CONFIG)
    ids = torch.randint(0, 512, (1, 7), generator=torch.Generator().manual_seed(0))
    says = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = gi.load(checkpoint, device="cpu", dtype=dtype)
        if adapted:
            load_adapter(model, adapter)
        with torch.no_grad():
            says[dtype] = model(ids).float()
    tiled = interpreted("tiled_probes", "logits", str(checkpoint), adapter, ids).float()
    # No more roundings than in plain bf16, but in other places: of 7 tokens' chance, half as much again is allowed.
    # Wrong experts, or none, would be off by the size of the logits: here 60 times that.
    error = (tiled - says[torch.float32]).norm()
    assert 0 < error <= 1.5 * (says[torch.bfloat16] - says[torch.float32]).norm()
    assert error < says[torch.float32].norm() / 60


def test_a_model_that_the_kernels_cannot_take_stays_as_it_is_and_the_reason_is_told(tiny_checkpoint: Path) -> None:
    model = gi.load(tiny_checkpoint, device="cpu", dtype=torch.bfloat16)
    assert tile_experts(model) == "experts: plain PyTorch, because the model is on cpu"
    assert all(module.tiled is None for module in model.modules() if isinstance(module, MoE))
    model(torch.tensor([[1, 2]]))


def test_tiled_experts_are_as_large_as_their_blocks_and_refuse_what_needs_those(tiny_checkpoint: Path) -> None:
    model = gi.load(tiny_checkpoint, device="cpu", dtype=torch.bfloat16)
    (layer, *_) = [module for module in model.modules() if isinstance(module, MoE)]
    layer.tiled = tile_layer(layer)
    assert layer.experts.gate_up_proj.blocks.nbytes == 6 * 192 * 32  # (E, 2 I, C / 2), of whole tiles
    with pytest.raises(AssertionError, match="put into tiles for inference on a GPU: load the model again"):
        layer.experts.gate_up_proj.projection()
    with pytest.raises(AssertionError, match="experts in tiles have no gradients"):
        model(torch.tensor([[1, 2]]))
