"""A model whose experts were put into tiles says what it said before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import random_adapter, tiny_config, write_tiny
from interpreter import interpreted
from tiled_probes import step

import gptoss_infer as gi
from gptoss_infer import kernels
from gptoss_infer.adapter import EXPERTS, write_adapter
from gptoss_infer.experts import ExpertLinear
from gptoss_infer.kernels.tiles import unpack
from gptoss_infer.lora import LoraExpertLinear, all_targets, attach, load_adapter, round_experts
from gptoss_infer.model import MoE
from gptoss_infer.tiled import tile_experts, tile_for_training, tile_layer

pytest.importorskip("triton", reason="Triton is not installed here (it comes with torch on Linux)")
CONFIG = tiny_config(num_hidden_layers=2, num_local_experts=3)
# Every expert is chosen: a token on the edge between two would take the other one by chance, in blocks or in tiles.
EVERY = tiny_config(num_hidden_layers=2, num_local_experts=3, num_experts_per_tok=3)
WEIGHTS = ("q_proj", "gate_up_proj", "down_proj")


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


def test_adapters_that_come_after_the_tiles_and_change_places_are_those_that_were_there_before(tmp_path: Path) -> None:
    checkpoint = write_tiny(tmp_path / "base", CONFIG)
    names = ["both", "down", ""]
    for seed, (name, weights) in enumerate((("both", EXPERTS), ("down", ("down_proj", "q_proj")))):
        (tmp_path / name).mkdir()
        adapter = random_adapter(CONFIG, all_targets(2, weights), rank=2 + seed, seed=seed)
        write_adapter(tmp_path / name, adapter, CONFIG)
    paths = [str(tmp_path / name) if name else "" for name in names]
    ids = torch.randint(0, 512, (1, 7), generator=torch.Generator().manual_seed(0))
    both, down, none = (interpreted("tiled_probes", "logits", str(checkpoint), path, ids) for path in paths)
    order = [paths[0], paths[1], paths[0], "", paths[1], ""]
    found = interpreted("tiled_probes", "swapped", str(checkpoint), order, ids)
    for got, expected in zip(found, (both, down, both, none, down, none), strict=True):
        assert torch.equal(got, expected)
    assert not torch.equal(both, down)


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
    with pytest.raises(AssertionError, match="put into tiles for a GPU's kernels: load the model again"):
        layer.experts.gate_up_proj.projection().dense(slice(0, 1), torch.bfloat16)
    with pytest.raises(AssertionError, match="experts in tiles have no gradients"):
        model(torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "none", "rounding": None},
        {"recompute": "layers", "rounding": None},
        {"recompute": "experts", "rounding": "stochastic"},
    ],
    ids=str,
)
def test_a_model_trained_in_tiles_has_the_gradients_that_it_has_in_blocks(
    tmp_path: Path, options: dict[str, str | None]
) -> None:
    checkpoint = write_tiny(tmp_path / "base", EVERY)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", random_adapter(EVERY, all_targets(2, WEIGHTS)), EVERY)
    generator = torch.Generator().manual_seed(0)
    ids, upstream = torch.randint(0, 512, (1, 19), generator=generator), torch.randn(1, 19, 64, generator=generator)
    exact = gi.load(checkpoint, device="cpu", dtype=torch.float32)
    load_adapter(exact, str(tmp_path / "adapter"))
    expected = step(exact, options, ids, upstream)
    blocks, tiles = (
        interpreted(
            "tiled_probes", "trained", str(checkpoint), str(tmp_path / "adapter"), tiled, options, ids, upstream
        )
        for tiled in (False, True)
    )
    assert len(expected) == 2 + 2 * 2 * len(WEIGHTS)  # hidden states, A and B of two layers, what was shown
    for in_tiles, in_blocks, right in zip(tiles, blocks, expected, strict=True):
        # As many roundings, some in other places: see above.
        error = (in_tiles - right).norm()
        assert error <= 1.5 * (in_blocks - right).norm() + 1e-3 * right.norm()
        assert error < right.norm() / 8


def test_experts_rounded_in_tiles_are_those_rounded_in_blocks(tmp_path: Path) -> None:
    checkpoint = write_tiny(tmp_path / "base", CONFIG)
    adapter = random_adapter(CONFIG, all_targets(2, EXPERTS))
    rounded = []
    for tiled in (False, True):
        model = gi.load(checkpoint, device="cpu", dtype=torch.bfloat16)
        load_adapter(model, adapter)
        modules = [module for module in model.modules() if isinstance(module, LoraExpertLinear)]
        for module in modules if tiled else ():
            module.base_layer.tile()
        round_experts(model, "systematic", 0)
        found = [module.projection() for module in modules]
        rounded.append([unpack(p.tiles)[0] if tiled else p.weight for p in found])
    assert len(rounded[0]) == 4
    assert all(torch.equal(*pair) for pair in zip(*rounded, strict=True))


def test_why_a_model_is_not_trained_in_tiles_is_told(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(rank: int = 4, dtype: torch.dtype = torch.bfloat16, experts: str = "mxfp4") -> str:
        model = gi.load(tiny_checkpoint, device="cpu", dtype=dtype, experts=experts)
        attach(model, all_targets(3, EXPERTS), rank=rank, alpha=8, dropout=0.0, rslora=False)
        line = tile_for_training(model)
        assert not any(m.order for m in model.modules() if isinstance(m, ExpertLinear)) or "Triton" in line
        return line

    assert told() == "experts: plain PyTorch, because the model is on cpu"
    monkeypatch.setattr(kernels, "on_gpu", lambda x: True)
    assert told(dtype=torch.float32).endswith("computes in torch.float32, the kernels in torch.bfloat16")
    assert told(experts="bf16").endswith("the experts are bf16: load them with experts='mxfp4'")
    assert told(rank=129).endswith("the adapter has rank 129, the kernels take up to 128")
    assert told() == "experts: Triton kernels, MXFP4 in tiles, forward and backward"
