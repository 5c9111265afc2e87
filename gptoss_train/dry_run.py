"""The memory of a training step, found by running it on tensors without data.

The trainer's own model, loss and backward pass run on PyTorch's meta device: every tensor has a shape and a size, none
has content, so a step of gpt-oss-120b takes seconds and no memory, and on a machine without a GPU it goes the way that
it would go on one. A dispatch mode counts the bytes of what is alive. What follows the code cannot fall behind it, as a
formula would.

Two things only data can say are given: tokens are spread evenly over the experts, and no kernel's own scratch space is
counted (cuBLAS' and sorting's, tens of MB). Used by `gptoss_train.plan`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from gptoss_infer import kernels, mxfp4
from gptoss_infer.attention import Attended
from gptoss_infer.config import ModelConfig
from gptoss_infer.experts import Routing
from gptoss_infer.loading import DTYPES
from gptoss_infer.lora import LoraExpertLinear, all_targets, attach
from gptoss_infer.model import GptOss, RMSNorm
from gptoss_infer.tiled import tile_for_training
from gptoss_train.loss import Unembedding
from gptoss_train.recipe import Recipe


class StepMemory(NamedTuple):
    """Bytes at the peak of a step: on the device that trains, and what the recipe leaves to main memory beside it."""

    weights: int
    adapters: int  # factors, fp32, with their gradients and AdamW's two moments
    kept: int  # what the forward pass keeps for the backward pass
    passing: int  # what comes and goes on top, at the worst moment
    embedding_on_host: int
    offloaded: int  # inputs of layers that wait in main memory

    @property
    def device(self) -> int:
        """Peak on the device."""
        return self.weights + self.adapters + self.kept + self.passing

    @property
    def num_factors(self) -> int:
        """Trained values: each takes four times 4 bytes."""
        return self.adapters // 16


def dry_run(
    recipe: Recipe,
    config: ModelConfig,
    documents: Sequence[int],
    num_labels: int,
    *,
    gpu: bool,
) -> StepMemory:
    """Run a step without data and return its memory.

    Layers that repeat in pairs (all of gpt-oss') cost the same, so that two and four of them tell the rest.

    Args:
        documents: lengths of the documents of a pack.
        num_labels: labelled tokens of the pack.
        gpu: go a GPU's way (experts in tiles, Triton), not a CPU's (one expert at a time, small tiles of logits).
    """
    types, num_layers = config.layer_types, config.num_hidden_layers
    if num_layers <= 4 or num_layers % 2 or types != types[:2] * (num_layers // 2) or recipe.lora.layers != "all":
        return _dry_run(recipe, config, documents, num_labels, gpu)
    two, four = (
        _dry_run(recipe, replace(config, num_hidden_layers=n, layer_types=types[:n]), documents, num_labels, gpu)
        for n in (2, 4)
    )
    return StepMemory(*(a + (b - a) * (num_layers - 2) // 2 for a, b in zip(two, four, strict=True)))


def _dry_run(recipe: Recipe, config: ModelConfig, documents: Sequence[int], num_labels: int, gpu: bool) -> StepMemory:
    settings, num_packs = recipe.train, min(2, recipe.train.batch_tokens // recipe.train.pack_tokens)
    model = _model(recipe, config, gpu)
    unembedding = Unembedding(model.lm_head.weight, None, None)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    factor_bytes = sum(factor.nbytes for factor in factors)
    ids, positions = _input(documents)
    live, offloaded = _Live(), 0

    def offload(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        nonlocal offloaded
        offloaded += tensor.nbytes
        return tensor.shape, tensor.dtype

    with _without_data(gpu), patch("gptoss_infer.model.save_on_cpu", lambda pin_memory: _forgotten(offload)), live:
        rounded = [module.rounded for module in model.modules() if isinstance(module, LoraExpertLinear)]
        for tensor in (*model.parameters(), *model.buffers(), *(blocks for blocks in rounded if blocks is not None)):
            live.see(tensor)
        weights = live.now - factor_bytes
        on_host = model.model.embed_tokens.weight.nbytes if recipe.model.embedding == "host" else 0
        moments = [torch.empty_like(factor) for factor in (*factors, *factors)]  # AdamW is fused: no more than these
        for _ in range(num_packs):
            before = live.now
            hidden = model.hidden(ids, positions, recompute=settings.recompute, offload=settings.offload)[0]
            labelled = hidden.index_select(0, ids[0, :num_labels])  # (n, C)
            losses = unembedding.losses(labelled, ids[0, :num_labels])
            del hidden, labelled
            kept = live.now - before
            losses.sum().backward()
            del losses
        del moments
    adapters = 4 * factor_bytes
    passing = live.peak - weights - adapters - kept  # the peak may come before all gradients are there
    return StepMemory(weights - on_host, adapters, kept, passing, on_host, offloaded // num_packs)


def _model(recipe: Recipe, config: ModelConfig, gpu: bool) -> GptOss:
    """Return the model with its adapter as `gptoss_infer.load` and `attach` make it, in tiles if a GPU takes them."""
    lora, dtype = recipe.lora, DTYPES[recipe.model.dtype]
    targets = all_targets(config.num_hidden_layers, lora.weights, None if lora.layers == "all" else lora.layers)
    with torch.device("meta"):
        model = GptOss(config, recipe.model.experts).requires_grad_(False)
        attach(model, targets, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, rslora=lora.rslora)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad and not isinstance(module, RMSNorm):
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
    if gpu:
        tile_for_training(model)
    if recipe.train.rounded_steps:
        for module in model.modules():
            if isinstance(module, LoraExpertLinear):
                module.rounded = torch.empty_like(module.base_layer.blocks)
    return model.train()


def _input(documents: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return token ids without data, and positions, which are not taken from a device."""
    positions = torch.cat([torch.arange(length) for length in documents])[None]
    return torch.empty(positions.shape, dtype=torch.int64, device="meta"), positions


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages without data that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.see, result)
        return result

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        if not tensor.is_meta or storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


