"""In which forms the experts' kernels are launched in training, and how they are checked on a GPU; see `cases`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.config import ModelConfig
from gptoss_infer.kernels import Adapted, low_rank, moe, moe_backward, moe_training, tuning
from gptoss_infer.kernels.cases import Case, Check
from gptoss_infer.kernels.moe_cases import ROUNDED, random_linear
from gptoss_infer.kernels.routing import Routed
from gptoss_infer.kernels.tiles import empty, unpack

RANK = 8


def cases(target: str) -> list[Case]:
    """Return the forms that are launched for 20b and 120b, whose experts have the same size."""
    heights = list(tuning.TABLES[target])
    products = [_input_case(target, block_m, 0) for block_m in heights]
    products += [_input_case(target, block_m, rank) for block_m, rank in ((16, 16), (heights[-1], 16), (64, 128))]
    factors = [_factor_case(target, rank) for rank in (16, 128)]
    return [*products, _kept_case(target, heights[-1]), _swiglu_case(), *factors]


def _input_case(target: str, block_m: int, rank: int) -> Case:
    """Of gate_up_proj, whose rows are 5,760; down_proj's are as many as its columns."""
    launch = tuning.BACKWARD[target][block_m]
    tiles = empty(1, 5760, 2880, tuning.ORDERS[target], device="meta")
    pointers = {"y": "*bf16", "words": "*i32", "scales": "*i32", "low": "*bf16", "a": "*bf16"}
    pointers |= {"slots": "*i32", "tiles": "*i32", "out": "*bf16"}
    constants = moe_backward.input_constants(tiles, launch, block_m, packed=target.startswith("sm"))
    return Case(
        f"moe input gradient {block_m}" + (f", rank {rank}" if rank else ""),
        moe_backward.input_gradient_kernel,
        pointers | {"num_tiles": "i32", "num_rows": "i32"},
        constants
        | {"K": 4, "OF_TOKENS": False, "TO_SLOTS": True, "DENSE": True, "RANK": rank, "PARTS": 1 if rank else 0},
        aligned=tuple(pointers),
        options=tuning.options(target, launch.num_warps, launch.num_stages),
        tensor_cores="wide",
        blocks=1 if rank else launch.blocks,
    )


def _kept_case(target: str, block_m: int) -> Case:
    """Of `moe.up`, which training lets write its pre-activations."""
    launch = tuning.TABLES[target][block_m]
    tiles = empty(1, 5760, 2880, tuning.ORDERS[target], device="meta")
    pointers = {"x": "*bf16", "words": "*i32", "scales": "*i32", "bias": "*bf16", "low": "*bf16", "b": "*bf16"}
    pointers |= {"slots": "*i32", "tiles": "*i32", "hidden": "*bf16", "pre": "*i32"}
    constants = moe.product_constants(tiles, launch, block_m, packed=target.startswith("sm"))
    return Case(
        f"moe up {block_m}, rank 16, kept",
        moe.up_kernel,
        pointers | {"num_tiles": "i32", "num_rows": "i32"},
        constants | {"K": 4, "ALPHA": 1.702, "LIMIT": 7.0, "KEEP": True, "RANK": 16, "PARTS": 1},
        aligned=tuple(pointers),
        options=tuning.options(target, launch.num_warps, launch.num_stages),
        tensor_cores="wide",
    )


def _swiglu_case() -> Case:
    pointers = dict.fromkeys(("grad_hidden", "pre", "grad", "bias", "weights", "grad_pre"), "*bf16")
    pointers |= {"slots": "*i32", "chosen": "*i32", "slopes": "*fp32"}
    return Case(
        "moe swiglu backward",
        moe_backward.swiglu_backward_kernel,
        pointers,
        {"K": 4, "ALPHA": 1.702, "LIMIT": 7.0, "UNITS": 2880, "WIDTH": 2880, "BLOCK": moe_backward.SWIGLU_BLOCK},
        aligned=tuple(pointers),
        options=moe_backward.SWIGLU_OPTIONS,
        blocks=4,
    )


