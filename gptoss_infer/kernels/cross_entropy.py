"""What a label-only cross-entropy needs of the vocabulary, in Triton: no logit is ever written to memory.

For some rows of hidden states h and an unembedding W, the logsumexp of h W^T over all tokens but the target, and the
mean row of W under that softmax, which is the gradient's larger part (see `gptoss_train.loss`, the caller and, in plain
PyTorch, the reference of the whole). The vocabulary is taken in parts, each in two kernels:

    powers:  2^(logit - top) of a tile, in bits, bf16; `top` is the tile's own maximum, rounded up to a whole number
    mean:    powers times W, where each tile's powers are brought to one maximum

Whole maxima make that last factor a power of two, so it rounds nothing. Logits stay fp32 from their sum to their power:
what is rounded is the power, once. Sums go from the first token to the last; no two programs add to one place.

Legend: n rows, C hidden size, U rows of W (tokens), P tiles of a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_infer.config import ModelConfig
from gptoss_infer.kernels import tuning
from gptoss_infer.kernels.cases import Case, Check

PART_BYTES = 2**27  # of powers: 65,536 tokens for 1,024 rows
LEAST = -16384.0  # below every maximum that a bf16 model has, in bits; where there is no token but the target
LOG2_E = math.log2(math.e)
BLOCK_M, BLOCK_V, BLOCK_C = 128, 128, 64


class Form(NamedTuple):
    """How the two kernels are launched."""

    powers: tuple[int, int]  # warps and stages
    mean: tuple[int, int]


FORMS = {"sm_80": Form((8, 3), (4, 4)), "sm_90": Form((8, 3), (4, 4)), "sm_100": Form((8, 3), (4, 4))}
FORMS["gfx942"] = Form((8, 2), (4, 2))


def over_others_ref(
    hidden: Tensor, rows: Tensor, log_counts: Tensor | None, targets: Tensor, without: Tensor, *, with_mean: bool
) -> tuple[Tensor, Tensor | None]:
    """Plain PyTorch, in fp32 with all logits; see `over_others`."""
    logits = hidden.float() @ rows.float().T
    if log_counts is not None:
        logits += log_counts
    logits.scatter_add_(1, targets.unsqueeze(1), without / LOG2_E)
    normalizer = logits.logsumexp(1, keepdim=True)
    return normalizer, (logits - normalizer).exp().nan_to_num_(0.0) @ rows.float() if with_mean else None


def over_others(
    hidden: Tensor, rows: Tensor, log_counts: Tensor | None, targets: Tensor, without: Tensor, *, with_mean: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the logsumexp of the logits (n, 1) and the mean row by softmax (n, C), both fp32; see above.

    Args:
        hidden: bf16 (n, C). rows: bf16 (U, C).
        log_counts: fp32 (U,), added to the logits; None for zeros.
        targets: int64 (n,), rows of `rows`.
        without: fp32 (n, 1), added to the logit of the target, in bits: minus infinity if that is not to count.
        with_mean: whether the mean row is wanted; if not, it is None.
    Raises: ValueError if `hidden` or `rows` are not bf16.
    """
    if hidden.dtype != torch.bfloat16 or rows.dtype != torch.bfloat16:
        raise ValueError(f"hidden states and rows are {hidden.dtype} and {rows.dtype}; these kernels take bfloat16")
    hidden, targets = hidden.contiguous(), targets.int()
    n, width = hidden.shape
    top = hidden.new_full((n, 1), LEAST, dtype=torch.float32)
    total = torch.zeros_like(top)  # of 2^(logit in bits - top)
    weighted = torch.zeros_like(hidden, dtype=torch.float32) if with_mean else None
    most = max(1, PART_BYTES // (2 * n * BLOCK_V))  # tiles of a part
    form = FORMS[tuning.target_of(hidden.device)]
    for start in range(0, len(rows), most * BLOCK_V):
        part = rows[start : start + most * BLOCK_V]
        tiles = triton.cdiv(len(part), BLOCK_V)
        powers = hidden.new_empty(n, tiles * BLOCK_V) if with_mean else hidden  # which is not written then
        tops, sums = (hidden.new_empty(n, tiles, dtype=torch.float32) for _ in range(2))
        counts = top if log_counts is None else log_counts[start : start + len(part)]
        if not hidden.is_meta:
            with torch.cuda.device_of(hidden):
                powers_kernel[(tiles * triton.cdiv(n, BLOCK_M),)](
                    hidden, part, counts, targets - start, without, powers, tops, sums, len(part), n, tiles,
                    C=width, BLOCK_M=BLOCK_M, BLOCK_V=BLOCK_V, COUNTED=log_counts is not None, KEEP=with_mean,
                    **tuning.options(tuning.target_of(hidden.device), *form.powers),
                )  # fmt: skip
        higher = torch.maximum(top, tops.amax(1, keepdim=True))
        scales, shrink = (tops - higher).exp2_(), (top - higher).exp2_()
        total, top = total * shrink + (sums * scales).sum(1, keepdim=True), higher
        if weighted is not None and not hidden.is_meta:
            with torch.cuda.device_of(hidden):
                mean_kernel[(triton.cdiv(n, BLOCK_M) * triton.cdiv(width, BLOCK_C),)](
                    powers, scales, part, shrink, weighted, len(part), n, tiles,
                    C=width, BLOCK_M=BLOCK_M, BLOCK_V=BLOCK_V, BLOCK_C=BLOCK_C,
                    **tuning.options(tuning.target_of(hidden.device), *form.mean),
                )  # fmt: skip
    mean = None if weighted is None else weighted.div_(total.clamp_min(torch.finfo(torch.float32).tiny))
    return (total.log2() + top) / LOG2_E, mean


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_tiles"])
def powers_kernel(  # type: ignore[no-untyped-def]
    hidden, rows, log_counts, targets, without, powers, tops, sums, num_tokens, num_rows, num_tiles,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, COUNTED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows by a tile of BLOCK_V tokens; powers of tokens behind the last are 0."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    blocks = tl.cdiv(num_rows, BLOCK_M)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    k = tl.arange(0, 64)
    is_row, is_token = m < num_rows, v < num_tokens
    x = hidden + m.to(tl.int64)[:, None] * C + k[None, :]
    w = rows + v.to(tl.int64)[None, :] * C + k[:, None]
    logits = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, C, 64):
        there = start + k < C
        left = tl.load(x + start, mask=is_row[:, None] & there[None, :], other=0.0)
        right = tl.load(w + start, mask=is_token[None, :] & there[:, None], other=0.0)
        logits = tl.dot(left, right, logits)
    bits = logits * LOG2_E
    if COUNTED:
        bits += (tl.load(log_counts + v, mask=is_token, other=0.0) * LOG2_E)[None, :]
    target = tl.load(targets + m, mask=is_row, other=-1)
    more = tl.load(without + m, mask=is_row, other=0.0)
    bits = tl.where(v[None, :] == target[:, None], bits + more[:, None], bits)
    bits = tl.where(is_token[None, :], bits, float("-inf"))
    most = tl.maximum(tl.max(bits, axis=1), -16384.0)
    whole = most.to(tl.int32).to(tl.float32)  # towards zero; libdevice's ceil rounds subnormals to zero
    top = tl.where(whole < most, whole + 1, whole)
    power = tl.exp((bits - top[:, None]) * 0.6931471805599453)  # exp2 would round subnormals to zero
    at = m.to(tl.int64) * num_tiles + tile
    tl.store(tops + at, top, mask=is_row)
    tl.store(sums + at, tl.sum(power, axis=1), mask=is_row)
    if KEEP:
        tl.store(powers + at[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :], power.to(tl.bfloat16),
                 mask=is_row[:, None])  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_tiles"])
def mean_kernel(  # type: ignore[no-untyped-def]
    powers, scales, rows, shrink, weighted, num_tokens, num_rows, num_tiles,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows by BLOCK_C columns: what `weighted` holds times `shrink`, and the part's powers times its rows."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    m = tl.program_id(0) // BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, 64)
    is_row, is_column = m < num_rows, c < C
    first = m.to(tl.int64) * num_tiles
    powers += first[:, None] * BLOCK_V + k[None, :]
    scales += first
    rows += k.to(tl.int64)[:, None] * C + c[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, num_tiles * BLOCK_V, 64):
        scale = tl.load(scales + start // BLOCK_V, mask=is_row, other=0.0)
        power = tl.load(powers, mask=is_row[:, None], other=0.0).to(tl.float32) * scale[:, None]
        w = tl.load(rows, mask=(start + k < num_tokens)[:, None] & is_column[None, :], other=0.0)
        sums = tl.dot(power.to(tl.bfloat16), w, sums)
        powers += 64
        rows += 64 * C
    at = weighted + m.to(tl.int64)[:, None] * C + c[None, :]
    stored = is_row[:, None] & is_column[None, :]
    before = tl.load(at, mask=stored, other=0.0) * tl.load(shrink + m, mask=is_row, other=0.0)[:, None]
    tl.store(at, before + sums, mask=stored)


def cases(target: str) -> list[Case]:
    """Return the forms that are launched for 20b and 120b."""
    sizes = dict.fromkeys(("num_tokens", "num_rows", "num_tiles"), "i32")
    form = FORMS[target]
    pointers = {"hidden": "*bf16", "rows": "*bf16", "log_counts": "*fp32", "targets": "*i32", "without": "*fp32"}
    pointers |= {"powers": "*bf16", "tops": "*fp32", "sums": "*fp32"}
    found = [
        Case(
            f"cross-entropy powers{', kept' if keep else ''}",
            powers_kernel,
            pointers | sizes,
            {"C": 2880, "BLOCK_M": BLOCK_M, "BLOCK_V": BLOCK_V, "COUNTED": False, "KEEP": keep},
            aligned=tuple(pointers),
            options=tuning.options(target, *form.powers),
            tensor_cores="wide",
        )
        for keep in (True, False)
    ]
    pointers = {"powers": "*bf16", "scales": "*fp32", "rows": "*bf16", "shrink": "*fp32", "weighted": "*fp32"}
    found.append(
        Case(
            "cross-entropy mean",
            mean_kernel,
            pointers | sizes,
            {"C": 2880, "BLOCK_M": BLOCK_M, "BLOCK_V": BLOCK_V, "BLOCK_C": BLOCK_C},
            aligned=tuple(pointers),
            options=tuning.options(target, *form.mean),
            tensor_cores="wide",
        )
    )
    return found


def checks(config: ModelConfig, device: torch.device, tokens: Sequence[int]) -> Iterator[Check]:
    """Yield normalizers and mean rows at each number of labelled tokens, up to the 1,024 of a call."""
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(config.vocab_size, config.hidden_size, device=device, generator=generator).bfloat16()
    for count in sorted({min(count, 1024) for count in tokens}):
        hidden = torch.randn(count, config.hidden_size, device=device, generator=generator) * config.hidden_size**-0.5
        targets = torch.randint(config.vocab_size, (count,), device=device, generator=generator)
        without = torch.full((count, 1), -math.inf, device=device)
        given = hidden.bfloat16(), rows, None, targets, without
        yield Check(
            f"cross-entropy, {count} labels",
            [partial(over_others, *given, with_mean=True)],
            partial(over_others_ref, *given, with_mean=True),
            2**-8,  # of powers rounded to bf16; the mean of the vocabulary cancels most of them, and most of itself
            moved_bytes=2.0 * rows.nbytes,
            flops=4.0 * count * rows.numel(),
            compared=lambda result: torch.cat([part.flatten() / part.norm() for part in result]),
        )
