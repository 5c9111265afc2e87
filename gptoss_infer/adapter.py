"""LoRA adapters on disk in PEFT's format, read into plain tensors and written back; needs no PEFT.

Stock `peft` over stock `transformers` loads what is written here, and what it writes is read. PEFT addresses the
experts and the router through `target_parameters`: per layer it nests one wrapper for the experts' `down_proj` around
one for `gate_up_proj`, and stores A with rows ordered (expert, rank) and B with columns ordered (rank, expert).
Anything in an adapter that has no place here is an error: an adapter is loaded whole or not at all.
Source: peft 0.21 `ParamWrapper`, checked against it in tests.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoss_infer.config import ModelConfig, read_json
from gptoss_infer.errors import DataError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_up_proj", "down_proj")
ROUTER = "router"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
KEY = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>\d+)\."
    r"(?:self_attn\.(?P<attention>[qkvo]_proj)|mlp\.(?P<router>router)|mlp\.experts(?P<nested>\.base_layer)?)"
    r"\.lora_(?P<side>[AB])\.weight"
)
# Options of PEFT that change what an adapter computes and that nothing here implements.
UNSUPPORTED = (
    "use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "use_qalora",
    "layer_replication", "trainable_token_indices", "alora_invocation_tokens", "use_bdlora", "arrow_config",
    "velora_config", "kasa_config", "monteclora_config",
)  # fmt: skip


class Target(NamedTuple):
    """One adapted weight of a layer."""

    layer: int
    weight: str  # of ATTENTION or EXPERTS, or ROUTER

    @property
    def is_expert(self) -> bool:
        """Whether it is a projection of all experts."""
        return self.weight in EXPERTS

    @property
    def module(self) -> str:
        """Name of the module in our model."""
        owner = "mlp" if self.weight == ROUTER else "mlp.experts" if self.is_expert else "self_attn"
        return f"model.layers.{self.layer}.{owner}.{self.weight}"


class Factors(NamedTuple):
    """W' = W + scaling B A, W (out, in). Attention: A (r, in), B (out, r); experts: A (E, r, in), B (E, out, r)."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Adapter:
    """An adapter's hyperparameters and factors; `rank` is that of every target."""

    rank: int
    alpha: float
    rslora: bool
    dropout: float
    factors: dict[Target, Factors]
    base: str | None = None  # what it was trained over, as its config says

    @property
    def scaling(self) -> float:
        """Factor on B A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def delta(self, target: Target, expert: int | None = None) -> Tensor:
        """Return scaling B A as (out, in) fp32: of an attention weight, or of one expert."""
        a, b = self.factors[target]
        if expert is not None:
            a, b = a[expert], b[expert]
        return self.scaling * (b.float() @ a.float())


def read_adapter(directory: str | Path, config: ModelConfig) -> Adapter:
    """Read a PEFT LoRA adapter over a gpt-oss model and check it against the model's shapes.

    Raises: DataError naming what is missing, damaged, of another shape, or not supported.
    """
    directory = Path(directory)
    raw = read_json(directory / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise DataError(
            f"{directory / CONFIG}: peft_type is {raw.get('peft_type')!r}; only LORA adapters are supported"
        )
    used = [key for key in UNSUPPORTED if raw.get(key)]
    if used or raw.get("bias", "none") != "none":
        raise DataError(
            f"{directory / CONFIG}: {', '.join(used) or 'bias'} is set, which is not supported here; merging without "
            "it would give another model. Merge with the tool that wrote the adapter."
        )
    try:
        tensors = load_file(directory / WEIGHTS)
    except FileNotFoundError:
        raise DataError(
            f"{directory / WEIGHTS} is missing; give the directory that peft's save_pretrained wrote"
        ) from None
    except SafetensorError as error:
        raise DataError(f"{directory / WEIGHTS} is damaged ({error}); copy it again") from None
    factors = dict(_collect(tensors, raw, config, directory))
    if not factors:
        raise DataError(f"{directory} adapts nothing: {WEIGHTS} holds no LoRA tensors")
    return Adapter(
        rank=int(raw["r"]), alpha=float(raw["lora_alpha"]), rslora=bool(raw.get("use_rslora")),
        dropout=float(raw.get("lora_dropout", 0.0)), factors=factors, base=raw.get("base_model_name_or_path"),
    )  # fmt: skip


def _collect(
    tensors: dict[str, Tensor], raw: dict[str, Any], config: ModelConfig, directory: Path
) -> Iterator[tuple[Target, Factors]]:
    """Yield every target with both factors, in the order of the model."""
    found: dict[Target, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None or int(match["layer"]) >= config.num_hidden_layers:
            unknown.append(key)
            continue
        layer = int(match["layer"])
        nested = any(f"layers.{layer}.mlp.experts.base_layer." in other for other in tensors)
        weight = (
            match["attention"] or match["router"] or _expert_weight(raw, nested, match["nested"] is not None, directory)
        )
        found.setdefault(Target(layer, weight), {})[match["side"]] = tensor
    if unknown:
        raise DataError(
            f"{directory / WEIGHTS}: {len(unknown)} tensors have no place in a {config.num_hidden_layers}-layer "
            f"gpt-oss model, such as {unknown[0]}; supported are {', '.join(ATTENTION)}, {ROUTER} and the "
            f"experts' {' and '.join(EXPERTS)}"
        )
    for target, sides in sorted(found.items()):
        if sides.keys() != {"A", "B"}:
            raise DataError(
                f"{directory / WEIGHTS}: {target.module} has lora_{'B' if 'B' in sides else 'A'} only; copy it again"
            )
        yield target, _checked(target, sides["A"], sides["B"], int(raw["r"]), config, directory)


def _expert_weight(raw: dict[str, Any], nested: bool, inner: bool, directory: Path) -> str:
    """Say which projection a wrapper of the experts adapts: PEFT keeps that in its config, not in tensors' names."""
    listed = {str(name).rpartition(".")[2] for name in raw.get("target_parameters") or []} & set(EXPERTS)
    if nested:
        return "gate_up_proj" if inner else "down_proj"
    if len(listed) == 1:
        return listed.pop()
    raise DataError(
        f"{directory / CONFIG}: target_parameters {raw.get('target_parameters')} does not say which of {EXPERTS} "
        "the single adapter of the experts belongs to"
    )


