"""The experts of a layer in Triton: weights stay MXFP4 and are decoded in registers.

    up:       gather rows, multiply, add bias, clamped SwiGLU    (N, C) -> (M, I)
    down:     multiply, add bias                                 (M, I) -> (N, k, C)
    combine:  weighted sum over a token's choices, in order      (N, k, C) -> (N, C)

A program makes one tile of rows (see `routing`) by `block_n` weights, and reads every weight once. Activations are
bf16, sums fp32, rounded once per kernel. A row is bit for bit the same in any batch. Not differentiable here: training
runs these kernels too, and those of `moe_backward`; see `moe_training`.

An adapter that is not merged (`low_rank`) adds its product to the same sums, before anything is rounded.

Legend: N tokens, k chosen per token, M = N k rows, E experts, C hidden size, I intermediate size, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.kernels import tuning
from gptoss_infer.kernels.low_rank import LowRank, low_products, low_products_ref
from gptoss_infer.kernels.products import add_low_rank, checkpoint_rows, product, tile_rows
from gptoss_infer.kernels.routing import Routed, route, route_ref
from gptoss_infer.kernels.tiles import Tiles, unpack


class Linear(NamedTuple):
    """One projection of all experts: y = x W^T + bias."""

    tiles: Tiles  # W (E, out, in)
    bias: Tensor  # (E, out), bf16 or fp32
    low_rank: LowRank | None = None  # of adapters, if any; then each token has to say which is its own


class Swiglu(NamedTuple):
    """The constants of gpt-oss' clamped SwiGLU."""

    alpha: float
    limit: float


class Layer(NamedTuple):
    """The experts of a layer."""

    gate_up: Linear  # W (E, 2 I, C), gate and up of a unit in neighbouring rows, as in the checkpoint
    down: Linear  # W (E, C, I)
    activation: Swiglu
    top_k: int


def moe_ref(
    x: Tensor, logits: Tensor, layer: Layer, *, real: Tensor | None = None, adapters: Tensor | None = None
) -> Tensor:
    """Plain PyTorch; see `moe`."""
    routed = route_ref(logits, layer.top_k, 64, real)
    hidden = up_ref(x, layer.gate_up, routed, layer.activation, adapters)
    return combine_ref(down_ref(hidden, layer.down, routed, adapters), routed)


def moe(
    x: Tensor, logits: Tensor, layer: Layer, *, real: Tensor | None = None, adapters: Tensor | None = None
) -> Tensor:
    """Return the weighted sum of each token's experts, bf16 (N, C): routing and all. The host waits for nothing.

    Args:
        x: bf16 (N, C). logits: (N, E), the router's.
        real: bool (N,), False for slots of a batch that hold no token; their result is 0.
        adapters: int32 (N,), each token's adapter, -1 for none; needed where there is `low_rank`.
    Raises: ValueError if `x` is not bf16 or shapes disagree.
    """
    num_tokens, num_experts = logits.shape
    block_m = tuning.block_m(tuning.target_of(x.device), num_tokens, layer.top_k, num_experts)
    routed = route(logits, layer.top_k, block_m, real)
    hidden = up(x, layer.gate_up, routed, layer.activation, adapters)
    return combine(down(hidden, layer.down, routed, adapters), routed)