def _factor_case(target: str, rank: int) -> Case:
    pointers = {"low": "*bf16", "x": "*bf16", "slots": "*i32", "starts": "*i32", "out": "*fp32"}
    sizes = {"STEP": moe_backward.FACTOR_ROWS, "BLOCK": moe_backward.FACTOR_COLUMNS}
    return Case(
        f"moe factor gradient, rank {rank}",
        moe_backward.factor_gradient_kernel,
        pointers,
        {"K": 4, "WIDTH": 2880, "RANK": rank, "OF_TOKENS": True} | sizes,
        aligned=tuple(pointers),
        options=moe_backward.factor_options(target),
        tensor_cores="any",
        blocks=2 if rank == 16 else 1,
    )


def checks(config: ModelConfig, device: torch.device, tokens: Sequence[int]) -> Iterator[Check]:
    """Yield what is compared and timed at each number of tokens: every kernel, and a layer forward and backward."""
    generator = torch.Generator(device).manual_seed(0)
    c, i = config.hidden_size, config.intermediate_size
    layer = random_linear(config, 2 * i, c, device, generator), random_linear(config, c, i, device, generator)
    for count in tokens:
        logits = torch.randn(count, config.num_local_experts, device=device, generator=generator)
        values, chosen = logits.topk(config.num_experts_per_tok)
        rows = _rows(chosen, config.num_local_experts)
        weights = values.softmax(-1).bfloat16()
        yield from _input_checks(layer, rows.routed(weights), generator)
        yield from _other_checks(config, layer[1].bias, rows, weights, generator)
        yield _layer_check(config, layer, rows, weights, generator)


