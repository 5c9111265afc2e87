"""What the experts' backward pass takes beside the kernels of `moe`, in Triton; nothing is ever decoded to memory.

    input gradient:   dy W, and an adapter's (dy B) A in the same sums     (M, out) -> (M, in)
    swiglu backward:  through activation and choice, a row per program     (M, I) -> (M, 2 I)
    factor gradient:  an expert's rows of one matrix, times another's      (M, R), (M, width) -> (E, R, width)

W is read from the tiles of the forward pass: there is one copy of the weights. Sums are fp32, in an order that the
routing alone determines, and no two programs add to one place: the same step gives the same bits.

Legend: N tokens, k chosen per token, M = N k rows, E experts, C hidden size, I intermediate size, R rank.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.kernels import tuning
from gptoss_infer.kernels.moe import Linear, Swiglu, check_activations, product_constants
from gptoss_infer.kernels.products import add_low_rank, tile_rows, transposed_product
from gptoss_infer.kernels.routing import Routed
from gptoss_infer.kernels.tiles import Tiles, unpack

SWIGLU_BLOCK, SWIGLU_OPTIONS = 1024, {"num_warps": 4, "enable_fp_fusion": False}
FACTOR_ROWS, FACTOR_COLUMNS = 64, 128


def input_gradient_ref(
    y: Tensor | None, linear: Linear, routed: Routed, *, low: Tensor | None, of_tokens: bool, to_slots: bool
) -> Tensor:
    """Plain PyTorch, in fp32 until the end; see `input_gradient`."""
    weights = mxfp4.decode(*unpack(linear.tiles), torch.float32)  # (E, out, in)
    out = torch.zeros(len(routed.slots), weights.shape[2], dtype=torch.bfloat16, device=weights.device)
    top_k = routed.chosen.shape[1]
    for expert, first, count in routed.tiles.T.tolist():
        if expert >= 0:
            rows = slice(first, first + count)
            slots = routed.slots[rows].long()
            product = weights.new_zeros(count, weights.shape[2])
            if y is not None:
                product += (y[slots // top_k] if of_tokens else y[rows]).float() @ weights[expert]
            if low is not None and linear.low_rank is not None:
                product += low[:, rows].sum(0).bfloat16().float() @ linear.low_rank.a[expert].float()
            out[slots if to_slots else rows] = product.to(out.dtype)
    return out.view(*routed.chosen.shape, -1) if to_slots else out


def input_gradient(
    y: Tensor | None, linear: Linear, routed: Routed, *, low: Tensor | None, of_tokens: bool, to_slots: bool
) -> Tensor:
    """Return the gradient to a projection's input from that to its output, bf16 (M, in), or (N, k, in) by slots.

    Args:
        y: bf16 (N, out) with `of_tokens`, else (M, out), in the order of the routed rows; None for the adapter's alone.
        low: bf16 or fp32 (parts, M, R), y B of the rows, to be multiplied by the adapter's A; None without one.
        to_slots: the result is ordered by slot, for `moe.combine`, and not by row.
    Rows behind the last routed one are not written.
    Raises: ValueError if `y` is not bf16 or shapes disagree.
    """
    if y is not None:
        check_activations(y, linear.tiles.out_features)
    in_features, words = linear.tiles.in_features, linear.tiles.words
    out = words.new_empty(len(routed.slots), in_features, dtype=torch.bfloat16)
    shaped = out.view(*routed.chosen.shape, -1) if to_slots else out
    target = tuning.target_of(words.device)
    launch, num_tiles = tuning.BACKWARD[target][routed.block_m], routed.tiles.shape[1]
    a = out if low is None or linear.low_rank is None else linear.low_rank.a.mT.contiguous()  # (E, in, R)
    if num_tiles == 0 or words.is_meta:
        return shaped
    packed = words.is_cuda and torch.version.hip is None
    with torch.cuda.device_of(words):
        input_gradient_kernel[(num_tiles * triton.cdiv(in_features, launch.block_n),)](
            out if y is None else y.contiguous(), words, linear.tiles.scales, out if low is None else low, a,
            routed.slots, routed.tiles, out, num_tiles, len(routed.slots),
            **input_constants(linear.tiles, launch, routed.block_m, packed=packed),
            K=routed.chosen.shape[1], OF_TOKENS=of_tokens, TO_SLOTS=to_slots, DENSE=y is not None,
            RANK=0 if low is None else low.shape[2], PARTS=0 if low is None else len(low),
            **tuning.options(target, launch.num_warps, launch.num_stages),
        )  # fmt: skip
    return shaped


def input_constants(tiles: Tiles, launch: tuning.Launch, block_m: int, *, packed: bool) -> dict[str, object]:
    """Return what `products.transposed_product` is specialised for."""
    constants = product_constants(tiles, launch, block_m, packed=packed)
    del constants["STEP"]
    return constants


@triton.jit(do_not_specialize=["num_tiles", "num_rows"])
def input_gradient_kernel(  # type: ignore[no-untyped-def]
    y, words, scales, low, a, slots, tiles, out, num_tiles, num_rows,
    K: tl.constexpr, OF_TOKENS: tl.constexpr, TO_SLOTS: tl.constexpr, DENSE: tl.constexpr,
    OUT: tl.constexpr, IN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ORDER: tl.constexpr, PACKED: tl.constexpr,
    RANK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One tile of rows by BLOCK_N inputs; of W, if DENSE, and of an adapter of RANK, if there is one."""
    BLOCKS: tl.constexpr = (IN + BLOCK_N - 1) // BLOCK_N
    tile, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    row, inside = tile_rows(tiles, num_tiles, tile, BLOCK_M)
    slot = tl.load(slots + row, mask=inside, other=0)
    of_row = slot // K if OF_TOKENS else row
    if DENSE:
        sums = transposed_product(
            y + of_row.to(tl.int64) * OUT, inside, words, scales, expert, block,
            OUT, IN, BLOCK_M, BLOCK_N, ORDER, PACKED,
        )  # fmt: skip
    else:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if RANK:
        sums = add_low_rank(sums, low, a, row, inside, num_rows, expert, n, IN, RANK, PARTS, BLOCK_M)
    target = slot if TO_SLOTS else row
    at = target.to(tl.int64)[None, :] * IN + n[:, None]
    tl.store(out + at, sums.to(tl.bfloat16), mask=inside[None, :] & (n < IN)[:, None])


