"""The gpt-oss transformer in plain PyTorch: one definition for training and inference, differentiable, CPU and CUDA.

Module and parameter names are those of Hugging Face's checkpoint. Legend for shapes: B batch, T new tokens, S cached
and new tokens, H query heads, K key/value heads, R = H / K query heads per kv head, D head_dim, C hidden size, E
experts, I intermediate size, N = B T tokens, k experts per token.
Source: openai/gpt-oss model card (arXiv 2508.10925) and reference code; equal to transformers' GptOssForCausalLM
(tests).
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from gptoss_infer import kernels, mxfp4
from gptoss_infer.config import ModelConfig, RopeConfig

ExpertFormat = Literal["mxfp4", "bf16"]


class LayerCache(Protocol):
    """What attention asks of a cache: take this call's keys and values, return all of the layer's."""

    def update(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) at `positions` (B, T); return (B, K, S, D) where slot s holds position s."""
        ...


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 and cast back after the multiplication (unlike Llama's)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C) in the dtype of x."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, heads, T, D) by angles (B, 1, T, D/2); the pairs are the two halves of D."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention with one learned sink logit per head that takes probability and gives no value.

    Args:
        q: (B, H, T, D). k, v: (B, K, S, D). sinks: (H,). mask: bool (B, 1, 1, T, S), True where a query sees a key.
    Returns: (B, T, H D).
    """
    b, h, t, d = q.shape
    kv = k.shape[1]
    q = q.view(b, kv, h // kv, t, d)
    scores = torch.einsum("bkrtd,bksd->bkrts", q, k).float() * d**-0.5  # (B, K, R, T, S)
    scores = scores.masked_fill(~mask, -torch.inf)
    sink = sinks.float().view(1, kv, h // kv, 1, 1).expand(b, -1, -1, t, 1)
    weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]  # (B, K, R, T, S); rows sum to less than 1
    out = torch.einsum("bkrts,bksd->btkrd", weights.to(v.dtype), v)
    return out.reshape(b, t, h * d)


class Attention(nn.Module):
    """Grouped-query attention with sinks; full or sliding by the mask it is given."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, d
        self.q_proj = nn.Linear(c, config.num_attention_heads * d)
        self.k_proj = nn.Linear(c, config.num_key_value_heads * d)
        self.v_proj = nn.Linear(c, config.num_key_value_heads * d)
        self.o_proj = nn.Linear(config.num_attention_heads * d, c)
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        b, t, _ = x.shape
        q, k, v = (
            proj(x).view(b, t, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, H or K, T, D)
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v, context.positions)
        return self.o_proj(attention(q, k, v, self.sinks, context.masks[self.layer]))


def swiglu(x: Tensor, alpha: float, limit: float) -> Tensor:
    """(..., 2 I) -> (..., I): even columns gate, odd are linear; the gate is clamped above, the linear both ways."""
    gate, up = x[..., 0::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


class _DecodedLinear(torch.autograd.Function):
    """x W^T with W decoded from MXFP4, again in backward: autograd keeps the 4-bit bytes instead of a dense W."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, blocks: Tensor, scales: Tensor) -> Tensor:
        """(N, in), (out, G, 16), (out, G) -> (N, out)."""
        ctx.save_for_backward(blocks, scales)
        return x @ kernels.decode(blocks, scales, x.dtype).T

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient to x; the bytes have none."""
        blocks, scales = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0] @ kernels.decode(blocks, scales, grads[0].dtype), None, None


class ExpertLinear(nn.Module):
    """One projection of every expert of a layer: MXFP4 bytes, decoded when an expert is hit, or dense (E, in, out)."""

    blocks: Tensor  # uint8 (E, out, G, 16), if MXFP4
    scales: Tensor  # uint8 (E, out, G), if MXFP4

    def __init__(self, num_experts: int, in_features: int, out_features: int, experts: ExpertFormat) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        if experts == "mxfp4":
            groups = in_features // mxfp4.BLOCK
            self.register_buffer("blocks", torch.zeros(num_experts, out_features, groups, 16, dtype=torch.uint8))
            self.register_buffer("scales", torch.zeros(num_experts, out_features, groups, dtype=torch.uint8))
        else:
            self.weight = nn.Parameter(torch.zeros(num_experts, in_features, out_features))
        self.format = experts
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features))

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """Apply expert e to the next counts[e] rows of x (M, in), bias included; return (M, out)."""
        parts = []
        for expert, rows in enumerate(x.split(counts)):
            if counts[expert] == 0:
                continue
            if self.format == "mxfp4":
                product = _DecodedLinear.apply(rows, self.blocks[expert], self.scales[expert])
            else:
                product = rows @ self.weight[expert]
            parts.append(product + self.bias[expert])
        return torch.cat(parts)