def _rows(chosen: Tensor, num_experts: int) -> moe_training.Rows:
    """Sort the choices int64 (N, k) by expert."""
    flat, top_k = chosen.flatten(), chosen.shape[1]
    slots = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    return moe_training.rows_of((slots, slots // top_k, slots.argsort().view_as(chosen), counts, chosen))


def _random(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, device=generator.device, generator=generator).bfloat16()


def _input_checks(layer: tuple[moe.Linear, moe.Linear], routed: Routed, generator: torch.Generator) -> Iterator[Check]:
    """Yield the gradients to both projections' inputs, the first with an adapter."""
    gate_up, down = layer
    count, (experts, rows) = len(routed.chosen), (len(gate_up.bias), len(routed.slots))
    a = _random(experts, 2 * RANK, gate_up.tiles.in_features, generator=generator) / 4
    gate_up = gate_up._replace(low_rank=low_rank.LowRank(a, a, routed.slots[:0]))
    low = _random(1, rows, 2 * RANK, generator=generator)
    for name, linear, of_tokens, added in (("gate_up", gate_up, False, low), ("down", down, True, None)):
        out_features, in_features = linear.tiles.out_features, linear.tiles.in_features
        y = _random(count if of_tokens else rows, out_features, generator=generator)
        call: dict[str, Any] = {"low": added, "of_tokens": of_tokens, "to_slots": not of_tokens}
        yield Check(
            f"moe input gradient of {name}, {count} tokens",
            [partial(moe_backward.input_gradient, y, linear, routed, **call)],
            partial(moe_backward.input_gradient_ref, y, linear, routed, **call),
            ROUNDED,
            flops=2.0 * rows * in_features * out_features,
        )


def _other_checks(
    config: ModelConfig, bias: Tensor, rows: moe_training.Rows, weights: Tensor, generator: torch.Generator
) -> Iterator[Check]:
    """Yield the SwiGLU's backward pass and the gradient to factors."""
    routed, count, num_rows = rows.routed(weights), len(weights), weights.numel()
    units = config.intermediate_size
    grad = _random(count, config.hidden_size, generator=generator)
    grad_hidden = _random(num_rows, units, generator=generator)
    pre = _random(num_rows, 2 * units, generator=generator)
    low = _random(num_rows, 2 * RANK, generator=generator)
    given = pre, grad, bias, routed, moe.Swiglu(config.swiglu_alpha, config.swiglu_limit)
    yield Check(
        f"moe swiglu backward, {count} tokens",
        [lambda: moe_backward.swiglu_backward(grad_hidden.clone(), *given)],
        lambda: moe_backward.swiglu_backward_ref(grad_hidden, *given),
        ROUNDED,
        moved_bytes=grad_hidden.nbytes * 4.0 + pre.nbytes * 2 + grad.nbytes,  # the copy's too
        compared=_each_of_unit_norm,
    )
    yield Check(
        f"moe factor gradient, {count} tokens",
        [partial(moe_backward.factor_gradient, low, pre, routed, rows.starts, of_tokens=False)],
        partial(moe_backward.factor_gradient_ref, low, pre, routed, rows.starts, of_tokens=False),
        2**-16,  # fp32 sums in another order
        moved_bytes=float(pre.nbytes + low.nbytes),
    )


def _layer_check(
    config: ModelConfig,
    layer: tuple[moe.Linear, moe.Linear],
    rows: moe_training.Rows,
    weights: Tensor,
    generator: torch.Generator,
) -> Check:
    """Return a layer's results and gradients, factors in both projections, against plain PyTorch in fp32."""
    sides = _adapted(layer[0], generator), _adapted(layer[1], generator)
    work = moe_training.Work(*sides, moe.Swiglu(config.swiglu_alpha, config.swiglu_limit), rows)
    x, upstream = (_random(len(weights), config.hidden_size, generator=generator) for _ in range(2))

    def step(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [leaf.to(dtype).detach().requires_grad_(True) for leaf in (x, weights)]
        leaves += [factor for side in sides for factor in (side.a, side.b) if factor is not None]
        out = function(*leaves[:2], work)
        return [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    return Check(
        f"moe layer trained, {len(weights)} tokens",
        [partial(step, moe_training.run, torch.bfloat16)],
        partial(step, _layer_ref, torch.float32),
        2**-6,  # a dozen roundings to bf16, one after the other
        flops=2 * 6.0 * weights.numel() * config.hidden_size * config.intermediate_size,
        compared=_each_of_unit_norm,
    )


def _layer_ref(x: Tensor, weights: Tensor, work: moe_training.Work) -> Tensor:
    """A layer in fp32, one expert with W + scaling B A after the other, for autograd."""
    up, down = (mxfp4.decode(*unpack(side.tiles), torch.float32) for side in (work.gate_up, work.down))
    out, (alpha, limit) = torch.zeros_like(x), work.activation
    for expert in work.rows.chosen.unique().tolist():
        tokens, place = (work.rows.chosen == expert).nonzero(as_tuple=True)
        y = x[tokens]
        for side, decoded in ((work.gate_up, up), (work.down, down)):
            assert side.a is not None, "both projections have factors"
            assert side.b is not None, "both projections have factors"
            y = y @ (decoded[expert] + side.scaling * side.b[expert] @ side.a[expert]).T + side.bias[expert].float()
            if side is work.gate_up:
                gate, value = y[:, 0::2].clamp(max=limit), y[:, 1::2].clamp(-limit, limit)
                y = gate * torch.sigmoid(alpha * gate) * (value + 1)
        out = out.index_add(0, tokens, y * weights[tokens, place].unsqueeze(1))
    return out


def _adapted(linear: moe.Linear, generator: torch.Generator) -> Adapted:
    tiles, experts = linear.tiles, len(linear.bias)
    a = torch.randn(experts, RANK, tiles.in_features, device=generator.device, generator=generator)
    b = torch.randn(experts, tiles.out_features, RANK, device=generator.device, generator=generator)
    a, b = (a * tiles.in_features**-0.5).requires_grad_(True), (b * RANK**-0.5).requires_grad_(True)
    return Adapted(tiles, linear.bias, a, b)


def _each_of_unit_norm(results: Sequence[Tensor]) -> Tensor:
    """Join tensors of different sizes, none of which is to hide behind another."""
    return torch.cat([part.detach().float().flatten() / part.detach().float().norm() for part in results])
