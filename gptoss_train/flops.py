"""Floating-point operations of a training step, exact from the architecture, and the share of a device's peak they are.

Counted are matrix products alone, 2 operations per multiply-add: projections, attention scores, router, experts,
unembedding and adapters. Norms, rotations, softmax, the activation, MXFP4 decoding, the embedding (a lookup) and the
optimizer are not, as in every published utilisation. Used by the training loop and by benchmarks.

What training does. Base weights are frozen, so a product costs as much again in backward, for the gradient to its
input: 4 N operations per token for N weights it meets, not 6 N. Each adapter adds the gradients of its two factors.
Attention is causal within a document, in sliding layers over a window, and the pairs of query and key are counted one
by one; its backward has four products (to values, to probabilities, to queries, to keys) and a fifth that repeats the
scores, since flash attention keeps none. The unembedding meets labelled tokens only. Two savings are ignored: the
gradients below the first adapted layer, and rows of the unembedding that are equal (`loss.Unembedding`).
Legend: C hidden size, H query heads, D head size, E experts, k experts per token, I intermediate size, V vocabulary,
r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from gptoss_infer.adapter import ATTENTION, EXPERTS, weight_shape
from gptoss_infer.config import LayerType, ModelConfig
from gptoss_train.recipe import Lora

Recompute = Literal["none", "experts", "layers"]

# Products over the pairs of a layer: Q K^T and P V forward, dV, dP, dQ and dK backward, and Q K^T again in backward.
SCORES_FORWARD, SCORES_BACKWARD, SCORES_REPEATED = 2, 4, 1


class LoraShape(NamedTuple):
    """What is adapted in `num_layers` layers, at one rank: weights that every token meets, and those of experts."""

    rank: int
    dense: tuple[str, ...]  # of adapter.ATTENTION, and adapter.ROUTER
    experts: tuple[str, ...]  # of adapter.EXPERTS
    num_layers: int

    @classmethod
    def of(cls, lora: Lora, config: ModelConfig) -> LoraShape:
        """Return what a recipe's section asks for."""
        dense = tuple(weight for weight in lora.weights if weight not in EXPERTS)
        return cls(
            lora.rank, dense, lora.experts, config.num_hidden_layers if lora.layers == "all" else len(lora.layers)
        )


class StepFlops(NamedTuple):
    """Floating-point operations by part; `recomputed` holds everything done twice, the other parts none of it."""

    attention_projections: int
    attention_scores: int
    experts: int
    router: int
    unembedding: int
    lora: int
    recomputed: int

    @property
    def total(self) -> int:
        """All that the device executes."""
        return sum(self)

    @property
    def useful(self) -> int:
        """What the result needs, whatever memory is saved by repeating: the numerator of `mfu`."""
        return self.total - self.recomputed


def num_pairs(num_tokens: int, layer_type: LayerType, sliding_window: int) -> int:
    """Return the pairs of query and key that a causal layer scores in a document: sum of min(position + 1, window)."""
    growing = num_tokens if layer_type == "full_attention" else min(num_tokens, sliding_window)
    return growing * (growing + 1) // 2 + (num_tokens - growing) * sliding_window


def forward_flops(
    config: ModelConfig, document_tokens: Sequence[int], num_labels: int, lora: LoraShape | None = None
) -> StepFlops:
    """Return the operations of one forward pass; `recomputed` is 0.

    Args:
        document_tokens: length of every document, in one pack or many: no document attends to another.
        num_labels: tokens that meet the unembedding.
        lora: None for the base model alone.
    Raises: ValueError for a length below 1, or for labels or adapted layers that are more than there can be.
    """
    num_tokens = _check(config, document_tokens, num_labels, lora)
    layers, k = config.num_hidden_layers, config.num_experts_per_tok
    pairs = sum(
        num_pairs(length, kind, config.sliding_window) for kind in config.layer_types for length in document_tokens
    )
    return StepFlops(
        attention_projections=2 * num_tokens * layers * sum(_size(name, config) for name in ATTENTION),
        attention_scores=SCORES_FORWARD * _product_of_scores(config, pairs),
        experts=2 * num_tokens * layers * k * (_size("gate_up_proj", config) + _size("down_proj", config)),
        router=2 * num_tokens * layers * config.hidden_size * config.num_local_experts,
        unembedding=2 * num_labels * config.vocab_size * config.hidden_size,
        lora=_lora_forward(config, num_tokens, lora, (*lora.dense, *lora.experts)) if lora else 0,
        recomputed=0,
    )