class Experts(nn.Module):
    """The experts of one layer; each that is hit runs once, on all its tokens."""

    def __init__(self, config: ModelConfig, experts: ExpertFormat) -> None:
        super().__init__()
        e, c, i = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.num_experts, self.alpha, self.limit = e, config.swiglu_alpha, config.swiglu_limit
        self.gate_up_proj = ExpertLinear(e, c, 2 * i, experts)
        self.down_proj = ExpertLinear(e, i, c, experts)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sort tokens by expert, run the experts, and sum each token's k results in the order of `chosen`.

        Args:
            x: (N, C). chosen: int64 (N, k). weights: (N, k), softmax over the chosen.
        Returns: (N, C). Every sum has a fixed order, so results are reproducible.
        """
        n, k = chosen.shape
        order = chosen.view(-1).argsort(stable=True)  # (N k,): slots grouped by expert
        counts = torch.bincount(chosen.view(-1), minlength=self.num_experts).tolist()
        hidden = swiglu(self.gate_up_proj(x[order // k], counts), self.alpha, self.limit)  # (N k, I)
        grouped = self.down_proj(hidden, counts)  # (N k, C)
        places = torch.empty_like(order).scatter_(
            0, order, torch.arange(n * k, device=x.device)
        )  # where each slot went
        return (grouped[places].view(n, k, -1) * weights.unsqueeze(-1)).sum(1)


class MoE(nn.Module):
    """Router and experts; the weights are a softmax over the chosen experts' logits only."""

    def __init__(self, config: ModelConfig, experts: ExpertFormat) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_local_experts)
        self.experts = Experts(config, experts)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        flat = x.reshape(-1, x.shape[-1])  # (N, C)
        logits, chosen = self.router(flat).topk(self.top_k, dim=-1)  # (N, k), sorted
        weights = logits.float().softmax(-1).to(x.dtype)
        return self.experts(flat, chosen, weights).view_as(x)


class Layer(nn.Module):
    """Pre-norm block: attention, then experts, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, experts: ExpertFormat) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, experts)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Context:
    """What all layers share in one forward: positions, rotations, each layer's mask, and the cache."""

    def __init__(
        self, model: GptOss, positions: Tensor, cache: LayerCache | None, num_keys: int, dtype: torch.dtype
    ) -> None:
        config = model.config
        self.positions, self.cache = positions, cache
        frequencies, scale = rope_frequencies(config.head_dim, config.rope)
        angles = positions[:, None, :, None].float() * frequencies.to(positions.device)  # (B, 1, T, D/2)
        self.cos, self.sin = (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
        keys = torch.arange(num_keys, device=positions.device) if cache is not None else positions[:, None, :]
        distance = positions[:, :, None] - keys  # (B, T, S)
        causal = (distance >= 0)[:, None, None]  # (B, 1, 1, T, S)
        window = causal & (distance < config.sliding_window)[:, None, None]
        self.masks = [window if kind == "sliding_attention" else causal for kind in config.layer_types]


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

    @property
    def device(self) -> torch.device:
        """Where the embedding, and with it the input, lives."""
        return self.model.embed_tokens.weight.device

    def hidden(
        self, input_ids: Tensor, positions: Tensor | None = None, cache: LayerCache | None = None, num_keys: int = 0
    ) -> Tensor:
        """Return final hidden states (B, T, C), normalised, ready for `lm_head`.

        Args:
            input_ids: int64 (B, T). Padding goes to the right, where causality hides it.
            positions: int64 (B, T); 0..T-1 if omitted.
            cache: filled at `positions`; its first `num_keys` slots are attended to.
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        x = self.model.embed_tokens(input_ids)  # (B, T, C)
        context = Context(self, positions, cache, num_keys, x.dtype)
        for layer in self.model.layers:
            x = layer(x, context)
        return self.model.norm(x)

    def forward(
        self, input_ids: Tensor, positions: Tensor | None = None, cache: LayerCache | None = None, num_keys: int = 0
    ) -> Tensor:
        """Return logits (B, T, V); arguments as in `hidden`."""
        return self.lm_head(self.hidden(input_ids, positions, cache, num_keys))
