"""LoRA on a loaded model: PEFT finds and wraps the weights, the products are ours.

PEFT's layer for stacked experts builds B A for every expert in every forward, a full weight delta (1.6 GB a layer for
20b). Ours applies (x A_e^T) B_e^T to the tokens routed to expert e (`gptoss_infer.experts`). Its layer for linear
weights keeps an fp32 copy of x for each of q, k and v; ours keeps x once. Imports peft, which takes seconds; import
where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from gptoss_infer import rounding
from gptoss_infer.adapter import Adapter, Factors, Target, read_adapter
from gptoss_infer.errors import UsageError
from gptoss_infer.experts import ExpertLinear, Projection
from gptoss_infer.model import GptOss
from gptoss_infer.rounding import Rounding

NAME = "default"  # PEFT's name for a model's only adapter


class _Lora(nn.Module, LoraLayer):
    """A frozen layer and its factors, fp32: A (..., r, in), B (..., out, r), B = 0 at first."""

    # Narrower than in PEFT, whose layers are pairs of linear modules of any size.
    lora_A: nn.ParameterDict  # type: ignore[assignment]
    lora_B: nn.ParameterDict  # type: ignore[assignment]
    in_features: int
    out_features: int

    def __init__(
        self,
        base_layer: nn.Linear | ExpertLinear,
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
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.dropout, self.enabled = config.lora_dropout, True
        assert base_layer.bias is not None, "every adaptable weight of gpt-oss has a bias"
        lead, device = base_layer.bias.shape[:-1], base_layer.bias.device
        a = torch.empty(*lead, r, self.in_features, device=device)
        nn.init.uniform_(a, -(self.in_features**-0.5), self.in_features**-0.5)  # nn.Linear's default, as PEFT has it
        self.lora_A[adapter_name] = nn.Parameter(a)
        self.lora_B[adapter_name] = nn.Parameter(torch.zeros(*lead, self.out_features, r, device=device))

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, (nn.Linear, ExpertLinear)), f"not registered for {type(module).__name__}"
        return module.in_features, module.out_features

    @property
    def factors(self) -> Factors:
        """A and B."""
        return Factors(self.lora_A[NAME], self.lora_B[NAME])

    def let_go(self, a: nn.Parameter, b: nn.Parameter) -> None:
        """Put empty factors in place of these, if they are there, and keep nothing that was made of them."""
        if self.lora_A[NAME] is a:
            self.lora_A[NAME], self.lora_B[NAME] = (nn.Parameter(x.new_empty(0), requires_grad=False) for x in (a, b))

    @property
    def dropout_now(self) -> float:
        """The share of inputs that this pass drops."""
        return self.dropout if self.training else 0.0


class LoraExpertLinear(_Lora):
    """An ExpertLinear with factors A (E, r, in), B (E, out, r)."""

    base_layer: ExpertLinear
    # Blocks (or words of tiles) of base and factors, while training sees them as they will be exported.
    rounded: Tensor | None = None

    def projection(self) -> Projection:
        """As ExpertLinear.projection, with the factors."""
        base = self.base_layer.projection()
        if not self.enabled:
            return base
        if self.rounded is not None:
            tiles = base.tiles and base.tiles._replace(words=self.rounded)
            base = base._replace(weight=self.rounded, merged=True, tiles=tiles)
        return base._replace(a=self.factors.a, b=self.factors.b, scaling=self.scaling[NAME], dropout=self.dropout_now)

    @torch.no_grad()
    def round(self, rule: Rounding, seed: int, name: str) -> None:
        """Merge the factors of now into `rounded`, as an export by this rule and seed would."""
        base, (a, b), scaling = self.base_layer, self.factors, self.scaling[NAME]
        if self.rounded is None:
            self.rounded = torch.empty_like(base.blocks)
        for expert in range(base.num_experts):
            pair = base.pair(expert)
            delta = scaling * (b[expert].float() @ a[expert].float())  # as Adapter.delta
            blocks = rounding.merge(pair, delta, rule, seed=seed, name=f"{name}.{expert}")
            self.rounded[expert] = base.as_stored(blocks, expert)


class LoraLinear(_Lora):
    """A linear layer with factors A (r, in), B (out, r)."""

    base_layer: nn.Linear
    _joined: tuple[list[object], Tensor] | None = None  # see `_frozen`

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        base = self.base_layer
        if not self.enabled:
            return base(x)
        dropout = self.dropout_now
        mask = F.dropout(torch.ones_like(x), dropout) if dropout else None
        a, b = self.factors
        if b.requires_grad:
            return _LoraLinear.apply(x, base.weight, base.bias, a, b * self.scaling[NAME], mask)
        return F.linear(torch.cat([x, x @ a.to(x.dtype).T], -1), self._frozen(), base.bias)

    @torch.no_grad()
    def _frozen(self) -> Tensor:
        """Return [W, scaling B] (out, in + r): made again when either is another one, or was written to.

        For inference, where a step reads weights and does little else.
        """
        weight, b = self.base_layer.weight, self.factors.b
        # By identity: an address may be another tensor's by now.
        of = [id(weight), weight.data_ptr(), weight._version, b, b.data_ptr(), b._version, self.scaling[NAME]]
        if self._joined is None or not _are_same(self._joined[0], of):
            self._joined = of, _join(weight, b * self.scaling[NAME])
        return self._joined[1]

    def let_go(self, a: nn.Parameter, b: nn.Parameter) -> None:
        """As the base class does."""
        super().let_go(a, b)
        self._joined = None


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + (x A^T) B^T with W and bias frozen; keeps x and the r-dimensional product.

    One product over both, and so one rounding: see `gptoss_infer.experts`.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, mask: Tensor | None
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        low = _dropped(rows, mask) @ a.to(x.dtype).T  # (N, r)
        y = torch.addmm(bias, torch.cat([rows, low], 1), _join(weight, b).T)  # (N, out)
        ctx.save_for_backward(x, weight, a, b, low, mask)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, weight, a, b, low, mask = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        back = grad @ b.to(x.dtype)  # (N, r)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            if mask is None:
                grad_x.addmm_(back, a.to(x.dtype))
            else:
                grad_x.add_((back @ a.to(x.dtype)).mul_(mask.view_as(rows)))
            grad_x = grad_x.view_as(x)
        grad_a = (back.T @ _dropped(rows, mask)).to(a.dtype)
        grad_b = (grad.T @ low).to(b.dtype)
        return grad_x, None, None, grad_a, grad_b, None


def _join(weight: Tensor, b: Tensor) -> Tensor:
    return torch.cat([weight, b.to(weight.dtype)], 1)  # (out, in + r)


def _are_same(before: Sequence[object], now: Sequence[object]) -> bool:
    return all(x is y or (not isinstance(x, Tensor) and x == y) for x, y in zip(before, now, strict=True))


def _dropped(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows * mask.view_as(rows)


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
        adaptable = sorted({name.rpartition(".")[2] for name in present if ".layers." in name})
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
    config._register_custom_module({ExpertLinear: LoraExpertLinear, nn.Linear: LoraLinear})
    inject_adapter_in_model(config, model, adapter_name=NAME)
    del model.peft_config  # PEFT's note that it was here, of which it warns when more weights get factors later
    factors = []
    for name, parameter in model.named_parameters():
        module, found, _ = name.partition(".lora_")
        parameter.requires_grad_(bool(found) and module in modules)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # PEFT casts to the base's dtype; bf16 factors lose small updates
            factors.append(parameter)
    attached = {target for target in targets if isinstance(model.get_submodule(target.module), _Lora)}
    assert attached == set(targets), f"PEFT left out {set(targets) - attached}"
    assert len(factors) == 2 * len(targets), f"PEFT attached {len(factors)} factors to {len(targets)} targets"
    return factors


def factors_of(model: GptOss, targets: Iterable[Target]) -> dict[Target, Factors]:
    """Return the (live) factors of attached targets."""
    found = {}
    for target in targets:
        layer = model.get_submodule(target.module)
        assert isinstance(layer, _Lora), f"{target.module} has no factors: attach them first"
        found[target] = layer.factors
    return found


@contextmanager
def disabled(model: GptOss) -> Iterator[None]:
    """Run the model as it is without its adapter."""
    layers = _layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def round_experts(model: GptOss, rule: Rounding, seed: int) -> None:
    """Let the experts compute with base and factors rounded to MXFP4, exactly as an export writes them.

    Call it again whenever the factors changed. Costs a second copy of the experts' MXFP4 blocks.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraExpertLinear):
            module.round(rule, seed, name)


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


