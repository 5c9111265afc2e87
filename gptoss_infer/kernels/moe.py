"""The experts of a layer in Triton, for inference: weights stay MXFP4 and are decoded in registers.

    up:       gather rows, multiply, add bias, clamped SwiGLU    (N, C) -> (M, I)
    down:     multiply, add bias                                 (M, I) -> (N, k, C)
    combine:  weighted sum over a token's choices, in order      (N, k, C) -> (N, C)

Weights are the left operand, tokens the right one: 64 rows of weights fill a matrix instruction however few the tokens.
A program makes one tile of rows (see `routing`) by `block_n` weights, and reads every weight once. Activations are
bf16, sums fp32, rounded once per kernel. Sums over columns go from the first to the last in an order that only the
layer determines: a row is bit for bit the same in any batch. Not differentiable.

Adapters that are not merged (`LowRank`): their product with B is added to the same sums before anything is rounded.

Legend: N tokens, k chosen per token, M = N k rows, E experts, C hidden size, I intermediate size, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.kernels import tuning
from gptoss_infer.kernels.cases import Case
from gptoss_infer.kernels.routing import Routed, route, route_ref
from gptoss_infer.kernels.tiles import Tiles, empty, unpack


class Linear(NamedTuple):
    """One projection of all experts: y = x W^T + bias."""

    tiles: Tiles  # W (E, out, in)
    bias: Tensor  # (E, out), bf16 or fp32


class Swiglu(NamedTuple):
    """The constants of gpt-oss' clamped SwiGLU."""

    alpha: float
    limit: float


