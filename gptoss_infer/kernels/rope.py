"""Rotary embedding of queries and keys, and keys and values into their pages, in one Triton kernel.

Legend: N rows of a step, H query heads, K key/value heads, D head size, T tokens of a page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_infer.config import ModelConfig
from gptoss_infer.kernels.cases import Case, Check
from gptoss_infer.kernels.plans import Tile

HEADS = Tile(1, 1, 1, 1)  # a kv head and its query heads, of one token: 10 heads of 64


def rotate_and_store_ref(
    qkv: tuple[Tensor, Tensor, Tensor], angles: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, places: Tensor
) -> Tensor:
    """Plain PyTorch; see `rotate_and_store`."""
    q, k, v = qkv
    dtype = torch.promote_types(torch.float32, q.dtype)
    cos, sin = (x[:, None].to(dtype) for x in angles)  # (N, 1, D/2)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.to(dtype).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    kept = places >= 0
    page, slot = places[kept].long() // keys.shape[2], places[kept].long() % keys.shape[2]
    keys[page, :, slot] = rotated(k)[kept]
    values[page, :, slot] = v[kept]
    return rotated(q)


@triton.jit
def rotate_and_store_kernel(  # type: ignore[no-untyped-def]
    q, k, v, cos, sin, places, out, keys, values, stride_q, stride_k, stride_v,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Rotate one token's heads of one kv head into out (N, H, D) and keys, and copy its value; HEADS >= GROUP."""
    token, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = D // 2
    half, members = tl.arange(0, HALF), tl.arange(0, HEADS)
    c = tl.load(cos + token * HALF + half).to(tl.float32)
    s = tl.load(sin + token * HALF + half).to(tl.float32)

    inside = (members < GROUP)[:, None]
    heads = (kv * GROUP + members)[:, None] * D + half[None, :]  # (HEADS, D/2)
    first = tl.load(q + token * stride_q + heads, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(q + token * stride_q + heads + HALF, mask=inside, other=0.0).to(tl.float32)
    to = out + token * (tl.num_programs(1) * GROUP * D) + heads
    tl.store(to, (first * c[None, :] - second * s[None, :]).to(out.dtype.element_ty), mask=inside)
    tl.store(to + HALF, (second * c[None, :] + first * s[None, :]).to(out.dtype.element_ty), mask=inside)

    place = tl.load(places + token).to(tl.int64)
    if place >= 0:
        slot = ((place // PAGE * tl.num_programs(1) + kv) * PAGE + place % PAGE) * D
        key = k + token * stride_k + kv * D + half
        key_first, key_second = tl.load(key).to(tl.float32), tl.load(key + HALF).to(tl.float32)
        tl.store(keys + slot + half, (key_first * c - key_second * s).to(keys.dtype.element_ty))
        tl.store(keys + slot + HALF + half, (key_second * c + key_first * s).to(keys.dtype.element_ty))
        whole = tl.arange(0, D)
        tl.store(values + slot + whole, tl.load(v + token * stride_v + kv * D + whole))


def rotate_and_store(
    qkv: tuple[Tensor, Tensor, Tensor], angles: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, places: Tensor
) -> Tensor:
    """Return the rotated queries (N, H, D), and put rotated keys, and values, into their pages.

    Computed in fp32 and rounded once. (`gptoss_infer.model.rotate` rounds every step to the model's dtype.)

    Args:
        qkv: (N, H, D), (N, K, D), (N, K, D); the heads of a token lie together, tokens may be further apart.
        angles: cosines and sines, (N, D/2) each, contiguous.
        keys, values: (pages, K, T, D), contiguous; written.
        places: int32 (N,): page T + slot of each token; -1 for one that is not kept.
    """
    q, k, v = qkv
    n, heads, d = q.shape
    out = torch.empty(n, heads, d, dtype=q.dtype, device=q.device)
    for x in qkv:
        assert x.stride()[1:] == (d, 1), f"heads of a token lie apart: strides {x.stride()}"
    if n:
        with torch.cuda.device_of(q):
            rotate_and_store_kernel[(n, k.shape[1])](
                q, k, v, *angles, places, out, keys, values, q.stride(0), k.stride(0), v.stride(0),
                **_constants(heads // k.shape[1], d, keys.shape[2]), **HEADS.options,
            )  # fmt: skip
    return out


def _constants(group: int, d: int, page: int) -> dict[str, int]:
    return {"GROUP": group, "D": d, "PAGE": page, "HEADS": triton.next_power_of_2(group)}


def cases(target: str) -> list[Case]:
    """Return the form that is launched for gpt-oss."""
    kinds = dict.fromkeys(("q", "k", "v", "cos", "sin", "out", "keys", "values"), "*bf16") | {"places": "*i32"}
    kinds |= dict.fromkeys(("stride_q", "stride_k", "stride_v"), "i32")
    return [
        Case(
            "rope and store", rotate_and_store_kernel, kinds, _constants(8, 64, 64), aligned=list(kinds),
            options=HEADS.options, keeps_subnormals=False,
        )
    ]  # fmt: skip


def checks(config: ModelConfig, device: torch.device, tokens: Sequence[int]) -> Iterator[Check]:
    """Yield rotated queries, and all pages, for so many tokens."""
    generator = torch.Generator(device).manual_seed(0)
    h, kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        fused, cos, sin, pools, places = inputs
        return function(fused.split([h, kv, kv], 1), (cos, sin), pools[0], pools[1], places), pools

    for count in tokens:
        num_pages = -(-count // 64) + 1

        def inputs(count: int = count, num_pages: int = num_pages) -> tuple[Tensor, ...]:
            fused = torch.randn(count, h + 2 * kv, d, generator=generator, device=device).bfloat16()
            angles = torch.rand(count, d // 2, generator=generator, device=device) * 6
            places = torch.randperm(64 * num_pages, generator=generator, device=device)[:count].int()
            cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
            return fused, cos, sin, fused.new_zeros(2, num_pages, kv, 64, d), places

        sets = [inputs() for _ in range(8)]
        fused, cos, sin, pools, places = sets[0]
        yield Check(
            f"rope and store, {count} tokens",
            [partial(run, rotate_and_store, one) for one in sets],
            partial(run, rotate_and_store_ref, (fused, cos, sin, torch.zeros_like(pools), places)),
            2**-9,
            moved_bytes=2.0 * fused.nbytes + 2 * cos.nbytes,
            compared=lambda results: torch.cat([result.flatten() for result in results]),
        )
