"""Triton's norm and rotary embedding, in the interpreter, against formulas written out in fp64."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed here (it comes with torch on Linux)")

DTYPES = (torch.float32, torch.bfloat16)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and torch sees none")


def rounding(dtype: torch.dtype) -> float:
    """Half a unit in the last place of 1, and for fp32 a few more for the sums."""
    return 2**-9 if dtype == torch.bfloat16 else 1e-6


def rows(n: int, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "size"), [(1, 1), (3, 96), (5, 2880), (0, 64)])
def test_norm_is_of_the_rounded_sum_and_the_sum_is_what_torch_adds(n: int, size: int, dtype: torch.dtype) -> None:
    x, delta = rows(n, size, dtype), rows(n, size, dtype, 1)
    weight = torch.rand(size, generator=torch.Generator().manual_seed(2)) + 0.5
    total, normed = interpreted("gptoss_infer.kernels.norm", "add_norm", x, delta, weight, 1e-5)
    assert torch.equal(total, x + delta)
    wide = total.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert normed.dtype == dtype
    assert torch.allclose(normed.double(), expected, rtol=2 * rounding(dtype), atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_an_addend_the_row_itself_is_normed(dtype: torch.dtype) -> None:
    x, weight = rows(2, 100, dtype), torch.ones(100)
    total, normed = interpreted("gptoss_infer.kernels.norm", "add_norm", x, None, weight, 1e-5)
    assert torch.equal(total, x)
    zero = torch.zeros_like(x)
    assert torch.equal(normed, interpreted("gptoss_infer.kernels.norm", "add_norm", x, zero, weight, 1e-5)[1])


def test_a_row_alone_and_among_others_is_normed_to_the_same_bits() -> None:
    x, delta, weight = rows(9, 300, torch.bfloat16), rows(9, 300, torch.bfloat16, 1), torch.ones(300)
    together = interpreted("gptoss_infer.kernels.norm", "add_norm", x, delta, weight, 1e-5)[1]
    alone = interpreted("gptoss_infer.kernels.norm", "add_norm", x[4:5], delta[4:5], weight, 1e-5)[1]
    assert torch.equal(alone[0], together[4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv", "d"), [(6, 2, 16), (8, 1, 64), (4, 4, 32)])
def test_heads_are_rotated_and_keys_and_values_land_in_their_pages(
    heads: int, kv: int, d: int, dtype: torch.dtype
) -> None:
    n, page = 5, 4
    fused = rows(n, (heads + 2 * kv) * d, dtype).view(n, -1, d)  # as one projection yields them: tokens lie apart
    angles = torch.rand(n, d // 2, generator=torch.Generator().manual_seed(1)) * 6
    places = torch.tensor([13, 0, -1, 7, 12], dtype=torch.int32)
    out, keys, values = interpreted("attention_launches", "rotate_and_store", fused, angles, places, kv, page)

    turned = (
        torch.view_as_complex(torch.stack([fused[..., : d // 2], fused[..., d // 2 :]], dim=-1).double().contiguous())
        * torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())[:, None]
    )  # the pairs, as complex numbers
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    assert torch.allclose(out.double(), expected[:, :heads], rtol=rounding(dtype), atol=4 * rounding(dtype))
    assert out.dtype == keys.dtype == dtype
    untouched = torch.ones(4 * page, dtype=torch.bool)
    for token, place in enumerate(places.tolist()):
        if place >= 0:
            untouched[place] = False
            key, value = (pool[place // page, :, place % page] for pool in (keys, values))
            assert torch.allclose(key.double(), expected[token, heads : heads + kv], rtol=0, atol=4 * rounding(dtype))
            assert torch.equal(value, fused[token, heads + kv :])
    for pool in (keys, values):
        assert (pool.transpose(1, 2).flatten(0, 1)[untouched] == 7).all()


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_norm_and_rotation_equal_their_references() -> None:
    from gptoss_infer.kernels import norm, rope

    x, delta = (rows(33, 2880, torch.bfloat16, seed).cuda() for seed in (0, 1))
    weight = torch.rand(2880, device="cuda") + 0.5
    for got, expected in zip(
        norm.add_norm(x, delta, weight, 1e-5), norm.add_norm_ref(x, delta, weight, 1e-5), strict=True
    ):
        assert torch.allclose(got.float(), expected.float(), rtol=2**-7)  # two values of bf16 side by side
    fused = rows(33, 80 * 64, torch.bfloat16).view(33, 80, 64).cuda()
    angles = torch.rand(33, 32, device="cuda") * 6
    places = torch.randperm(8 * 64, device="cuda")[:33].int()
    results = []
    for function in (rope.rotate_and_store, rope.rotate_and_store_ref):
        pools = torch.zeros(2, 8, 8, 64, 64, dtype=torch.bfloat16, device="cuda")
        qkv = fused[:, :64], fused[:, 64:72], fused[:, 72:]
        results.append([function(qkv, (angles.cos(), angles.sin()), *pools, places), *pools])
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got.float(), expected.float(), rtol=2**-7, atol=2**-7)