def swiglu_backward_ref(
    grad_hidden: Tensor, pre: Tensor, grad: Tensor, bias: Tensor, routed: Routed, activation: Swiglu
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch, in fp32 until the end; see `swiglu_backward`."""
    top_k, (alpha, limit) = routed.chosen.shape[1], activation
    slots = routed.slots.long()
    gate, value = pre[:, 0::2].float(), pre[:, 1::2].float()
    clamped, shifted = gate.clamp(max=limit), value.clamp(-limit, limit) + 1
    sigmoid = torch.sigmoid(alpha * clamped)
    hidden = (clamped * sigmoid * shifted).to(pre.dtype)
    slopes = (grad_hidden.float() * hidden.float()).sum(1)
    slopes += (grad[slots // top_k].float() * bias[routed.chosen.flatten()[slots].long()].float()).sum(1)
    upstream = grad_hidden.float() * routed.weights.flatten()[slots].float().unsqueeze(1)
    grad_gate = upstream * shifted * sigmoid * (1 + alpha * clamped * (1 - sigmoid))
    grad_value = upstream * clamped * sigmoid
    grad_pre = torch.stack([grad_gate.where(gate <= limit, 0.0), grad_value.where(value.abs() <= limit, 0.0)], dim=2)
    by_slot = torch.empty_like(slopes).index_copy_(0, slots, slopes)
    return hidden, grad_pre.flatten(1).to(pre.dtype), by_slot.view(routed.chosen.shape)


def swiglu_backward(
    grad_hidden: Tensor, pre: Tensor, grad: Tensor, bias: Tensor, routed: Routed, activation: Swiglu
) -> tuple[Tensor, Tensor, Tensor]:
    """Go back through the weight of a choice and the clamped SwiGLU; nothing passes a clamp.

    The result of a row is w (W h + bias), whose gradient to w is g (W h + bias) = (g W) h + g bias.

    Args:
        grad_hidden: bf16 (M, I), g W of each row, not yet times w. Overwritten: its memory is that of `hidden`.
        pre: bf16 (M, 2 I), as `moe.up` kept it.
        grad: bf16 (N, C), g of each token. bias: (E, C), down_proj's.
        routed: all rows are real.
    Returns: hidden bf16 (M, I), gradient to `pre` bf16 (M, 2 I), gradient to the weights fp32 (N, k).
    """
    num_rows, units = grad_hidden.shape
    grad_pre = torch.empty_like(pre)
    slopes = grad.new_empty(routed.chosen.shape, dtype=torch.float32)
    if num_rows and not pre.is_meta:
        with torch.cuda.device_of(pre):
            swiglu_backward_kernel[(num_rows,)](
                grad_hidden, pre, grad.contiguous(), bias, routed.slots, routed.chosen, routed.weights,
                grad_pre, slopes,
                K=routed.chosen.shape[1], ALPHA=activation.alpha, LIMIT=activation.limit,
                UNITS=units, WIDTH=grad.shape[1], BLOCK=SWIGLU_BLOCK, **SWIGLU_OPTIONS,
            )  # fmt: skip
    return grad_hidden, grad_pre, slopes


@triton.jit
def swiglu_backward_kernel(  # type: ignore[no-untyped-def]
    grad_hidden, pre, grad, bias, slots, chosen, weights, grad_pre, slopes,
    K: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    UNITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    expert = tl.load(chosen + slot).to(tl.int64)
    weight = tl.load(weights + slot).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    pair = tl.arange(0, 2 * BLOCK)
    slope = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, UNITS, BLOCK):
        inside = start + lane < UNITS
        both = start * 2 + pair < 2 * UNITS
        at = row * 2 * UNITS + start * 2 + pair
        gate, value = tl.split(tl.reshape(tl.load(pre + at, mask=both, other=0.0).to(tl.float32), (BLOCK, 2)))
        of_hidden = grad_hidden + row * UNITS + start + lane
        product = tl.load(of_hidden, mask=inside, other=0.0).to(tl.float32)
        clamped = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        shifted = tl.clamp(value, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL) + 1
        sigmoid = tl.sigmoid(clamped * ALPHA)
        hidden = (clamped * sigmoid * shifted).to(tl.bfloat16)
        tl.store(of_hidden, hidden, mask=inside)
        slope += product * hidden.to(tl.float32)
        upstream = product * weight
        grad_gate = upstream * shifted * sigmoid * (1 + ALPHA * clamped * (1 - sigmoid))
        grad_value = upstream * clamped * sigmoid
        grad_gate = tl.where(gate > LIMIT, 0.0, grad_gate)
        grad_value = tl.where(tl.abs(value) > LIMIT, 0.0, grad_value)
        both_grads = tl.reshape(tl.join(grad_gate, grad_value), (2 * BLOCK,))
        tl.store(grad_pre + at, both_grads.to(tl.bfloat16), mask=both)
    for start in range(0, WIDTH, BLOCK):
        inside = start + lane < WIDTH
        g = tl.load(grad + slot // K * WIDTH + start + lane, mask=inside, other=0.0).to(tl.float32)
        slope += g * tl.load(bias + expert * WIDTH + start + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(slopes + slot, tl.sum(slope, axis=0))


def factor_gradient_ref(low: Tensor, x: Tensor, routed: Routed, starts: Tensor, *, of_tokens: bool) -> Tensor:
    """Plain PyTorch, in fp32; see `factor_gradient`."""
    ends = starts.tolist()
    out = low.new_zeros(len(ends) - 1, low.shape[1], x.shape[1], dtype=torch.float32)
    for expert, (first, end) in enumerate(pairwise(ends)):
        rows = slice(first, end)
        values = x[routed.slots[rows].long() // routed.chosen.shape[1]] if of_tokens else x[rows]
        out[expert] = low[rows].float().T @ values.float()
    return out


def factor_gradient(low: Tensor, x: Tensor, routed: Routed, starts: Tensor, *, of_tokens: bool) -> Tensor:
    """Return, for every expert, low^T x over its rows, fp32 (E, R, width); zero for an expert without rows.

    Args:
        low: bf16 (M, R), R a power of two of at least 16.
        x: bf16 (N, width) with `of_tokens`, else (M, width), in the order of the rows.
        starts: int32 (E + 1,), the first row of each expert, and M.
    """
    num_experts, rank, width = len(starts) - 1, low.shape[1], x.shape[1]
    out = low.new_empty(num_experts, rank, width, dtype=torch.float32)
    if not x.is_meta:
        with torch.cuda.device_of(x):
            factor_gradient_kernel[(num_experts * triton.cdiv(width, FACTOR_COLUMNS),)](
                low.contiguous(), x.contiguous(), routed.slots, starts, out,
                K=routed.chosen.shape[1], WIDTH=width, RANK=rank, STEP=FACTOR_ROWS, BLOCK=FACTOR_COLUMNS,
                OF_TOKENS=of_tokens, **factor_options(tuning.target_of(x.device)),
            )  # fmt: skip
    return out


def factor_options(target: str) -> dict[str, object]:
    """Return what Triton is told with a launch of `factor_gradient_kernel`."""
    return tuning.options(target, num_warps=4, num_stages=2 if target.startswith("gfx") else 4)


@triton.jit
def factor_gradient_kernel(  # type: ignore[no-untyped-def]
    low, x, slots, starts, out,
    K: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    OF_TOKENS: tl.constexpr,
):  # fmt: skip
    """One expert by BLOCK columns, rows from first to last."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    expert, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    first, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    rank = tl.arange(0, RANK)
    lane = tl.arange(0, STEP)
    sums = tl.zeros((RANK, BLOCK), tl.float32)
    for start in range(first, end, STEP):
        row = start + lane
        inside = row < end
        of_row = tl.load(slots + row, mask=inside, other=0) // K if OF_TOKENS else row
        left = tl.load(low + row.to(tl.int64)[None, :] * RANK + rank[:, None], mask=inside[None, :], other=0.0)
        at = x + of_row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        right = tl.load(at, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)
        sums = tl.dot(left, right, sums)
    at = (expert.to(tl.int64) * RANK + rank)[:, None] * WIDTH + column[None, :]
    tl.store(out + at, sums, mask=(column < WIDTH)[None, :])