def moe_ref(
    x: Tensor,
    logits: Tensor,
    top_k: int,
    gate_up: Linear,
    down_proj: Linear,
    activation: Swiglu,
    real: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch; see `moe`."""
    routed = route_ref(logits, top_k, 64, real)
    return combine_ref(down_ref(up_ref(x, gate_up, routed, activation), down_proj, routed), routed)


def moe(
    x: Tensor,
    logits: Tensor,
    top_k: int,
    gate_up: Linear,
    down_proj: Linear,
    activation: Swiglu,
    real: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of each token's experts, bf16 (N, C): routing and all. The host waits for nothing.

    Args:
        x: bf16 (N, C). logits: (N, E), the router's.
        real: bool (N,), False for slots of a batch that hold no token; their result is 0.
    Raises: ValueError if `x` is not bf16 or shapes disagree.
    """
    num_tokens, num_experts = logits.shape
    routed = route(logits, top_k, tuning.block_m(tuning.target_of(x.device), num_tokens, top_k, num_experts), real)
    return combine(down(up(x, gate_up, routed, activation), down_proj, routed), routed)


def up_ref(x: Tensor, gate_up: Linear, routed: Routed, activation: Swiglu) -> Tensor:
    """Plain PyTorch, in fp32 until the end; see `up`."""
    weights = mxfp4.decode(*unpack(gate_up.tiles), torch.float32)  # (E, 2 I, C)
    top_k = routed.chosen.shape[1]
    hidden = x.new_zeros(len(routed.slots), gate_up.tiles.out_features // 2)
    for expert, first, count in _existing(routed):
        rows = slice(first, first + count)
        pre = x[routed.slots[rows].long() // top_k].float() @ weights[expert].T + gate_up.bias[expert].float()
        gate, value = pre[:, 0::2].clamp(max=activation.limit), pre[:, 1::2].clamp(-activation.limit, activation.limit)
        hidden[rows] = (gate * torch.sigmoid(activation.alpha * gate) * (value + 1)).to(x.dtype)
    return hidden


def down_ref(hidden: Tensor, linear: Linear, routed: Routed) -> Tensor:
    """Plain PyTorch, in fp32 until the end; see `down`."""
    weights = mxfp4.decode(*unpack(linear.tiles), torch.float32)  # (E, C, I)
    results = hidden.new_zeros(len(routed.slots), linear.tiles.out_features)
    for expert, first, count in _existing(routed):
        slots = routed.slots[first : first + count].long()
        y = hidden[first : first + count].float() @ weights[expert].T + linear.bias[expert].float()
        results[slots] = y.to(hidden.dtype)
    return results.view(*routed.chosen.shape, -1)


def combine_ref(results: Tensor, routed: Routed) -> Tensor:
    """Plain PyTorch; see `combine`."""
    total = torch.zeros_like(results[:, 0], dtype=torch.float32)
    for j in range(results.shape[1]):
        total += results[:, j].float() * routed.weights[:, j : j + 1]
    return total.where((routed.chosen[:, :1] >= 0), 0.0).to(results.dtype)


def _existing(routed: Routed) -> list[list[int]]:
    """Return [expert, first row, rows] of every tile that exists."""
    return [tile for tile in routed.tiles.T.tolist() if tile[0] >= 0]


def up(x: Tensor, gate_up: Linear, routed: Routed, activation: Swiglu) -> Tensor:
    """Return what the experts' units hold, bf16 (M, I), in the order of the routed rows.

    Args:
        x: bf16 (N, C).
        gate_up: W (E, 2 I, C), gate and up of a unit in neighbouring rows, as in the checkpoint.
    Rows behind the last routed one are not written.
    Raises: ValueError if `x` is not bf16 or shapes disagree.
    """
    units = gate_up.tiles.out_features // 2
    _check(x, gate_up)
    hidden = x.new_empty(len(routed.slots), units)
    constants = {"K": routed.chosen.shape[1], "ALPHA": activation.alpha, "LIMIT": activation.limit}
    _launch(up_kernel, x, gate_up, routed, hidden, constants)
    return hidden


def down(hidden: Tensor, linear: Linear, routed: Routed) -> Tensor:
    """Return what each choice's expert makes of its token, bf16 (N, k, C).

    Args:
        hidden: bf16 (M, I), as `up` returns it.
    What belongs to slots that are not real is not written.
    Raises: ValueError if `hidden` is not bf16 or shapes disagree.
    """
    _check(hidden, linear)
    results = hidden.new_empty(*routed.chosen.shape, linear.tiles.out_features)
    _launch(down_kernel, hidden, linear, routed, results, {})
    return results


def combine(results: Tensor, routed: Routed) -> Tensor:
    """Weigh and sum bf16 (N, k, C) over the choices, first to last in fp32: bf16 (N, C), zero where not real."""
    num_tokens, top_k, width = results.shape
    out = results.new_empty(num_tokens, width)
    if num_tokens:
        with torch.cuda.device_of(results):
            combine_kernel[(num_tokens, triton.cdiv(width, COMBINE_BLOCK))](
                results, routed.chosen, routed.weights, out, WIDTH=width, K=top_k, BLOCK=COMBINE_BLOCK,
                **COMBINE_OPTIONS,
            )  # fmt: skip
    return out


COMBINE_BLOCK = 1024
COMBINE_OPTIONS: dict[str, object] = {"num_warps": 4, "enable_fp_fusion": False}


def _check(x: Tensor, linear: Linear) -> None:
    if x.dtype != torch.bfloat16:
        raise ValueError(f"activations are {x.dtype}; the expert kernels take bfloat16, other dtypes the plain path")
    if x.dim() != 2 or x.shape[1] != linear.tiles.in_features:
        raise ValueError(f"activations have shape {tuple(x.shape)}, expected (rows, {linear.tiles.in_features})")


def _launch(
    kernel: triton.JITFunction, x: Tensor, linear: Linear, routed: Routed, out: Tensor, constants: Mapping[str, object]
) -> None:
    """Run a product in the form that its GPU's table has for these tiles."""
    target = tuning.target_of(x.device)
    table = tuning.TABLES[target]
    if routed.block_m not in table:
        raise ValueError(f"tiles have up to {routed.block_m} rows, expected one of {tuple(table)}")
    launch, num_tiles = table[routed.block_m], routed.tiles.shape[1]
    if num_tiles == 0:
        return
    with torch.cuda.device_of(x):
        kernel[(num_tiles * triton.cdiv(linear.tiles.out_features, launch.block_n),)](
            x.contiguous(), *linear.tiles[:2], linear.bias, routed.slots, routed.tiles, out, num_tiles,
            **_constants(linear.tiles, launch, routed.block_m, packed=x.is_cuda and torch.version.hip is None),
            **constants, **tuning.options(target, launch),
        )  # fmt: skip


def _constants(tiles: Tiles, launch: tuning.Launch, block_m: int, *, packed: bool) -> dict[str, object]:
    return {
        "OUT": tiles.out_features,
        "IN": tiles.in_features,
        "BLOCK_M": block_m,
        "BLOCK_N": launch.block_n,
        "STEP": launch.step,
        "ORDER": tiles.order,
        "PACKED": packed,
    }


@triton.jit
def scaled(pairs, factors, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply words of two bf16 by words of two equal bf16, powers of two; exact, and subnormals stay.

    NVIDIA multiplies pairs (an addition of -0 makes it an instruction that 8.0 has). Elsewhere the two halves are fp32
    whose lower bits are zero, before and after.
    """
    if PACKED:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r",
            [pairs, factors, tl.full(pairs.shape, 0x80008000, tl.uint32)],
            dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    factor = (factors & 0xFFFF0000).to(tl.float32, bitcast=True)
    high = (pairs & 0xFFFF0000).to(tl.float32, bitcast=True) * factor
    low = (pairs << 16).to(tl.float32, bitcast=True) * factor
    return (high.to(tl.uint32, bitcast=True) & 0xFFFF0000) | (low.to(tl.uint32, bitcast=True) >> 16)


@triton.jit
def halves(pairs):  # type: ignore[no-untyped-def]
    """Return words of two bf16 as a last dimension of two."""
    low = (pairs & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, (pairs >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True))


@triton.jit
def tile_values(words, scales, SHIFT: tl.constexpr, ORDER: tl.constexpr, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Decode words (rows x 8,) and scale words (rows,) to bf16 (rows, 64); see `tiles`. Rows come as 16 n + 8 c + a.

    Every step is one on the words that a thread has: the layout is the one of a product's left operand.
    """
    ROWS: tl.constexpr = scales.shape[0]
    if ORDER == "mfma":
        w = tl.permute(tl.reshape(words, (ROWS // 16, 4, 2, 8, 2)), (0, 3, 1, 2, 4))
    else:
        w = tl.reshape(words, (ROWS // 16, 8, 4, 2, 2))  # n, a, b, c, d
    scales = tl.reshape(scales, (ROWS // 16, 8, 1, 2, 1))
    first, _ = tl.broadcast(((scales >> SHIFT) & 255) * 0x00800080, w)  # two bf16 exponents
    second, _ = tl.broadcast(((scales >> (SHIFT + 8)) & 255) * 0x00800080, w)
    two = ((w << 12) | (w >> 20)) & 0x81C081C0
    three = (((w << 10) | (w >> 22)) & 0x81808180) | ((w << 2) & 0x00400040)
    even = tl.join(halves(scaled(w & 0x81C081C0, first, PACKED)), halves(scaled(two, second, PACKED)))
    odd = tl.join(halves(scaled((w << 6) & 0x81C081C0, first, PACKED)), halves(scaled(three, second, PACKED)))
    values = tl.join(even, odd)  # n, a, b, c, d, half, then the two bits of i
    if ORDER == "wgmma":
        values = tl.permute(values, (0, 3, 1, 6, 7, 4, 2, 5))
    else:
        values = tl.permute(values, (0, 3, 1, 6, 7, 2, 4, 5))
    return tl.reshape(values, (ROWS, 64))


@triton.jit
def product(  # type: ignore[no-untyped-def]
    x, inside, words, scales, expert, block,
    OUT: tl.constexpr, IN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, ORDER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Return fp32 (BLOCK_N, BLOCK_M): rows `block` of an expert's W, as 16 n + 8 c + a, times rows of x, transposed.

    x: pointers (BLOCK_M,) to the rows' first elements; `inside` (BLOCK_M,) says which there are.
    """
    TILE_ROWS: tl.constexpr = (OUT + 63) // 64
    COLUMNS: tl.constexpr = (IN + 63) // 64
    PAIRS: tl.constexpr = (COLUMNS + 1) // 2
    at = tl.arange(0, BLOCK_N * 8)
    row = tl.arange(0, BLOCK_N)
    # Rows of tiles behind the last are the last again: what they give is not stored.
    first = expert.to(tl.int64) * TILE_ROWS
    tile = first + tl.minimum(block * (BLOCK_N // 64) + at // 512, TILE_ROWS - 1)
    words += tile * (COLUMNS * 512) + at % 512
    tile = first + tl.minimum(block * (BLOCK_N // 64) + row // 64, TILE_ROWS - 1)
    scales += tile * (PAIRS * 64) + row % 64
    k = tl.arange(0, 64)[:, None]
    x = x[None, :] + k
    inside = inside[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if STEP == 2:
        for pair in range(PAIRS):
            scale = tl.load(scales).to(tl.uint32, bitcast=True)
            w = tl.load(words).to(tl.uint32, bitcast=True)
            x_tile = tl.load(x, mask=inside & (pair * 128 + k < IN), other=0.0)
            both = pair * 2 + 1 < COLUMNS
            w_next = tl.load(words + 512, mask=both, other=0).to(tl.uint32, bitcast=True)
            x_next = tl.load(x + 64, mask=inside & (pair * 128 + 64 + k < IN), other=0.0)
            sums = tl.dot(tile_values(w, scale, 0, ORDER, PACKED), x_tile, sums)
            sums = tl.dot(tile_values(w_next, scale, 16, ORDER, PACKED), x_next, sums)
            words += 1024
            scales += 64
            x += 128
    else:
        for column in range(COLUMNS):
            scale = tl.load(scales + column // 2 * 64).to(tl.uint32, bitcast=True) >> (column % 2 * 16)
            w = tl.load(words).to(tl.uint32, bitcast=True)
            x_tile = tl.load(x, mask=inside & (column * 64 + k < IN), other=0.0)
            sums = tl.dot(tile_values(w, scale, 0, ORDER, PACKED), x_tile, sums)
            words += 512
            x += 64
    return sums


@triton.jit
def up_kernel(  # type: ignore[no-untyped-def]
    x, words, scales, bias, slots, tiles, hidden, num_tiles,
    K: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, ORDER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One tile of rows by BLOCK_N / 2 units."""
    BLOCKS: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    UNITS: tl.constexpr = OUT // 2
    tile, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    row = tl.load(tiles + num_tiles + tile) + tl.arange(0, BLOCK_M)
    inside = tl.arange(0, BLOCK_M) < tl.load(tiles + 2 * num_tiles + tile)
    token = tl.load(slots + row, mask=inside, other=0) // K
    sums = product(
        x + token.to(tl.int64) * IN,
        inside,
        words,
        scales,
        expert,
        block,
        OUT,
        IN,
        BLOCK_M,
        BLOCK_N,
        STEP,
        ORDER,
        PACKED,
    )
    sums = tl.permute(tl.reshape(sums, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1))
    gate, value = tl.split(sums)
    gate, value = tl.reshape(gate, (BLOCK_N // 2, BLOCK_M)), tl.reshape(value, (BLOCK_N // 2, BLOCK_M))
    unit = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    bias += expert.to(tl.int64) * OUT + unit * 2
    gate += tl.load(bias, mask=unit < UNITS, other=0.0).to(tl.float32)[:, None]
    value += tl.load(bias + 1, mask=unit < UNITS, other=0.0).to(tl.float32)[:, None]
    gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    value = tl.clamp(value, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    result = gate * tl.sigmoid(gate * ALPHA) * (value + 1)
    at = row.to(tl.int64)[None, :] * UNITS + unit[:, None]
    tl.store(hidden + at, result.to(tl.bfloat16), mask=inside[None, :] & (unit < UNITS)[:, None])


@triton.jit
def down_kernel(  # type: ignore[no-untyped-def]
    hidden, words, scales, bias, slots, tiles, results, num_tiles,
    OUT: tl.constexpr, IN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, ORDER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One tile of rows by BLOCK_N outputs, each row to its slot."""
    BLOCKS: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tile, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    row = tl.load(tiles + num_tiles + tile) + tl.arange(0, BLOCK_M)
    inside = tl.arange(0, BLOCK_M) < tl.load(tiles + 2 * num_tiles + tile)
    sums = product(
        hidden + row.to(tl.int64) * IN,
        inside,
        words,
        scales,
        expert,
        block,
        OUT,
        IN,
        BLOCK_M,
        BLOCK_N,
        STEP,
        ORDER,
        PACKED,
    )
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


def cases(target: str) -> list[Case]:
    """Return the forms that are launched for 20b and 120b, whose experts have the same size."""
    found = []
    weights = {"words": "*i32", "scales": "*i32", "bias": "*bf16"}
    tables = {"slots": "*i32", "tiles": "*i32"}
    ups = {"x": "*bf16"} | weights | tables | {"hidden": "*bf16"}
    downs = {"hidden": "*bf16"} | weights | tables | {"results": "*bf16"}
    for block_m, launch in tuning.TABLES[target].items():
        for name, kernel, pointers, out_features, more in (
            ("up", up_kernel, ups, 5760, {"K": 4, "ALPHA": 1.702, "LIMIT": 7.0}),
            ("down", down_kernel, downs, 2880, {}),
        ):
            tiles = empty(1, out_features, 2880, tuning.ORDERS[target], device="meta")
            found.append(
                Case(
                    f"moe {name} {block_m}",
                    kernel,
                    pointers | {"num_tiles": "i32"},
                    _constants(tiles, launch, block_m, packed=target.startswith("sm")) | more,
                    aligned=tuple(pointers),
                    options=tuning.options(target, launch),
                    tensor_cores="wide",
                    blocks=launch.blocks,
                )
            )
    pointers = {"results": "*bf16", "chosen": "*i32", "weights": "*fp32", "out": "*bf16"}
    constants = {"WIDTH": 2880, "K": 4, "BLOCK": COMBINE_BLOCK}
    return [*found, Case("moe combine", combine_kernel, pointers, constants, tuple(pointers), COMBINE_OPTIONS)]