class Adapters:
    """Several adapters over one model, for inference: by name, and one at a time, or none, in the layers."""

    def __init__(self, model: GptOss) -> None:
        """Take over a model without factors; those that come with `load_adapter` are there to stay."""
        assert not _layers(model), "the model holds the factors of `load_adapter`; load it without an adapter"
        self.model = model
        self.active: str | None = None
        self._held: dict[
            str, dict[str, tuple[nn.Parameter, nn.Parameter, float]]
        ] = {}  # name -> module -> A, B, scaling

    def __contains__(self, name: object) -> bool:
        """Whether an adapter has this name."""
        return name in self._held

    def __iter__(self) -> Iterator[str]:
        """Yield the names, the oldest first."""
        return iter(self._held)

    def add(self, name: str, adapter: str | Path | Adapter) -> None:
        """Read an adapter and hold its factors, fp32, where the model is.

        Raises: DataError if any part of it does not fit the model.
        """
        assert name not in self._held, f"there is an adapter {name!r} already"
        if not isinstance(adapter, Adapter):
            adapter = read_adapter(adapter, self.model.config)
        new = [target for target in adapter.factors if target.module not in _layers(self.model)]
        if new:  # with a rank of 1, as what is attached there only holds the place
            attach(self.model, new, rank=1, alpha=1, dropout=0.0, rslora=False)
            self.model.eval().requires_grad_(False)
        scaling = adapter.alpha / (math.sqrt(adapter.rank) if adapter.rslora else adapter.rank)
        held, device = {}, self.model.device
        for target, factors in adapter.factors.items():
            a, b = (nn.Parameter(part.to(device, torch.float32), requires_grad=False) for part in factors)
            held[target.module] = a, b, scaling
        self._held[name] = held
        self._put(self.active)

    def remove(self, name: str) -> None:
        """Let go of an adapter."""
        if self.active == name:
            self.use(None)
        layers = _layers(self.model)
        for module, (a, b, _) in self._held.pop(name).items():
            layers[module].let_go(a, b)

    def use(self, name: str | None) -> None:
        """Put the factors of an adapter into the layers, or of none."""
        if name != self.active:
            self._put(name)

    def _put(self, name: str | None) -> None:
        held = {} if name is None else self._held[name]
        for module, layer in _layers(self.model).items():
            layer.enabled = module in held
            if layer.enabled:
                layer.lora_A[NAME], layer.lora_B[NAME], layer.scaling[NAME] = held[module]
        self.active = name


def _layers(model: GptOss) -> dict[str, _Lora]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _Lora)}


def all_targets(num_layers: int, weights: Iterable[str], layers: Iterable[int] | None = None) -> list[Target]:
    """Return the targets for the given weights of the given layers (all if None)."""
    chosen = range(num_layers) if layers is None else layers
    return [Target(layer, weight) for layer in chosen for weight in weights]
