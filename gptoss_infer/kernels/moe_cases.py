"""In which forms the expert kernels are launched, and how they are checked on a GPU; see `cases`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.config import ModelConfig
from gptoss_infer.kernels import low_rank, moe, routing, tuning
from gptoss_infer.kernels.cases import Case, Check
from gptoss_infer.kernels.low_rank import num_parts
from gptoss_infer.kernels.tiles import ROWS, empty, pack

ROUNDED = 2**-9  # sums in another order, rounded to the other of two bf16 here and there: well below their 2**-8
SETS = 8  # of inputs that a timing goes through, at most


def cases(target: str) -> list[Case]:
    """Return the forms that are launched for 20b and 120b, whose experts have the same size."""
    found = []
    weights = {"words": "*i32", "scales": "*i32", "bias": "*bf16", "low": "*fp32", "b": "*bf16"}
    tables = {"slots": "*i32", "tiles": "*i32"}
    ups = {"x": "*bf16"} | weights | tables | {"hidden": "*bf16", "pre": "*bf16"}
    downs = {"hidden": "*bf16"} | weights | tables | {"results": "*bf16"}
    forms = [(block_m, 0) for block_m in tuning.TABLES[target]] + [(16, 16), (64, 64)]
    for block_m, rank in forms:
        launch = tuning.TABLES[target][block_m]
        for name, kernel, pointers, out_features, more in (
            ("up", moe.up_kernel, ups, 5760, {"K": 4, "ALPHA": 1.702, "LIMIT": 7.0, "KEEP": False}),
            ("down", moe.down_kernel, downs, 2880, {}),
        ):
            tiles = empty(1, out_features, 2880, tuning.ORDERS[target], device="meta")
            constants = moe.product_constants(tiles, launch, block_m, packed=target.startswith("sm"))
            low_rank = {"RANK": rank, "PARTS": num_parts(2880) if rank else 0}
            found.append(
                Case(
                    f"moe {name} {block_m}" + (f", rank {rank}" if rank else ""),
                    kernel,
                    pointers | {"num_tiles": "i32", "num_rows": "i32"},
                    constants | low_rank | more,
                    aligned=tuple(pointers),
                    options=tuning.options(target, launch.num_warps, launch.num_stages),
                    tensor_cores="wide",
                    blocks=1 if rank else launch.blocks,
                )
            )
    pointers = {"results": "*bf16", "chosen": "*i32", "weights": "*fp32", "out": "*bf16"}
    combining = {"WIDTH": 2880, "K": 4, "BLOCK": moe.COMBINE_BLOCK}
    return [*found, Case("moe combine", moe.combine_kernel, pointers, combining, tuple(pointers), moe.COMBINE_OPTIONS)]


def checks(config: ModelConfig, device: torch.device, tokens: Sequence[int]) -> Iterator[Check]:
    """Yield what is compared and timed: every step at each number of tokens, and what must be exact."""
    generator = torch.Generator(device).manual_seed(0)
    c, i = config.hidden_size, config.intermediate_size
    layer = moe.Layer(
        random_linear(config, 2 * i, c, device, generator),
        random_linear(config, c, i, device, generator),
        moe.Swiglu(config.swiglu_alpha, config.swiglu_limit),
        config.num_experts_per_tok,
    )
    for count in tokens:
        yield from _steps(config, layer, count, generator)
    yield _exact_codes(device)
    yield _alone_and_among_others(config, layer, max(tokens), generator)
    yield _with_adapters(config, layer, min(64, max(tokens)), generator)


def random_linear(
    config: ModelConfig, out_features: int, in_features: int, device: torch.device, generator: torch.Generator
) -> moe.Linear:
    """Return random weights of about unit effect, made in tiles."""
    order = tuning.ORDERS[tuning.target_of(device)]
    tiles = empty(config.num_local_experts, out_features, in_features, order, device)
    tiles.words.random_(-(2**31), 2**31 - 1, generator=generator)
    tiles.scales.view(torch.uint8).random_(126 + 119, 126 + 123, generator=generator)
    bias = torch.randn(config.num_local_experts, out_features, device=device, generator=generator)
    return moe.Linear(tiles, bias.bfloat16())


def _inputs(config: ModelConfig, count: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Return sets of x and router logits; one token after another takes experts that it did not have before."""
    device, experts, top_k = generator.device, config.num_local_experts, config.num_experts_per_tok
    order = torch.rand(count, experts, device=device, generator=generator).argsort(1)  # an order for each token
    found = []
    for i in range(min(SETS, experts // top_k)):
        x = torch.randn(count, config.hidden_size, device=device, generator=generator).bfloat16()
        place = (order - i * top_k) % experts  # the first k of them are chosen
        found.append((x, 5 - 0.5 * place.float() + torch.rand(count, experts, device=device, generator=generator) / 4))
    return found


def _steps(config: ModelConfig, layer: moe.Layer, count: int, generator: torch.Generator) -> Iterator[Check]:
    """Yield up, down, combine and all of it with routing."""
    inputs = _inputs(config, count, generator)
    target = tuning.target_of(generator.device)
    block_m = tuning.block_m(target, count, layer.top_k, config.num_local_experts)
    routed = [routing.route(logits, layer.top_k, block_m) for _, logits in inputs]
    touched = sum(len(r.chosen.unique()) for r in routed) / len(routed)
    rows = count * layer.top_k
    hidden = [moe.up(x, layer.gate_up, r, layer.activation) for (x, _), r in zip(inputs, routed, strict=True)]
    results = [moe.down(h, layer.down, r) for h, r in zip(hidden, routed, strict=True)]
    read_up, read_down = (touched / config.num_local_experts * _bytes(linear) for linear in (layer.gate_up, layer.down))
    name = f"{count} tokens"
    yield Check(
        f"moe up, {name}",
        [partial(moe.up, x, layer.gate_up, r, layer.activation) for (x, _), r in zip(inputs, routed, strict=True)],
        partial(moe.up_ref, inputs[0][0], layer.gate_up, routed[0], layer.activation),
        ROUNDED,
        moved_bytes=read_up + inputs[0][0].nbytes + hidden[0].nbytes,
        flops=2.0 * rows * config.hidden_size * 2 * config.intermediate_size,
    )
    yield Check(
        f"moe down, {name}",
        [partial(moe.down, h, layer.down, r) for h, r in zip(hidden, routed, strict=True)],
        partial(moe.down_ref, hidden[0], layer.down, routed[0]),
        ROUNDED,
        moved_bytes=read_down + hidden[0].nbytes + results[0].nbytes,
        flops=2.0 * rows * config.hidden_size * config.intermediate_size,
    )
    yield Check(
        f"moe combine, {name}",
        [partial(moe.combine, y, r) for y, r in zip(results, routed, strict=True)],
        partial(moe.combine_ref, results[0], routed[0]),
        ROUNDED,
        moved_bytes=results[0].nbytes + inputs[0][0].nbytes,
    )
    yield Check(
        f"moe with routing, {name}",
        [partial(moe.moe, x, logits, layer) for x, logits in inputs],
        partial(moe.moe_ref, *inputs[0], layer),
        2 * ROUNDED,
        moved_bytes=read_up + read_down + 2 * (inputs[0][0].nbytes + hidden[0].nbytes + results[0].nbytes),
        flops=6.0 * rows * config.hidden_size * config.intermediate_size,
    )


def _bytes(linear: moe.Linear) -> int:
    return linear.tiles.words.nbytes + linear.tiles.scales.nbytes + linear.bias.nbytes


def _exact_codes(device: torch.device) -> Check:
    """Unit vectors take every code at every scale out of the weights; many are subnormal, none may be flushed."""
    codes = (torch.arange(ROWS, device=device) % 16).to(torch.uint8).view(2, 32)
    blocks = mxfp4.pack(codes.expand(129, 2, 32).contiguous()).unsqueeze(0)
    scales = torch.arange(129, dtype=torch.uint8, device=device).view(1, 129, 1).repeat(1, 1, 2)
    order = tuning.ORDERS[tuning.target_of(device)]
    linear = moe.Linear(pack(blocks, scales, order), torch.zeros(1, 129, device=device, dtype=torch.bfloat16))
    unit = torch.eye(ROWS, device=device, dtype=torch.bfloat16)
    routed = routing.route_ref(torch.zeros(ROWS, 1, device=device), 1, 16)
    # Compared as what they are times 2**120 or 2**-60, or the large ones would hide the small ones.
    sizes = torch.where(torch.arange(129, device=device) < 64, 2.0**120, 2.0**-60)
    return Check(
        "moe down, every code and scale",
        [partial(moe.down, unit, linear, routed)],
        lambda: mxfp4.decode(blocks, scales, torch.float64)[0].T.unsqueeze(1),
        0,
        compared=lambda weights: weights.double() * sizes,
    )


def _alone_and_among_others(config: ModelConfig, layer: moe.Layer, count: int, generator: torch.Generator) -> Check:
    x, logits = _inputs(config, count, generator)[0]
    some = slice(count // 2, count // 2 + 10)
    return Check(
        f"moe, ten tokens as among {count}",
        [partial(moe.moe, x[some], logits[some], layer)],
        lambda: moe.moe(x, logits, layer)[some],
        0,
    )


def _with_adapters(config: ModelConfig, layer: moe.Layer, count: int, generator: torch.Generator) -> Check:
    device, experts = generator.device, config.num_local_experts

    def factors(linear: moe.Linear) -> low_rank.LowRank:
        sizes = linear.tiles.in_features, linear.tiles.out_features
        pairs = [
            (torch.randn(experts, rank, sizes[0], device=device, generator=generator) / sizes[0] ** 0.5,
             torch.randn(experts, sizes[1], rank, device=device, generator=generator) / rank**0.5, 0.5)
            for rank in (8, 16)
        ]  # fmt: skip
        return low_rank.join(pairs)

    layer = layer._replace(
        gate_up=layer.gate_up._replace(low_rank=factors(layer.gate_up)),
        down=layer.down._replace(low_rank=factors(layer.down)),
    )
    inputs = _inputs(config, count, generator)
    adapters = (torch.arange(count, device=device) % 3 - 1).int()
    return Check(
        f"moe with routing, {count} tokens of two adapters and none",
        [partial(moe.moe, x, logits, layer, adapters=adapters) for x, logits in inputs],
        partial(moe.moe_ref, *inputs[0], layer, adapters=adapters),
        2 * ROUNDED,
    )