def step_flops(
    config: ModelConfig,
    document_tokens: Sequence[int],
    num_labels: int,
    lora: LoraShape | None,
    recompute: Recompute,
) -> StepFlops:
    """Return the operations of forward and backward over a batch; arguments and errors as in `forward_flops`.

    Args:
        recompute: what backward repeats beside attention's scores: "none"; "experts", the experts' gate_up_proj with
            its adapter and the first factor of down_proj's; "layers", the whole forward of every layer, which a
            checkpoint that stops early undercuts by the last product.
    """
    forward = forward_flops(config, document_tokens, num_labels, lora)
    repeated = forward.attention_scores // SCORES_FORWARD * SCORES_REPEATED
    if recompute == "layers":
        repeated += forward.useful - forward.unembedding
    elif recompute == "experts":
        repeated += _repeated_in_experts(config, sum(document_tokens), lora)
    return StepFlops(
        attention_projections=2 * forward.attention_projections,  # forward, gradient to the input
        attention_scores=forward.attention_scores // SCORES_FORWARD * (SCORES_FORWARD + SCORES_BACKWARD),
        experts=2 * forward.experts,
        router=2 * forward.router,
        unembedding=2 * forward.unembedding,
        lora=3 * forward.lora,  # forward, gradient to the input, gradient to the factors
        recomputed=repeated,
    )


def _check(config: ModelConfig, document_tokens: Sequence[int], num_labels: int, lora: LoraShape | None) -> int:
    """Return the number of tokens."""
    if any(length < 1 for length in document_tokens):
        raise ValueError(f"document_tokens has a length of {min(document_tokens)}, expected at least 1")
    num_tokens = sum(document_tokens)
    if not 0 <= num_labels <= num_tokens:
        raise ValueError(f"num_labels is {num_labels}, expected 0 to the number of tokens, {num_tokens}")
    if lora is not None and not 0 <= lora.num_layers <= config.num_hidden_layers:
        raise ValueError(f"lora.num_layers is {lora.num_layers}, the model has {config.num_hidden_layers}")
    return num_tokens


def _size(weight: str, config: ModelConfig) -> int:
    """Return the elements of a weight (of one expert)."""
    into, out = weight_shape(weight, config)
    return into * out


def _product_of_scores(config: ModelConfig, pairs: int) -> int:
    """Return the operations of one product over `pairs` pairs: each takes D multiply-adds in every query head."""
    return 2 * pairs * config.num_attention_heads * config.head_dim


def _lora_forward(config: ModelConfig, num_tokens: int, lora: LoraShape, weights: Sequence[str]) -> int:
    """Return the operations of x A^T B^T for `weights` in all adapted layers; a token meets k experts."""
    per_token = sum(
        2 * lora.rank * sum(weight_shape(name, config)) * (config.num_experts_per_tok if name in EXPERTS else 1)
        for name in weights
    )
    return num_tokens * lora.num_layers * per_token


def _repeated_in_experts(config: ModelConfig, num_tokens: int, lora: LoraShape | None) -> int:
    """Return the operations that `experts._RunExperts` repeats: gate_up_proj, and the adapters' products it drops."""
    slots = num_tokens * config.num_experts_per_tok
    repeated = 2 * slots * config.num_hidden_layers * _size("gate_up_proj", config)
    if lora and "gate_up_proj" in lora.experts:
        repeated += _lora_forward(config, num_tokens, lora, ["gate_up_proj"])
    if lora and "down_proj" in lora.experts:
        repeated += 2 * slots * lora.num_layers * lora.rank * config.intermediate_size
    return repeated


def mfu(flops: StepFlops, time_s: float, peak: float) -> float:
    """Return the model FLOPs utilisation, useful operations / time / peak (PaLM, arXiv 2204.02311, appendix B).

    Useful are the operations without what is recomputed, so that saving memory never looks like speed.

    Args:
        flops: of all devices together.
        time_s: wall-clock seconds they took.
        peak: operations per second, of all devices together; `devices.peak_flops` gives one device's.
    """
    assert time_s > 0, f"time_s is {time_s}, expected more than 0"
    assert peak > 0, f"peak is {peak}, expected more than 0"
    return flops.useful / time_s / peak
