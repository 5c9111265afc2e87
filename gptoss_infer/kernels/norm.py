"""Residual addition and RMSNorm in one pass over a row, in Triton; the reference stands beside it.

A row is one program's, whatever the batch, so its sum is always taken in the same order. Legend: N rows, C hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_infer.config import ModelConfig
from gptoss_infer.kernels.cases import Case, Check
from gptoss_infer.kernels.plans import Tile

ROW = Tile(1, 1, 8, 1)  # 2,880 values on 256 threads


def add_norm_ref(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Plain PyTorch; see `add_norm`."""
    total = x if delta is None else x + delta
    wide = total.to(torch.promote_types(torch.float32, x.dtype))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return total, (wide * inverse * weight).to(x.dtype)


@triton.jit
def add_norm_kernel(x, delta, weight, total, normed, size, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write total = x + delta, unless delta is None, and normed, all (N, C), for one row."""
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    place = tl.program_id(0).to(tl.int64) * size + cols
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        value += tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    scaled = value * inverse * tl.load(weight + cols, mask=inside, other=0.0)
    tl.store(normed + place, scaled.to(normed.dtype.element_ty), mask=inside)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + delta, rounded to their dtype, and its RMSNorm: of what was rounded, in fp32, rounded once.

    Args:
        x: (N, C), contiguous: the residual stream. delta: like it, or None for x alone. weight: fp32 (C,).
    """
    n, size = x.shape
    total = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    if n:
        with torch.cuda.device_of(x):
            add_norm_kernel[(n,)](
                x, delta, weight, total, normed, size, eps, BLOCK=triton.next_power_of_2(size), **ROW.options
            )
    return total, normed


def cases(target: str) -> list[Case]:
    """Return the forms that are launched for gpt-oss."""
    kinds = {"x": "*bf16", "delta": "*bf16", "weight": "*fp32", "total": "*bf16", "normed": "*bf16"}
    numbers = {"size": "i32", "eps": "fp32"}
    constants: list[dict[str, object]] = [{"BLOCK": 4096}, {"BLOCK": 4096, "delta": None}]
    return [
        Case(
            f"norm{'' if 'delta' in fixed else ' behind addition'}",
            add_norm_kernel,
            {name: kind for name, kind in (kinds | numbers).items() if name not in fixed},
            fixed,
            aligned=[name for name in (*kinds, "size") if name not in fixed],
            options=ROW.options,
            keeps_subnormals=False,
        )
        for fixed in constants
    ]


def checks(config: ModelConfig, device: torch.device, tokens: Sequence[int]) -> Iterator[Check]:
    """Yield the sum and the norm of so many rows."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.rand(config.hidden_size, generator=generator, device=device) + 0.5
    for count in tokens:
        sets = [
            torch.randn(2, count, config.hidden_size, generator=generator, device=device).bfloat16() for _ in range(8)
        ]
        yield Check(
            f"norm behind addition, {count} tokens",
            [partial(add_norm, pair[0], pair[1], weight, config.rms_norm_eps) for pair in sets],
            partial(add_norm_ref, sets[0][0], sets[0][1], weight, config.rms_norm_eps),
            2**-9,
            moved_bytes=2.0 * sets[0].nbytes,
            compared=torch.cat,
        )
