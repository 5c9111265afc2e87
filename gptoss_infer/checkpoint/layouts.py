"""Names and shapes of every tensor in both published layouts; pure data and functions, no files.

Legend: V vocabulary, C hidden size, I intermediate size, E experts, H/K query/key-value heads, D head_dim, G blocks of
32. Hugging Face names are canonical. OpenAI's `original/` layout has the same MXFP4 bytes under other names, and q, k
and v as one tensor. bf16 experts exist in Hugging Face's layout only, transposed to (E, in, out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from gptoss_infer.config import ModelConfig
from gptoss_infer.errors import DataError
from gptoss_infer.mxfp4 import BLOCK

Layout = Literal["hf", "original"]
ExpertFormat = Literal["mxfp4", "bf16"]
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")

# Tensors outside the layers, then those of a layer: Hugging Face's name -> OpenAI's (original/) name.
GLOBAL_NAMES = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
}
LAYER_NAMES = {
    "input_layernorm.weight": "attn.norm.scale",
    "self_attn.q_proj.weight": "attn.qkv.weight",
    "self_attn.k_proj.weight": "attn.qkv.weight",
    "self_attn.v_proj.weight": "attn.qkv.weight",
    "self_attn.q_proj.bias": "attn.qkv.bias",
    "self_attn.k_proj.bias": "attn.qkv.bias",
    "self_attn.v_proj.bias": "attn.qkv.bias",
    "self_attn.sinks": "attn.sinks",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_proj_blocks": "mlp.mlp1_weight.blocks",
    "mlp.experts.gate_up_proj_scales": "mlp.mlp1_weight.scales",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_blocks": "mlp.mlp2_weight.blocks",
    "mlp.experts.down_proj_scales": "mlp.mlp2_weight.scales",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
}


class Slot(NamedTuple):
    """Where a canonical tensor lives: the stored tensor's name and, for a part of one, its rows."""

    name: str
    rows: slice | None = None


def expected_shapes(config: ModelConfig, experts: ExpertFormat) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor under its canonical name, in the order of the model."""
    c, i, e = config.hidden_size, config.intermediate_size, config.num_local_experts
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, c)}
    for n in range(config.num_hidden_layers):
        layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (c,)}
        for proj, rows, columns in (("q", q, c), ("k", kv, c), ("v", kv, c), ("o", c, q)):
            layer[f"self_attn.{proj}_proj.weight"] = (rows, columns)
            layer[f"self_attn.{proj}_proj.bias"] = (rows,)
        layer["self_attn.sinks"] = (config.num_attention_heads,)
        layer["post_attention_layernorm.weight"] = (c,)
        layer["mlp.router.weight"] = (e, c)
        layer["mlp.router.bias"] = (e,)
        for name, rows, columns in (("gate_up_proj", 2 * i, c), ("down_proj", c, i)):
            if experts == "mxfp4":
                if columns % BLOCK:
                    raise DataError(f"config: {name} has {columns} inputs; MXFP4 needs a multiple of {BLOCK}")
                layer[f"mlp.experts.{name}_blocks"] = (e, rows, columns // BLOCK, BLOCK // 2)
                layer[f"mlp.experts.{name}_scales"] = (e, rows, columns // BLOCK)
            else:
                layer[f"mlp.experts.{name}"] = (e, columns, rows)
            layer[f"mlp.experts.{name}_bias"] = (e, rows)
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (c,)
    shapes["lm_head.weight"] = (config.vocab_size, c)
    return shapes


def original_slot(name: str, config: ModelConfig) -> Slot:
    """Return where the canonical tensor `name` lives in OpenAI's layout."""
    if name in GLOBAL_NAMES:
        return Slot(GLOBAL_NAMES[name])
    _, _, n, suffix = name.split(".", 3)
    target = f"block.{n}.{LAYER_NAMES[suffix]}"
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    rows = {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}
    part = suffix.removeprefix("self_attn.")[0] if ".qkv." in target else None
    return Slot(target, rows[part] if part else None)


def detect(names: Sequence[str]) -> tuple[Layout, ExpertFormat]:
    """Return layout and expert format from stored tensor names; DataError if they are none of ours."""
    present = set(names)
    if "embedding.weight" in present:
        return "original", "mxfp4"
    if "model.embed_tokens.weight" in present:
        dense = any(name.endswith("mlp.experts.gate_up_proj") for name in present)
        return "hf", "bf16" if dense else "mxfp4"
    raise DataError(
        f"no gpt-oss tensors found: expected model.embed_tokens.weight (Hugging Face) or embedding.weight (original), "
        f"got {len(present)} others such as {sorted(present)[:3]}"
    )