@contextmanager
def _without_data(gpu: bool) -> Iterator[None]:
    """Replace what would look at data, and a kernel that cannot run without it."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(Routing, "of", _even_routing))
        if gpu:
            stack.enter_context(patch.object(kernels, "decode", _decode_in_one_kernel))
            stack.enter_context(patch.object(kernels, "packed_forward", _attention_in_one_kernel))
            stack.enter_context(patch.object(kernels, "packed_backward", _attention_slopes_in_two_kernels))
        else:
            stack.enter_context(patch.object(kernels, "on_gpu", lambda x: False))
        yield


def _even_routing(chosen: Tensor, num_experts: int) -> Routing:
    """Return what `Routing.of` would for choices int64 (N, k) that are spread evenly."""
    num_rows = chosen.numel()
    rows = torch.empty(3, num_rows, dtype=torch.int64, device="meta")
    counts = [num_rows // num_experts + (expert < num_rows % num_experts) for expert in range(num_experts)]
    return Routing(rows[0], rows[1], rows[2].view_as(chosen), counts, chosen)


def _decode_in_one_kernel(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate what the Triton kernel allocates: its result, and inputs that are not contiguous."""
    mxfp4.check_pair(blocks, scales)
    blocks.contiguous(), scales.contiguous()
    return scales.new_empty(*scales.shape, mxfp4.BLOCK, dtype=dtype).flatten(-2)


def _attention_in_one_kernel(q: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    """Allocate what Triton's attention does: the output, and a number per row."""
    return torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)


def _attention_slopes_in_two_kernels(
    grad: Tensor, attended: Attended, *_: object, **__: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate what its backward pass does: three gradients, and a number per row."""
    q, k, v, normalizers = attended.q, attended.k, attended.v, attended.normalizers
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(normalizers)


def _forgotten(offload: Callable[[Tensor], tuple[torch.Size, torch.dtype]]) -> saved_tensors_hooks:
    """Stand in for `save_on_cpu`: what is kept leaves the device, and is there again when it is needed."""
    return saved_tensors_hooks(offload, lambda kept: torch.empty(kept[0], dtype=kept[1], device="meta"))
