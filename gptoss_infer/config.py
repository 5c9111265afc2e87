"""The architecture of a gpt-oss checkpoint as one typed object, read from and written to either `config.json` spelling.

Hugging Face's and OpenAI's (`original/config.json`) files name a few fields differently; transformers 5 nests RoPE
under `rope_parameters` where earlier releases had `rope_scaling` and `rope_theta`. All are read here. What this
architecture cannot express (another activation, tied embeddings, another RoPE type) is refused rather than ignored.
Sources: openai/gpt-oss model card (arXiv 2508.10925), `ModelConfig` of the reference code, transformers' GptOssConfig.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from gptoss_infer.errors import DataError

LayerType = Literal["sliding_attention", "full_attention"]

# OpenAI's spelling -> ours, where they differ.
ORIGINAL_NAMES = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
REQUIRED = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_local_experts", "num_experts_per_tok",
    "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "sliding_window",
)  # fmt: skip


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: plain when `factor` is 1, else YaRN (NTK by parts, arXiv 2309.00071)."""

    theta: float = 150000.0
    factor: float = 32.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position_embeddings: int = 4096
    truncate: bool = False  # True rounds the ramp's ends to whole dimensions; gpt-oss does not

    def __post_init__(self) -> None:
        """Refuse what gives no frequencies."""
        for name in ("theta", "factor", "beta_fast", "beta_slow", "original_max_position_embeddings"):
            if getattr(self, name) <= 0:
                raise DataError(f"config: RoPE's {name} is {getattr(self, name)}, expected more than 0")


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one model; names are those of Hugging Face's `config.json`."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_local_experts: int
    num_experts_per_tok: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int  # keys a query of a sliding layer sees, itself included
    layer_types: tuple[LayerType, ...]
    rope: RopeConfig = field(default_factory=RopeConfig)
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702

    def __post_init__(self) -> None:
        """Refuse what no model can have; every message names the field and its value."""
        for name in REQUIRED:
            if getattr(self, name) < 1:
                raise DataError(f"config: {name} is {getattr(self, name)}, expected at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise DataError(
                f"config: num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise DataError(
                f"config: num_experts_per_tok {self.num_experts_per_tok} exceeds num_local_experts "
                f"{self.num_local_experts}"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise DataError(
                f"config: layer_types has {len(self.layer_types)} entries, num_hidden_layers is "
                f"{self.num_hidden_layers}"
            )
        if self.head_dim % 2:
            raise DataError(f"config: head_dim is {self.head_dim}; rotary embedding needs an even number")

    @property
    def max_position_embeddings(self) -> int:
        """Longest context in tokens."""
        return int(self.rope.original_max_position_embeddings * self.rope.factor)


def published(size: Literal["20b", "120b"]) -> ModelConfig:
    """Return the architecture of openai/gpt-oss-20b or -120b (model card, arXiv 2508.10925, and their config.json)."""
    layers, experts = {"20b": (24, 32), "120b": (36, 128)}[size]
    return ModelConfig(
        num_hidden_layers=layers, hidden_size=2880, intermediate_size=2880, num_local_experts=experts,
        num_experts_per_tok=4, num_attention_heads=64, num_key_value_heads=8, head_dim=64, vocab_size=201088,
        sliding_window=128, layer_types=alternating(layers),
    )  # fmt: skip


def alternating(num_layers: int) -> tuple[LayerType, ...]:
    """Return gpt-oss' layer types: sliding, full, sliding, full, ..."""
    return tuple("full_attention" if n % 2 else "sliding_attention" for n in range(num_layers))


def parse_config(raw: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """Return the typed config of a parsed `config.json` in either spelling.

    Raises: DataError naming `source`, the key, its value and what was expected.
    """
    named = {ORIGINAL_NAMES.get(key, key): value for key, value in raw.items() if key != "experts_per_token"}
    named.setdefault("num_experts_per_tok", raw.get("experts_per_token"))
    missing = [name for name in REQUIRED if named.get(name) is None]
    if missing:
        raise DataError(f"{source}: missing {', '.join(missing)}; is this the config of a gpt-oss checkpoint?")
    _refuse_other_architectures(named, source)
    for name in REQUIRED:
        if not isinstance(named[name], int) or isinstance(named[name], bool):
            raise DataError(f"{source}: {name} is {named[name]!r}, expected an integer")
    layers = named["num_hidden_layers"]
    layer_types: Any = named.get("layer_types") or list(alternating(layers))
    if not isinstance(layer_types, list) or any(t not in get_args(LayerType) for t in layer_types):
        raise DataError(f"{source}: layer_types is {layer_types!r}, expected one of {get_args(LayerType)} per layer")
    try:
        return ModelConfig(
            **{name: named[name] for name in REQUIRED},
            layer_types=tuple(layer_types),
            rope=_parse_rope(named, source),
            rms_norm_eps=_number(named, "rms_norm_eps", 1e-5, source),
            swiglu_limit=_number(named, "swiglu_limit", 7.0, source),
            swiglu_alpha=_number(named, "swiglu_alpha", 1.702, source),
        )
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def _number(raw: dict[str, Any], key: str, default: float | None, source: str) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:  # NaN neither
        raise DataError(f"{source}: {key} is {value!r}, expected a number")
    return float(value)


def _refuse_other_architectures(raw: dict[str, Any], source: str) -> None:
    expected = {
        "model_type": ("gpt_oss",),
        "hidden_act": ("silu",),  # what the published files say; the real activation is the clamped SwiGLU
        "attention_bias": (True,),
        "tie_word_embeddings": (False,),
        "attention_dropout": (0, 0.0),
    }
    for key, allowed in expected.items():
        if key in raw and raw[key] not in allowed:
            raise DataError(f"{source}: {key} is {raw[key]!r}; gpt-oss has {allowed[0]!r}, nothing else is supported")


def _parse_rope(raw: dict[str, Any], source: str) -> RopeConfig:
    """Read the three spellings: original's flat keys, `rope_scaling` + `rope_theta`, `rope_parameters`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise DataError(f"{source}: RoPE is {rope!r}, expected an object with rope_type")
    theta = _number(rope if "rope_theta" in rope else raw, "rope_theta", 150000.0, source)
    if "rope_scaling_factor" in raw:
        return RopeConfig(
            theta=theta,
            factor=_number(raw, "rope_scaling_factor", None, source),
            beta_fast=_number(raw, "rope_ntk_beta", 32.0, source),
            beta_slow=_number(raw, "rope_ntk_alpha", 1.0, source),
            original_max_position_embeddings=int(_number(raw, "initial_context_length", 4096, source)),
        )
    if not rope:
        raise DataError(
            f"{source}: says nothing of RoPE, where transformers assumes gpt-oss-20b's YaRN; add rope_parameters, "
            'such as {"rope_type": "yarn", "factor": 32.0, "rope_theta": 150000, ...} or {"rope_type": "default"}'
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        context = int(_number(raw, "max_position_embeddings", 131072, source))
        return RopeConfig(theta=theta, factor=1.0, original_max_position_embeddings=context)
    known = {"rope_type", "type", "rope_theta", "factor", "beta_fast", "beta_slow", "truncate",
             "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim"}  # fmt: skip
    if (
        kind != "yarn"
        or set(rope) - known
        or any(rope.get(k) for k in ("attention_factor", "mscale", "mscale_all_dim"))
    ):
        raise DataError(
            f"{source}: RoPE {rope!r} is not supported; expected rope_type 'yarn' (factor, beta_fast, beta_slow, "
            "original_max_position_embeddings, truncate) or 'default'"
        )
    original = _number(raw, "initial_context_length", 4096, source)
    if rope.get("original_max_position_embeddings"):
        original = _number(rope, "original_max_position_embeddings", None, source)
    return RopeConfig(
        theta=theta,
        factor=_number(rope, "factor", None, source),
        beta_fast=_number(rope, "beta_fast", 32.0, source),
        beta_slow=_number(rope, "beta_slow", 1.0, source),
        original_max_position_embeddings=int(original),
        truncate=bool(rope.get("truncate", True)),  # absent means True in transformers
    )


def load_config(directory: Path) -> ModelConfig:
    """Read `directory/config.json`."""
    return parse_config(read_json(directory / "config.json"), str(directory / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file; DataError if the file is missing, no JSON or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; a checkpoint directory holds config.json and *.safetensors") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}; fetch the file again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def to_hf_json(config: ModelConfig, *, quantized: bool) -> dict[str, Any]:
    """Return the `config.json` of Hugging Face's layout; `quantized` adds the MXFP4 section."""
    rope = config.rope
    plain = {key: value for key, value in asdict(config).items() if key not in ("rope", "layer_types", "swiglu_alpha")}
    raw: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **plain,
        "experts_per_token": config.num_experts_per_tok,
        "layer_types": list(config.layer_types),
        "initial_context_length": rope.original_max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": rope.theta,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": rope.factor,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
            "truncate": rope.truncate,
        },
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_cache": True,
        "output_router_logits": False,
        "eos_token_id": 200002,
        "pad_token_id": 199999,
        "torch_dtype": "bfloat16",
    }
    return {**raw, "quantization_config": QUANTIZATION_CONFIG} if quantized else raw


QUANTIZATION_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def to_original_json(config: ModelConfig) -> dict[str, Any]:
    """Return the `config.json` of OpenAI's `original/` layout.

    Raises: DataError where that spelling cannot say it (layer types that do not alternate, a truncated YaRN ramp).
    """
    alternating = all((kind == "sliding_attention") == (n % 2 == 0) for n, kind in enumerate(config.layer_types))
    if not alternating or (config.rope.truncate and config.rope.factor != 1) or config.rms_norm_eps != 1e-5:
        raise DataError(
            "the original layout's config.json cannot express this model (it fixes alternating layer types, an "
            f"untruncated YaRN ramp and rms_norm_eps 1e-5); got {config.layer_types}, truncate={config.rope.truncate}, "
            f"rms_norm_eps={config.rms_norm_eps}. Keep the hf layout."
        )
    return {
        "num_hidden_layers": config.num_hidden_layers,
        "num_experts": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "swiglu_limit": config.swiglu_limit,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "sliding_window": config.sliding_window,
        "initial_context_length": config.rope.original_max_position_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling_factor": config.rope.factor,
        "rope_ntk_alpha": config.rope.beta_slow,
        "rope_ntk_beta": config.rope.beta_fast,
    }