def _checked(target: Target, a: Tensor, b: Tensor, rank: int, config: ModelConfig, directory: Path) -> Factors:
    """Return the factors in our order after comparing their shapes with the model's."""
    into, out = weight_shape(target.weight, config)
    experts = config.num_local_experts if target.is_expert else 1
    if a.shape != (experts * rank, into) or b.shape != (out, rank * experts):
        raise DataError(
            f"{directory / WEIGHTS}: {target.module} has A {tuple(a.shape)} and B {tuple(b.shape)}, expected "
            f"{(experts * rank, into)} and {(out, rank * experts)}; was it trained over another model?"
        )
    if not target.is_expert:
        return Factors(a, b)
    return Factors(a.view(experts, rank, into), b.view(out, rank, experts).permute(2, 0, 1).contiguous())


def weight_shape(weight: str, config: ModelConfig) -> tuple[int, int]:
    """Return (in, out) of an adaptable weight (of one expert)."""
    c, i = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "q_proj": (c, q), "k_proj": (c, kv), "v_proj": (c, kv), "o_proj": (q, c),
        "gate_up_proj": (c, 2 * i), "down_proj": (i, c), ROUTER: (c, config.num_local_experts),
    }[weight]  # fmt: skip


def write_adapter(directory: Path, adapter: Adapter, config: ModelConfig) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as peft's save_pretrained would for this model."""
    tensors = {}
    for target, (a, b) in adapter.factors.items():
        prefix = f"{PREFIX}{target.module}"
        if target.is_expert:
            both = all(Target(target.layer, weight) in adapter.factors for weight in EXPERTS)
            nesting = ".base_layer" if both and target.weight == "gate_up_proj" else ""
            prefix = f"{PREFIX}model.layers.{target.layer}.mlp.experts{nesting}"
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)  # (E r, in), (out, r E)
        tensors[f"{prefix}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = b.detach().cpu().contiguous()
    save_tensors(directory / WEIGHTS, tensors)
    parameters = [
        *_listed(adapter.factors, EXPERTS, "mlp.experts", config),
        *(f"{name}.weight" for name in _listed(adapter.factors, (ROUTER,), "mlp", config)),
    ]
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0 if parameters else adapter.dropout,  # PEFT loads no parameters with it; training is over
        "use_rslora": adapter.rslora,
        "bias": "none",
        "target_modules": _listed(adapter.factors, ATTENTION, "self_attn", config),
        "target_parameters": parameters,
    }
    (directory / CONFIG).write_text(json.dumps(raw, indent=2) + "\n")


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file; a full disk is an OSError, which the library hides in an error of its own."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        cause = re.search(r"\(os error (\d+)\)", str(error))
        if cause is None:
            raise
        number = int(cause[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _listed(targets: Iterable[Target], weights: tuple[str, ...], owner: str, config: ModelConfig) -> list[str]:
    """Name the adapted weights: once if every layer has them, else layer by layer (PEFT matches the ends of names)."""
    names: list[str] = []
    for weight in weights:
        layers = sorted(target.layer for target in targets if target.weight == weight)
        if len(layers) == config.num_hidden_layers:
            names.append(f"{owner}.{weight}")
        else:
            names += [f"layers.{layer}.{owner}.{weight}" for layer in layers]
    return names


def zero_like(config: ModelConfig, targets: Iterable[Target], rank: int, alpha: float) -> Adapter:
    """Return an adapter that changes nothing (B = 0), fp32."""
    factors = {}
    for target in targets:
        into, out = weight_shape(target.weight, config)
        lead = (config.num_local_experts,) if target.is_expert else ()
        factors[target] = Factors(torch.zeros(*lead, rank, into), torch.zeros(*lead, out, rank))
    return Adapter(rank, alpha, False, 0.0, factors)
