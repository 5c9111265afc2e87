"""Experts in tiles: what a model needs before the kernels of a GPU run them, to generate or to train.

Tiles take the place of the MXFP4 blocks, at a peak of one projection of one layer more, and hold the same bytes in
another order: forward and backward pass read them as they are. To export or inspect a model, load it again. Used by the
engine and by the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gptoss_infer import kernels
from gptoss_infer.experts import ExpertLinear, Projection
from gptoss_infer.model import GptOss, MoE

PLAIN, TRITON = "experts: plain PyTorch, because", "experts: Triton kernels, MXFP4 in tiles"
MAX_RANK = 128  # of an adapter in training: the kernels of its factors hold all ranks at once


def tile_experts(model: GptOss) -> str:
    """Put the experts of a model into tiles, if its GPU's kernels can take them; return a line that says what was done.

    All layers or none. For inference: an unmerged adapter over the experts stays unmerged, and there are no gradients.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE) and module.tiled is None]
    why_not = _why_not(model, layers)
    if why_not is not None:
        return f"{PLAIN} {why_not}"
    for layer in layers:
        layer.tiled = tile_layer(layer)
    return TRITON


def tile_for_training(model: GptOss) -> str:
    """Put the experts of a model into tiles and keep them differentiable; return a line that says what was done.

    All layers or none. Gradients reach tokens, routing and the factors of adapters; weights and biases are frozen.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    why_not = _why_not(model, layers) or _why_not_trained(layers)
    if why_not is not None:
        return f"{PLAIN} {why_not}"
    for layer in layers:
        for module in (layer.experts.gate_up_proj, layer.experts.down_proj):
            _tile(module)
    return f"{TRITON}, forward and backward"


def _why_not(model: GptOss, layers: list[MoE]) -> str | None:
    if (why := kernels.why_no_triton(model.lm_head.weight)) is not None:
        return why
    if model.lm_head.weight.dtype != torch.bfloat16:
        return f"the model computes in {model.lm_head.weight.dtype}, the kernels in torch.bfloat16"
    for number, projection in _projections(layers):
        if projection.scales is None:
            return "the experts are bf16: load them with experts='mxfp4'"
        if not projection.scales.is_meta and (largest := int(projection.scales.max())) > kernels.MAX_TILED_SCALE:
            return f"layer {number} has scale byte {largest}, above {kernels.MAX_TILED_SCALE}"
    return None


def _why_not_trained(layers: list[MoE]) -> str | None:
    for number, projection in _projections(layers):
        if projection.bias.requires_grad:
            return f"the biases of layer {number} are trained, and the kernels keep them frozen"
        if projection.a is not None and projection.a.shape[1] > MAX_RANK:
            return f"the adapter has rank {projection.a.shape[1]}, the kernels take up to {MAX_RANK}"
    return None


def _projections(layers: list[MoE]) -> Iterator[tuple[int, Projection]]:
    for layer in layers:
        yield layer.layer, layer.experts.gate_up_proj.projection()
        yield layer.layer, layer.experts.down_proj.projection()


def tile_layer(of: MoE) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Return a layer's experts as a function of x bf16 (N, C), router logits (N, E) and which of the N are real (None:
    all), and drop their blocks."""
    experts, top_k = of.experts, of.top_k
    for module in (experts.gate_up_proj, experts.down_proj):
        _tile(module)
    made = WeakIdKeyDictionary(), WeakIdKeyDictionary()

    def run(x: Tensor, logits: Tensor, real: Tensor | None) -> Tensor:
        assert not torch.is_grad_enabled(), "experts in tiles have no gradients: load the model again to train it"
        gate_up, down = _linear(experts.gate_up_proj, made[0]), _linear(experts.down_proj, made[1])
        return kernels.run_tiled(x, logits, gate_up, down, activation=experts.activation, top_k=top_k, real=real)

    return run


def _linear(module: nn.Module, made: WeakIdKeyDictionary) -> Any:
    """Return a projection, with the adapter that it has now, as `kernels.linear` makes it.

    made: those that were made before, by the tensor that tells them apart; one goes when its adapter does.
    """
    projection: Projection = module.projection()  # type: ignore[operator]
    assert projection.tiles is not None, "the layer's experts were put into tiles"
    assert not projection.merged, "experts rounded with their adapter are training's, not inference's"
    key = projection.bias if projection.a is None else projection.a
    if key not in made:
        factors = None
        if projection.a is not None and projection.b is not None:
            factors = projection.a, projection.b, projection.scaling
        made[key] = kernels.linear(projection.tiles, projection.bias, factors)
    return made[key]


def _tile(module: nn.Module) -> None:
    base = getattr(module, "base_layer", module)  # below the factors of an adapter
    assert isinstance(base, ExpertLinear), f"{type(base).__name__} is no projection of experts"
    base.tile()
