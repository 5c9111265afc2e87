"""Experts in tiles: what a model needs before it generates on a GPU with the kernels of `gptoss_infer.kernels.moe`.

Tiles take the place of the MXFP4 blocks, at a peak of one projection of one layer more. From then on the experts
compute without gradients; load the model again to train, export or inspect it. Used by the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gptoss_infer import kernels
from gptoss_infer.experts import Projection
from gptoss_infer.model import GptOss, MoE


def tile_experts(model: GptOss) -> str:
    """Put the experts of a model into tiles, if its GPU's kernels can take them; return a line that says what was done.

    All layers or none. An unmerged adapter over the experts stays unmerged.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE) and module.tiled is None]
    why_not = _why_not(model, layers)
    if why_not is not None:
        return f"experts: plain PyTorch, because {why_not}"
    for layer in layers:
        layer.tiled = tile_layer(layer)
    return "experts: Triton kernels, MXFP4 in tiles"


def _why_not(model: GptOss, layers: list[MoE]) -> str | None:
    if (why := kernels.why_no_triton(model.lm_head.weight)) is not None:
        return why
    if model.lm_head.weight.dtype != torch.bfloat16:
        return f"the model computes in {model.lm_head.weight.dtype}, the kernels in torch.bfloat16"
    for layer in layers:
        for projection in (layer.experts.gate_up_proj.projection(), layer.experts.down_proj.projection()):
            if projection.scales is None:
                return "the experts are bf16: load them with experts='mxfp4'"
            if (largest := int(projection.scales.max())) > kernels.MAX_TILED_SCALE:
                return f"layer {layer.layer} has scale byte {largest}, above {kernels.MAX_TILED_SCALE}"
    return None


def tile_layer(of: MoE) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a layer's experts as a function of x bf16 (N, C) and router logits (N, E), and drop their blocks."""
    experts, top_k = of.experts, of.top_k
    gate_up, down = _tiled(experts.gate_up_proj), _tiled(experts.down_proj)

    def run(x: Tensor, logits: Tensor) -> Tensor:
        assert not torch.is_grad_enabled(), "experts in tiles have no gradients: load the model again to train it"
        return kernels.run_tiled(x, logits, gate_up, down, activation=experts.activation, top_k=top_k)

    return run


def _tiled(module: nn.Module) -> Any:
    """Return a projection as `kernels.tile` makes it, and put its tiles where its blocks were."""
    projection: Projection = module.projection()  # type: ignore[operator]
    assert projection.scales is not None, "only MXFP4 is put into tiles"
    assert not projection.merged, "experts rounded with their adapter are training's, not inference's"
    factors = None
    if projection.a is not None and projection.b is not None:
        factors = projection.a, projection.b, projection.scaling
    linear = kernels.tile(projection.weight, projection.scales, projection.bias, factors)
    base = getattr(module, "base_layer", module)  # below the factors of an adapter
    base.blocks, base.scales, base.format = linear.tiles.words, linear.tiles.scales, "tiled"
    return linear
