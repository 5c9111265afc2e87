"""The model run by compiled CPU kernels: what the engine computes a step with instead of `GptOss.hidden`, where it can.

A second way through the layers, beside `gptoss_infer.model`, for one reason: calling its modules one by one costs 10 to
30% of the time of a token, measured on models of 0.1 to 1 billion parameters. It is the same arithmetic (tests compare
it with the model, and with transformers), and covers bf16 and fp32, MXFP4 experts, and LoRA.

What a token yields is the same bits whatever it was computed with: the order of every sum is fixed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from gptoss_infer import kernels
from gptoss_infer.errors import UsageError
from gptoss_infer.experts import ExpertLinear
from gptoss_infer.kernels import cpu
from gptoss_infer.model import GptOss, Layer, rope_frequencies
from gptoss_infer.pages import Kind, PagedCache
from gptoss_infer.scheduler import Chunk

_LOG = logging.getLogger(__name__)


class CompiledModel:
    """A model and its cache. Takes their tensors as they are: move the model before.

    Of several adapters (`gptoss_infer.lora.Adapters`) each has its own table of the layers' tensors.
    """

    def __init__(self, model: GptOss, cache: PagedCache, compiled: cpu.Kernels) -> None:
        self.model, self.cache, self.compiled, config = model, cache, compiled, model.config
        self._shape = cpu.Shape(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            eps=config.rms_norm_eps,
            alpha=config.swiglu_alpha,
            limit=config.swiglu_limit,
        )
        self._taken = [(p, p.data_ptr()) for name, p in model.named_parameters() if "lora_" not in name]
        self._of_adapter: dict[str | None, cpu.Layers] = {}
        self.use(None)
        self.frequencies, self.scale = rope_frequencies(config.head_dim, config.rope)

    def check(self) -> None:
        """Raise UsageError if a tensor of the model is no longer where it was."""
        if any(parameter.data_ptr() != place for parameter, place in self._taken):
            raise UsageError("the model was moved or converted since this engine was made: make another engine")

    def use(self, adapter: str | None) -> None:
        """Compute with the factors that are in the model's layers now; `adapter` is what they are known by."""
        if adapter not in self._of_adapter:
            with torch.no_grad():
                pools = zip(self.model.model.layers, self.cache.keys, self.cache.values, strict=True)
                layers = [_layer(layer, *pair) for layer, *pair in pools]
            self._of_adapter[adapter] = cpu.Layers(self.compiled, self._shape, layers)
        self.layers = self._of_adapter[adapter]

    def forget(self, adapter: str) -> None:
        """Let go of the tensors of an adapter that is not in use, if it ever was."""
        self._of_adapter.pop(adapter, None)

    @classmethod
    def of(cls, model: GptOss, cache: PagedCache) -> CompiledModel | None:
        """Return the compiled form, or None, and a line that says why, where plain PyTorch has to do."""
        weight = model.lm_head.weight
        if not weight.is_cpu or weight.dtype not in cpu.DTYPES or (compiled := kernels.cpu_kernels()) is None:
            return None
        others = {p.dtype for name, p in model.named_parameters() if "norm" not in name and "lora_" not in name}
        if others != {weight.dtype}:
            found = ", ".join(sorted(map(str, others)))
            _LOG.warning(
                "the CPU runs plain PyTorch instead of our compiled kernels, more slowly: weights of %s", found
            )
            return None
        if any(isinstance(module, ExpertLinear) and module.format != "mxfp4" for module in model.modules()):
            _LOG.warning(
                "the CPU runs plain PyTorch instead of our compiled kernels, more slowly: experts are held dense, "
                "not in MXFP4"
            )
            return None
        return cls(model, cache, compiled)

    def hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute a step; return the final hidden states (B, C) of the tokens that sequences end with."""
        ids = [token for s, first, length in chunks for token in s.tokens[first : first + length]]
        numbers = [number for number, chunk in enumerate(chunks) for _ in range(chunk.length)]
        positions = [position for _, first, length in chunks for position in range(first, first + length)]
        places = cpu.Places(*torch.tensor([numbers, positions]))
        angles = places.positions[:, None] * self.frequencies  # (N, D / 2)
        x = self.model.model.embed_tokens.weight.index_select(0, torch.tensor(ids))  # (N, C)
        cos, sin = angles.cos().mul_(self.scale), angles.sin().mul_(self.scale)
        self.layers.run_(x, (cos, sin), places, _pages(chunks, "full"), _pages(chunks, "window"))
        ends = accumulate(chunk.length for chunk in chunks)
        rows = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.reaches_end]
        if len(rows) < len(x):
            x = x.index_select(0, torch.tensor(rows, dtype=torch.int64))
        norm = self.model.model.norm
        return self.compiled.rms_norm(x, norm.weight, norm.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, C) -> (B, V) in fp32, not rounded to the model's dtype in between."""
        return self.compiled.linear(hidden, cpu.Affine(self.model.lm_head.weight), torch.float32)


def _pages(chunks: Sequence[Chunk], kind: Kind) -> cpu.Pages:
    held = [s.full if kind == "full" else s.window for s, _, _ in chunks]
    longest = max(map(len, held))
    padded = torch.tensor([pages + [0] * (longest - len(pages)) for pages in held], dtype=torch.int64)
    first = [0 if kind == "full" else s.window_first for s, _, _ in chunks]
    return cpu.Pages(padded, torch.tensor(first))


def _layer(layer: nn.Module, keys: Tensor, values: Tensor) -> cpu.Layer:
    assert isinstance(layer, Layer), f"a model's layers are Layers, not {type(layer).__name__}"
    attention, mlp = layer.self_attn, layer.mlp
    return cpu.Layer(
        input_norm=layer.input_layernorm.weight,
        post_norm=layer.post_attention_layernorm.weight,
        q=_affine(attention.q_proj),
        k=_affine(attention.k_proj),
        v=_affine(attention.v_proj),
        o=_affine(attention.o_proj),
        router=_affine(mlp.router),
        sinks=attention.sinks,
        gate_up=_packed(mlp.experts.gate_up_proj),
        down=_packed(mlp.experts.down_proj),
        keys=keys,
        values=values,
        window=attention.window or 0,
    )


class _Adapted(Protocol):
    """What is read of `gptoss_infer.lora.LoraLinear`, whose module brings peft."""

    base_layer: nn.Linear
    enabled: bool
    scaling: dict[str, float]

    @property
    def factors(self) -> tuple[Tensor, Tensor]: ...


def _affine(module: nn.Module) -> cpu.Affine:
    if isinstance(module, nn.Linear):
        return cpu.Affine(module.weight, module.bias)
    adapted = cast(_Adapted, module)
    weight, bias, (scaling,) = adapted.base_layer.weight, adapted.base_layer.bias, adapted.scaling.values()
    return cpu.Affine(weight, bias, _low_rank(*adapted.factors, scaling, weight.dtype) if adapted.enabled else None)


def _packed(module: ExpertLinear) -> cpu.Packed:
    p = module.projection()
    assert p.scales is not None, "dense experts are not compiled"
    lora = None if p.a is None or p.b is None or p.merged else _low_rank(p.a, p.b, p.scaling, p.bias.dtype)
    return cpu.Packed(p.weight, p.scales, p.bias, lora)


def _low_rank(a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> cpu.LowRank:
    return cpu.LowRank(a.to(dtype), (b * scaling).to(dtype))
