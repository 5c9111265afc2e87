"""The interpreter that the kernels' tests rely on computes bf16 as torch does."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from interpreter import interpreted, narrow

pytest.importorskip("triton", reason="Triton is not installed here (it comes with torch on Linux)")


def test_bf16_arithmetic_and_casts_round_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    powers = 2.0 ** torch.randint(-20, 20, (1024,), generator=generator)
    x = (torch.randn(1024, generator=generator) * powers).bfloat16()
    y = torch.randn(1024, generator=generator).bfloat16()
    product, total, smaller, by_cast, by_mode = interpreted("kernel_probes", "arithmetic", x, y)
    assert torch.equal(product, x * y)
    assert torch.equal(total, x + y)
    assert torch.equal(smaller, torch.minimum(x, y))
    assert torch.equal(by_cast, (x.float() / 3).bfloat16())
    assert torch.equal(by_mode, by_cast)


def test_bf16_dot_multiplies_values_and_sums_them_in_fp32() -> None:
    x, y = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.allclose(interpreted("kernel_probes", "dot", x, y), x.float() @ y.float(), atol=1e-5)


def test_narrowing_to_bf16_equals_torch_for_every_kind_of_fp32() -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).int()
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00008000, 0x00018000, 0x7F800001, -(2**31)]).int()
    values = torch.cat([bits, ties]).view(torch.float32)
    got = torch.from_numpy(narrow(values.numpy())).view(torch.bfloat16)
    expected = values.bfloat16()
    assert torch.equal(got.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(got.view(torch.int16)[finite], expected.view(torch.int16)[finite])


def test_an_error_in_the_worker_is_raised_here() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch\.float16"):
        interpreted("gptoss_infer.kernels.mxfp4_decode", "decode", *_one_block(), torch.float16)


def test_importing_the_package_and_decoding_on_a_cpu_never_imports_triton() -> None:
    code = """if True:
        import sys, torch, gptoss_infer.model
        from gptoss_infer import kernels
        before = "triton" in sys.modules  # torch itself may bring it
        kernels.decode(torch.zeros(1, 16, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8))
        assert not before and "triton" not in sys.modules, (before, "triton" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def _one_block() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1, 16, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
