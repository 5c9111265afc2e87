"""LoRA on a loaded model, through PEFT: its own layer for attention, ours for the experts.

PEFT's layer for stacked experts builds B A for every expert in every forward, a full weight delta (1.6 GB a layer for
20b). Ours applies (x A_e^T) B_e^T to the tokens routed to expert e. Imports peft, which takes seconds; import where it
is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from gptoss_infer.adapter import ATTENTION, Adapter, Factors, Target, read_adapter
from gptoss_infer.errors import UsageError
from gptoss_infer.experts import ExpertLinear, Projection
from gptoss_infer.model import GptOss

NAME = "default"  # PEFT's name for a model's only adapter


class LoraExpertLinear(nn.Module, LoraLayer):
    """An ExpertLinear plus a low-rank term per expert: A (E, r, in), B (E, out, r), kept in fp32."""

    # Narrower than in PEFT, whose layers are pairs of linear modules of any size.
    lora_A: nn.ParameterDict  # type: ignore[assignment]
    lora_B: nn.ParameterDict  # type: ignore[assignment]
    base_layer: ExpertLinear
    in_features: int
    out_features: int

    def __init__(
        self,
        base_layer: ExpertLinear,
        adapter_name: str,
        *,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: object,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self._active_adapter = adapter_name
        experts, device = base_layer.num_experts, base_layer.bias.device
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.dropout_rate = config.lora_dropout
        a = torch.empty(experts, r, self.in_features, device=device)
        nn.init.uniform_(a, -(self.in_features**-0.5), self.in_features**-0.5)  # nn.Linear's default, as PEFT has it
        self.lora_A[adapter_name] = nn.Parameter(a)
        self.lora_B[adapter_name] = nn.Parameter(torch.zeros(experts, self.out_features, r, device=device))

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, ExpertLinear), f"registered for ExpertLinear, got {type(module).__name__}"
        return module.in_features, module.out_features

    def projection(self) -> Projection:
        """As ExpertLinear.projection, with the factors."""
        factors = self.lora_A[NAME], self.lora_B[NAME]
        dropout = self.dropout_rate if self.training else 0.0
        return Projection(*self.base_layer.projection()[:3], *factors, self.scaling[NAME], dropout)


def attach(
    model: GptOss, targets: Iterable[Target], *, rank: int, alpha: float, dropout: float, rslora: bool
) -> list[nn.Parameter]:
    """Add trainable LoRA factors (fp32, B = 0) to the targets; all other parameters are frozen.

    Returns: the factors, in the order of the model.
    Raises: UsageError if `targets` is empty or names a layer or weight that the model lacks.
    """
    targets = sorted(targets)
    modules = {target.module for target in targets}
    present = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, ExpertLinear))}
    if not targets or modules - present:
        adaptable = sorted({name.rpartition(".")[2] for name in present if "self_attn" in name or "experts" in name})
        raise UsageError(
            f"LoRA targets {sorted(modules - present) or 'are empty'}: nothing would be trained there. The model has "
            f"{model.config.num_hidden_layers} layers (0..{model.config.num_hidden_layers - 1}), each with "
            f"{', '.join(adaptable)}."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # declared int, used as a number
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=sorted(modules),
    )
    config._register_custom_module({ExpertLinear: LoraExpertLinear})
    inject_adapter_in_model(config, model, adapter_name=NAME)
    factors = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # PEFT casts to the base's dtype; bf16 factors lose small updates
            factors.append(parameter)
    attached = {target for target in targets if isinstance(model.get_submodule(target.module), LoraLayer)}
    assert attached == set(targets), f"PEFT left out {set(targets) - attached}"
    assert len(factors) == 2 * len(targets), f"PEFT attached {len(factors)} factors to {len(targets)} targets"
    return factors


def factors_of(model: GptOss, targets: Iterable[Target]) -> dict[Target, Factors]:
    """Return the (live) factors of attached targets."""
    found = {}
    for target in targets:
        layer = model.get_submodule(target.module)
        assert isinstance(layer, LoraLayer), f"{target.module} has no factors: attach them first"
        pair = layer.lora_A[NAME], layer.lora_B[NAME]
        a, b = (half.weight if isinstance(half, nn.Linear) else half for half in pair)
        assert isinstance(a, Tensor), f"{target.module} holds {type(a).__name__}, expected a parameter"
        assert isinstance(b, Tensor), f"{target.module} holds {type(b).__name__}, expected a parameter"
        found[target] = Factors(a, b)
    return found


def load_adapter(model: GptOss, adapter: str | Path | Adapter) -> None:
    """Attach an adapter from disk (ours or a peer's, in PEFT's format) to a model, for inference.

    Raises: DataError if any part of it does not fit the model.
    """
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter, model.config)
    attach(model, adapter.factors, rank=adapter.rank, alpha=adapter.alpha, dropout=0.0, rslora=adapter.rslora)
    live = factors_of(model, adapter.factors)
    with torch.no_grad():
        for target, (a, b) in adapter.factors.items():
            live[target].a.copy_(a)
            live[target].b.copy_(b)
    model.eval().requires_grad_(False)


def all_targets(
    num_layers: int, attention: Iterable[str], experts: Iterable[str], layers: Iterable[int] | None = None
) -> list[Target]:
    """Return the targets for the given weights of the given layers (all if None)."""
    chosen = range(num_layers) if layers is None else layers
    return [Target(layer, weight) for layer in chosen for weight in (*attention, *experts)]


__all__ = ["ATTENTION", "LoraExpertLinear", "all_targets", "attach", "factors_of", "load_adapter"]
