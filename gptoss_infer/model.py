"""The gpt-oss transformer in plain PyTorch: one definition for training and inference, differentiable, CPU and CUDA.

Module and parameter names are those of Hugging Face's checkpoint. Legend for shapes: B batch, T new tokens, H query
heads, K key/value heads, R = H / K query heads per kv head, D head_dim, C hidden size, E
experts, I intermediate size, N = B T tokens, k experts per token.
Source: openai/gpt-oss model card (arXiv 2508.10925) and reference code; equal to transformers' GptOssForCausalLM
(tests).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from gptoss_infer import kernels
from gptoss_infer.attention import Blocks, packed_attention
from gptoss_infer.config import ModelConfig, RopeConfig
from gptoss_infer.experts import Activation, ExpertFormat, Experts, Routing, Shown

Recompute = Literal["none", "experts", "layers"]
Angles = tuple[Tensor, Tensor]  # cosines and sines by which heads are rotated: (N, D/2) each


class Adapters(Protocol):
    """What engines ask of `gptoss_infer.lora.Adapters`, whose module brings peft."""

    def add(self, name: str, adapter: str | Path) -> None:
        """Read an adapter and hold its factors."""

    def remove(self, name: str) -> None:
        """Let go of an adapter."""

    def use(self, name: str | None) -> None:
        """Put the factors of an adapter into the layers, or of none."""


class LayerCache(Protocol):
    """What attention asks of a cache."""

    @property
    def real(self) -> Tensor | None:
        """Which of the N tokens there are, bool (N,), where a batch has empty slots; None if it has none."""

    def attend(
        self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], angles: Angles, sinks: Tensor, window: int | None
    ) -> Tensor:
        """Keep this call's keys and values (N, K, D), and attend from (N, H, D) to all that each token sees.

        Queries and keys come as they are projected, and are rotated by the angles first.
        """
        ...


class Watch(Protocol):
    """What a forward pass can show to an observer."""

    def routed(self, layer: int, chosen: Tensor, counts: list[int]) -> None:
        """Experts chosen, int64 (N, k), and tokens per expert, (E,)."""
        ...

    def computed(self, layer: int, shown: Shown) -> None:
        """What some experts read and made; called until all rows were shown."""
        ...


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 and cast back after the multiplication (unlike Llama's)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C) in the dtype of x."""
        return self.of_sum(x, None)[1]

    def of_sum(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x + delta, or x without one, and its norm, all (..., C); in one pass where a GPU infers."""
        if torch.is_inference_mode_enabled() and kernels.runs_triton(x):
            return kernels.add_norm(x, delta, self.weight, self.eps)
        total = x if delta is None else x + delta
        return total, _RMSNorm.apply(total, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number per row for the backward pass, where autograd would keep fp32 copies of x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        wide = x.to(torch.promote_types(torch.float32, x.dtype))
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[no-untyped-def]
        x, weight, inverse = ctx.saved_tensors
        unit = x.to(inverse.dtype) * inverse  # x / rms(x)
        wide = grad.to(inverse.dtype)
        grad_weight = (wide * unit).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        wide = wide * weight
        wide -= unit * torch.linalg.vecdot(wide, unit).unsqueeze(-1) / x.shape[-1]
        return wide.mul_(inverse).to(x.dtype), grad_weight, None


def rope_frequencies(head_dim: int, rope: RopeConfig) -> tuple[Tensor, float]:
    """Return inverse frequencies (D/2,) fp32 and the factor on cos and sin (YaRN's concentration; 1 for plain RoPE)."""
    frequencies = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # (D/2,)
    if rope.factor <= 1:
        return 1 / frequencies, 1.0

    def dimension(rotations: float) -> float:
        """Return the (fractional) dimension that turns `rotations` times over the original context."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim / 2 * math.log(turns) / math.log(rope.theta)

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    inverse = ramp / (rope.factor * frequencies) + (1 - ramp) / frequencies
    return inverse, 0.1 * math.log(rope.factor) + 1


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Rotate (N, heads, D); the pairs are the two halves of D."""
    cos, sin = (part.unsqueeze(1) for part in angles)  # (N, 1, D/2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with sinks, full or sliding."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, d
        self.window = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
        self.q_proj = nn.Linear(c, config.num_attention_heads * d)
        self.k_proj = nn.Linear(c, config.num_key_value_heads * d)
        self.v_proj = nn.Linear(c, config.num_key_value_heads * d)
        self.o_proj = nn.Linear(config.num_attention_heads * d, c)
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        q, k, v = (
            proj(x).flatten(0, 1).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (N, H or K, D)
        if context.cache is None:
            q, k = rotate(q, context.angles), rotate(k, context.angles)
            out = packed_attention(q, k, v, self.sinks, context.blocks, window=self.window)
        else:
            out = context.cache.attend(self.layer, (q, k, v), context.angles, self.sinks, self.window)
        return self.o_proj(out.reshape(*x.shape[:2], -1))


class MoE(nn.Module):
    """Router and experts; the weights are a softmax over the chosen experts' logits only."""

    def __init__(self, config: ModelConfig, layer: int, experts: ExpertFormat) -> None:
        super().__init__()
        self.layer, self.top_k, self.num_experts = layer, config.num_experts_per_tok, config.num_local_experts
        activation = Activation(config.swiglu_alpha, config.swiglu_limit)
        self.router = nn.Linear(config.hidden_size, config.num_local_experts)
        self.experts = Experts(
            config.num_local_experts, config.hidden_size, config.intermediate_size, activation, experts
        )
        # What inference on a GPU runs instead, from x (N, C), the router's logits and which tokens are real: see
        # `gptoss_infer.tiled`.
        self.tiled: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        flat = x.flatten(0, 1)  # (N, C)
        if self.tiled is not None:
            assert context.watch is None, "experts in tiles show nothing: load the model again"
            return self.tiled(flat, self.router(flat), context.real).view_as(x)
        logits, chosen = self.router(flat).topk(self.top_k, dim=-1)  # (N, k), sorted
        weights = logits.softmax(-1, dtype=torch.promote_types(torch.float32, logits.dtype)).to(x.dtype)
        routing = Routing.of(chosen, self.num_experts)
        watch = context.watch
        if watch is not None:
            watch.routed(self.layer, chosen, routing.counts)
        show = None if watch is None else functools.partial(watch.computed, self.layer)
        recompute = context.recompute == "experts"
        return self.experts(flat, weights, routing, recompute=recompute, show=show).view_as(x)


class Layer(nn.Module):
    """Pre-norm block: attention, then experts, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, experts: ExpertFormat) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, layer, experts)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        attended = self.self_attn(self.input_layernorm(x), context)
        x, normed = self.post_attention_layernorm.of_sum(x, attended)
        return x + self.mlp(normed, context)


class Context:
    """What all layers share in one forward: rotations, what each query sees, the cache, and the options."""

    def __init__(self, config: ModelConfig, positions: Tensor, like: Tensor, cache: LayerCache | None) -> None:
        self.cache, self.real = cache, None if cache is None else cache.real
        device, dtype = like.device, like.dtype
        self.recompute: Recompute = "none"
        self.watch: Watch | None = None
        frequencies, scale = _frequencies_on(device, config.head_dim, config.rope)
        angles = positions.to(device).flatten().unsqueeze(1).float() * frequencies  # (N, D/2)
        self.angles: Angles = (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
        if cache is None:
            self.blocks = Blocks(document_starts(positions), device)


@functools.lru_cache(maxsize=8)
def _frequencies_on(device: torch.device, head_dim: int, rope: RopeConfig) -> tuple[Tensor, float]:
    """Return `rope_frequencies` on a device, where they stay: a CUDA graph can wait for no copy from the host."""
    with torch.inference_mode(False):
        frequencies, scale = rope_frequencies(head_dim, rope)
        return frequencies.to(device), scale


def document_starts(positions: Tensor) -> Tensor:
    """Return where the document of each token begins in the flattened batch, int64 (B T,) on the CPU.

    A document is a run of positions 0, 1, 2, ...; every row begins one.
    Raises: ValueError for other positions.
    """
    flat = positions.flatten().cpu()
    starts = torch.arange(len(flat)) - flat
    steps = flat.diff()
    row_starts = flat[:: positions.shape[1]] if len(flat) else flat
    if bool((row_starts != 0).any()) or bool(((steps != 1) & (flat[1:] != 0)).any()):
        raise ValueError(
            "without a cache, the positions of a row are those of whole documents: 0, 1, 2, ... for each, starting "
            f"over where the next begins; got {flat[:8].tolist()}..."
        )
    return starts


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig, experts: ExpertFormat) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, n, experts) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class GptOss(nn.Module):
    """A gpt-oss language model. Built empty; `gptoss_infer.load` fills it from a checkpoint."""

    def __init__(self, config: ModelConfig, experts: ExpertFormat = "mxfp4") -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, experts)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.adapters: Adapters | None = None  # several, of which engines choose

    @property
    def device(self) -> torch.device:
        """Where the model computes; its input belongs there. (The embedding may be on the host.)"""
        return self.lm_head.weight.device

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cache: LayerCache | None = None,
        *,
        recompute: Recompute = "none",
        offload: bool = False,
        watch: Watch | None = None,
    ) -> Tensor:
        """Return final hidden states (B, T, C), normalised, ready for `lm_head`.

        Args:
            input_ids: int64 (B, T). Padding goes to the right, where causality hides it.
            positions: int64 (B, T), on any device; 0..T-1 if omitted. Without a cache a row may hold several documents,
                one after another, whose positions start at 0 each; none sees another.
            cache: keeps keys and values, and knows which sequence each token goes on with; B is then 1.
            recompute: what the backward pass computes again instead of keeping: the experts' pre-activations, or whole
                layers (all but their inputs).
            offload: what `recompute="layers"` keeps waits in main memory.
            watch: is shown the routing and the pre-activations of every layer.
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        embedding = self.model.embed_tokens
        x = embedding(input_ids.to(embedding.weight.device)).to(self.device)  # (B, T, C)
        context = Context(self.config, positions, x, cache)
        context.recompute, context.watch = recompute, watch
        keep = save_on_cpu(pin_memory=x.is_cuda) if offload else nullcontext()
        with keep:
            for layer in self.model.layers:
                x = checkpoint(layer, x, context, use_reentrant=False) if recompute == "layers" else layer(x, context)
        context.watch = None  # not again in the backward pass
        return self.model.norm(x)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """Return logits (B, T, V); arguments as in `hidden`."""
        return self.lm_head(self.hidden(input_ids, positions, cache))
