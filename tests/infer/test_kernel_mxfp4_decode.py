"""The Triton MXFP4 decode against its reference: interpreted, and run where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted
from torch import Tensor

from gptoss_infer import kernels, mxfp4

pytest.importorskip("triton", reason="Triton is not installed here (it comes with torch on Linux)")

MODULE = "gptoss_infer.kernels.mxfp4_decode"
DTYPES = (torch.bfloat16, torch.float32)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and torch sees none")


def every_byte_at_every_scale() -> tuple[Tensor, Tensor]:
    """(256, 16, 16) and (256, 16): row s holds all 256 bytes at scale byte s."""
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(256, 16, 16).contiguous()
    return blocks, torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()


def random_pair(*shape: int, scales: tuple[int, int] = (0, 256)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(*scales, shape, generator=generator, dtype=torch.uint8)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert torch.equal(got.isnan(), expected.isnan())  # what bits a NaN has, nothing says
    integer = torch.int16 if got.dtype == torch.bfloat16 else torch.int32
    numbers = ~expected.isnan()
    assert torch.equal(got.view(integer)[numbers], expected.view(integer)[numbers])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_at_every_scale_decodes_to_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    pair = every_byte_at_every_scale()
    expected = mxfp4.decode(*pair, dtype)
    assert (expected != 0).logical_and(expected.abs() < torch.finfo(dtype).tiny).any(), "no subnormal among the values"
    assert expected.isinf().any()
    assert torch.signbit(expected[expected == 0]).any(), "no -0 among the values"
    assert_same_bits(interpreted(MODULE, "decode", *pair, dtype), expected)


@pytest.mark.parametrize("shape", [(1,), (127,), (128,), (129,), (3, 5, 7), (2, 90), (0,), (4, 0)], ids=str)
def test_blocks_that_do_not_fill_the_last_tile_decode_as_the_reference_does(shape: tuple[int, ...]) -> None:
    pair = random_pair(*shape)
    for dtype in DTYPES:
        assert_same_bits(interpreted(MODULE, "decode", *pair, dtype), mxfp4.decode(*pair, dtype))


@pytest.mark.parametrize("count", [1, 130])
def test_the_last_tile_writes_nothing_behind_the_last_block(count: int) -> None:
    words = interpreted("kernel_probes", "decode_beside_canaries", *random_pair(count, scales=(100, 150)))
    assert (words[count:] == 7).all()
    assert (words[:count] != 7).all()


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        (torch.zeros(2, 16), torch.zeros(2, dtype=torch.uint8), "expected uint8"),
        (torch.zeros(2, 15, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8), "do not match"),
        (torch.zeros(3, 16, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8), "do not match"),
    ],
)
def test_what_the_reference_refuses_the_kernel_refuses_with_the_same_words(
    blocks: Tensor, scales: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as reference:
        mxfp4.decode(blocks, scales)
    with pytest.raises(ValueError, match=message) as kernel:
        interpreted(MODULE, "decode", blocks, scales)
    assert str(kernel.value) == str(reference.value)


def test_cpu_tensors_go_to_the_reference_in_every_dtype_it_has() -> None:
    pair = random_pair(5, scales=(0, 255))
    for dtype in (*DTYPES, torch.float64):
        assert torch.equal(kernels.decode(*pair, dtype), mxfp4.decode(*pair, dtype))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_every_byte_at_every_scale_decodes_to_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    pair = every_byte_at_every_scale()
    on_gpu = kernels.decode(*(tensor.cuda() for tensor in pair), dtype)
    assert_same_bits(on_gpu.cpu(), mxfp4.decode(*pair, dtype))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_odd_sizes_and_strided_tensors_decode_as_the_reference_does(dtype: torch.dtype) -> None:
    for shape in ((1,), (129,), (3, 5, 7), (0,), (5760, 90)):
        blocks, scales = (tensor.cuda() for tensor in random_pair(*shape))
        assert_same_bits(kernels.decode(blocks, scales, dtype), mxfp4.decode(blocks, scales, dtype))
    blocks, scales = (tensor.cuda() for tensor in random_pair(8, 6))
    strided = blocks.transpose(0, 1), scales.transpose(0, 1)
    assert_same_bits(kernels.decode(*strided, dtype), mxfp4.decode(*strided, dtype))


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_blocks_behind_two_gib_are_decoded() -> None:
    count = 2**27 + 5  # 2 GiB of blocks, 8 GiB of values
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    blocks = torch.full((count, 16), 0x22, dtype=torch.uint8, device="cuda")  # code 2 is 1.0
    values = kernels.decode(blocks, torch.full((count,), 127, dtype=torch.uint8, device="cuda"))
    assert bool((values[-4096:] == 1).all())
    assert bool((values[:4096] == 1).all())