def up_ref(
    x: Tensor,
    gate_up: Linear,
    routed: Routed,
    activation: Swiglu,
    adapters: Tensor | None = None,
    *,
    low: Tensor | None = None,
    pre: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch, in fp32 until the end; see `up`."""
    kept, pre = pre, _products_ref(x, gate_up, routed, adapters, low, of_tokens=True)
    if kept is not None:
        pre = kept.copy_(pre).float()
    gate, value = pre[:, 0::2].clamp(max=activation.limit), pre[:, 1::2].clamp(-activation.limit, activation.limit)
    return (gate * torch.sigmoid(activation.alpha * gate) * (value + 1)).to(x.dtype)


def down_ref(
    hidden: Tensor, linear: Linear, routed: Routed, adapters: Tensor | None = None, *, low: Tensor | None = None
) -> Tensor:
    """Plain PyTorch, in fp32 until the end; see `down`."""
    y = _products_ref(hidden, linear, routed, adapters, low, of_tokens=False)
    results = hidden.new_zeros(len(routed.slots), linear.tiles.out_features)
    real = routed.slots >= 0
    results[routed.slots[real].long()] = y[real].to(hidden.dtype)
    return results.view(*routed.chosen.shape, -1)


def _products_ref(
    x: Tensor, linear: Linear, routed: Routed, adapters: Tensor | None, low: Tensor | None, *, of_tokens: bool
) -> Tensor:
    """Return x W^T + bias + B (A x) of every row, fp32 (M, out); zero behind the last."""
    weights = mxfp4.decode(*unpack(linear.tiles), torch.float32)  # (E, out, in)
    low = _low(low_products_ref, x, linear, routed, adapters, low, of_tokens=of_tokens)
    products = x.new_zeros(len(routed.slots), linear.tiles.out_features, dtype=torch.float32)
    for expert, first, count in routed.tiles.T.tolist():
        if expert >= 0:
            rows = slice(first, first + count)
            tokens = routed.slots[rows].long() // routed.chosen.shape[1]
            products[rows] = (x[tokens] if of_tokens else x[rows]).float() @ weights[expert].T + linear.bias[expert]
            if low is not None and linear.low_rank is not None:
                products[rows] += low[:, rows].sum(0).bfloat16().float() @ linear.low_rank.b[expert].float().T
    return products


def combine_ref(results: Tensor, routed: Routed) -> Tensor:
    """Plain PyTorch; see `combine`."""
    total = torch.zeros_like(results[:, 0], dtype=torch.float32)
    for j in range(results.shape[1]):
        total += results[:, j].float() * routed.weights[:, j : j + 1]
    return total.where((routed.chosen[:, :1] >= 0), 0.0).to(results.dtype)


def up(
    x: Tensor,
    gate_up: Linear,
    routed: Routed,
    activation: Swiglu,
    adapters: Tensor | None = None,
    *,
    low: Tensor | None = None,
    pre: Tensor | None = None,
) -> Tensor:
    """Return what the experts' units hold, bf16 (M, I), in the order of the routed rows.

    Args:
        x: bf16 (N, C).
        gate_up: W (E, 2 I, C), gate and up of a unit in neighbouring rows, as in the checkpoint.
        adapters: int32 (N,), each token's adapter, if there are any.
        low: fp32 or bf16 (parts, M, R): what `low_products` makes of the adapters' A, if that is known already.
        pre: bf16 (M, 2 I), where what the SwiGLU reads is to be kept; it is rounded before the SwiGLU then.
    Rows behind the last routed one are not written.
    Raises: ValueError if `x` is not bf16 or shapes disagree.
    """
    check_activations(x, gate_up.tiles.in_features)
    hidden = x.new_empty(len(routed.slots), gate_up.tiles.out_features // 2)
    low = _low(low_products, x, gate_up, routed, adapters, low, of_tokens=True)
    constants = {"K": routed.chosen.shape[1], "ALPHA": activation.alpha, "LIMIT": activation.limit}
    constants |= {"KEEP": pre is not None}
    _launch(
        up_kernel,
        x,
        gate_up,
        routed,
        (hidden, hidden if pre is None else pre.view(torch.int32)),
        low=low,
        constants=constants,
    )
    return hidden


def down(
    hidden: Tensor, linear: Linear, routed: Routed, adapters: Tensor | None = None, *, low: Tensor | None = None
) -> Tensor:
    """Return what each choice's expert makes of its token, bf16 (N, k, C).

    Args:
        hidden: bf16 (M, I), as `up` returns it.
        adapters, low: as for `up`.
    What belongs to slots that are not real is not written.
    Raises: ValueError if `hidden` is not bf16 or shapes disagree.
    """
    check_activations(hidden, linear.tiles.in_features)
    results = hidden.new_empty(*routed.chosen.shape, linear.tiles.out_features)
    low = _low(low_products, hidden, linear, routed, adapters, low, of_tokens=False)
    _launch(down_kernel, hidden, linear, routed, (results,), low=low, constants={})
    return results


def combine(results: Tensor, routed: Routed) -> Tensor:
    """Weigh and sum bf16 (N, k, C) over the choices, first to last in fp32: bf16 (N, C), zero where not real."""
    num_tokens, top_k, width = results.shape
    out = results.new_empty(num_tokens, width)
    if num_tokens and not results.is_meta:
        with torch.cuda.device_of(results):
            combine_kernel[(num_tokens, triton.cdiv(width, COMBINE_BLOCK))](
                results, routed.chosen, routed.weights, out, WIDTH=width, K=top_k, BLOCK=COMBINE_BLOCK,
                **COMBINE_OPTIONS,
            )  # fmt: skip
    return out


COMBINE_BLOCK = 1024
COMBINE_OPTIONS: dict[str, object] = {"num_warps": 4, "enable_fp_fusion": False}


def check_activations(x: Tensor, width: int) -> None:
    """Raise ValueError unless this is what a product reads: bf16 (rows, width)."""
    if x.dtype != torch.bfloat16:
        raise ValueError(f"activations are {x.dtype}; the expert kernels take bfloat16, other dtypes the plain path")
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"activations have shape {tuple(x.shape)}, expected (rows, {width})")


def _low(
    function: Callable[..., Tensor],
    x: Tensor,
    linear: Linear,
    routed: Routed,
    adapters: Tensor | None,
    low: Tensor | None,
    *,
    of_tokens: bool,
) -> Tensor | None:
    """Return what `function` makes of the adapters' A, if there are any and it is not known already."""
    if linear.low_rank is None or low is not None:
        return low
    if adapters is None:
        raise ValueError("a projection with adapters needs to know which one each token has: pass `adapters`")
    return function(x, linear.low_rank, routed, adapters, of_tokens=of_tokens)


def _launch(
    kernel: triton.JITFunction,
    x: Tensor,
    linear: Linear,
    routed: Routed,
    outputs: tuple[Tensor, ...],
    *,
    low: Tensor | None,
    constants: Mapping[str, object],
) -> None:
    """Run a product, with its adapters' if there is `low`, in the form that its GPU's table has for these tiles."""
    target = tuning.target_of(x.device)
    table = tuning.TABLES[target]
    if routed.block_m not in table:
        raise ValueError(f"tiles have up to {routed.block_m} rows, expected one of {tuple(table)}")
    launch, num_tiles = table[routed.block_m], routed.tiles.shape[1]
    if num_tiles == 0 or x.is_meta:
        return
    factors = (linear.bias, linear.bias) if low is None or linear.low_rank is None else (low, linear.low_rank.b)
    with torch.cuda.device_of(x):
        kernel[(num_tiles * triton.cdiv(linear.tiles.out_features, launch.block_n),)](
            x.contiguous(), *linear.tiles[:2], linear.bias, *factors, routed.slots, routed.tiles, *outputs,
            num_tiles, len(routed.slots),
            **product_constants(linear.tiles, launch, routed.block_m, packed=x.is_cuda and torch.version.hip is None),
            RANK=0 if low is None else low.shape[2], PARTS=0 if low is None else len(low),
            **constants, **tuning.options(target, launch.num_warps, launch.num_stages),
        )  # fmt: skip


def product_constants(tiles: Tiles, launch: tuning.Launch, block_m: int, *, packed: bool) -> dict[str, object]:
    """Return what `products.product` is specialised for; `packed` if two bf16 are multiplied by one instruction."""
    return {
        "OUT": tiles.out_features,
        "IN": tiles.in_features,
        "BLOCK_M": block_m,
        "BLOCK_N": launch.block_n,
        "STEP": launch.step,
        "ORDER": tiles.order,
        "PACKED": packed,
    }


@triton.jit(do_not_specialize=["num_tiles", "num_rows"])
def up_kernel(  # type: ignore[no-untyped-def]
    x, words, scales, bias, low, b, slots, tiles, hidden, pre, num_tiles, num_rows,
    K: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, KEEP: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, ORDER: tl.constexpr, PACKED: tl.constexpr,
    RANK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One tile of rows by BLOCK_N / 2 units; `pre`, words of a gate and an up, is written if KEEP."""
    BLOCKS: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    UNITS: tl.constexpr = OUT // 2
    tile, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    row, inside = tile_rows(tiles, num_tiles, tile, BLOCK_M)
    token = tl.load(slots + row, mask=inside, other=0) // K
    sums = product(
        x + token.to(tl.int64) * IN, inside, words, scales, expert, block,
        OUT, IN, BLOCK_M, BLOCK_N, STEP, ORDER, PACKED,
    )  # fmt: skip
    if RANK:
        n = checkpoint_rows(block, BLOCK_N)
        sums = add_low_rank(sums, low, b, row, inside, num_rows, expert, n, OUT, RANK, PARTS, BLOCK_M)
    sums = tl.permute(tl.reshape(sums, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1))
    gate, value = tl.split(sums)
    gate, value = tl.reshape(gate, (BLOCK_N // 2, BLOCK_M)), tl.reshape(value, (BLOCK_N // 2, BLOCK_M))
    unit = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    bias += expert.to(tl.int64) * OUT + unit * 2
    gate += tl.load(bias, mask=unit < UNITS, other=0.0).to(tl.float32)[:, None]
    value += tl.load(bias + 1, mask=unit < UNITS, other=0.0).to(tl.float32)[:, None]
    at = row.to(tl.int64)[None, :] * UNITS + unit[:, None]
    stored = inside[None, :] & (unit < UNITS)[:, None]
    if KEEP:
        low_half = gate.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
        high_half = value.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        tl.store(pre + at, (low_half | high_half).to(tl.int32, bitcast=True), mask=stored)
        gate, value = (low_half << 16).to(tl.float32, bitcast=True), high_half.to(tl.float32, bitcast=True)
    gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    value = tl.clamp(value, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    result = gate * tl.sigmoid(gate * ALPHA) * (value + 1)
    tl.store(hidden + at, result.to(tl.bfloat16), mask=stored)


@triton.jit(do_not_specialize=["num_tiles", "num_rows"])
def down_kernel(  # type: ignore[no-untyped-def]
    hidden, words, scales, bias, low, b, slots, tiles, results, num_tiles, num_rows,
    OUT: tl.constexpr, IN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, ORDER: tl.constexpr, PACKED: tl.constexpr,
    RANK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One tile of rows by BLOCK_N outputs, each row to its slot."""
    BLOCKS: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tile, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    row, inside = tile_rows(tiles, num_tiles, tile, BLOCK_M)
    sums = product(
        hidden + row.to(tl.int64) * IN, inside, words, scales, expert, block,
        OUT, IN, BLOCK_M, BLOCK_N, STEP, ORDER, PACKED,
    )  # fmt: skip
    if RANK:
        n = checkpoint_rows(block, BLOCK_N)
        sums = add_low_rank(sums, low, b, row, inside, num_rows, expert, n, OUT, RANK, PARTS, BLOCK_M)
    sums = tl.permute(tl.reshape(sums, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 1, 3))
    sums = tl.reshape(sums, (BLOCK_N, BLOCK_M))
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(slots + row, mask=inside, other=0)
    bias += expert.to(tl.int64) * OUT + column
    sums += tl.load(bias, mask=column < OUT, other=0.0).to(tl.float32)[:, None]
    at = slot.to(tl.int64)[None, :] * OUT + column[:, None]
    tl.store(results + at, sums.to(tl.bfloat16), mask=inside[None, :] & (column < OUT)[:, None])


@triton.jit
def combine_kernel(  # type: ignore[no-untyped-def]
    results, chosen, weights, out, WIDTH: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    """One token by BLOCK columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = tl.load(chosen + token * K) >= 0
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(K):
        at = results + (token * K + j) * WIDTH + column
        y = tl.load(at, mask=real & (column < WIDTH), other=0.0).to(tl.float32)
        total += y * tl.load(weights + token * K + j)
    tl.store(out + token * WIDTH + column, total.to(tl.bfloat16), mask=column < WIDTH)
