"""MXFP4 against the specification's tables, hand-written values, transformers' decoder and a brute-force search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptoss_infer.mxfp4 import decode, encode, pack

# OCP Microscaling Formats (MX) v1.0, FP4 E2M1: sign, two exponent bits with bias 1, one mantissa bit.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
GRID = np.array(E2M1[:8])


def all_bytes_at(scale: int) -> tuple[Tensor, Tensor]:
    """16 blocks that hold all 256 bytes, at one scale byte."""
    return torch.arange(256, dtype=torch.uint8).view(16, 16), torch.full((16,), scale, dtype=torch.uint8)


def one_code_per_block(scale: int) -> tuple[Tensor, Tensor]:
    """16 blocks, the n-th of code n throughout: blocks whose largest value is small at their scale."""
    code = torch.arange(16, dtype=torch.uint8)
    return (code | code << 4)[:, None].expand(16, 16).contiguous(), torch.full((16,), scale, dtype=torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal values and equal signs of zero."""
    return torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


def codes_of(blocks: Tensor) -> Tensor:
    return torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)


def block_of(*values: float, fill: float = 0.0) -> Tensor:
    return torch.tensor([*values, *[fill] * (32 - len(values))])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_byte_at_every_scale_decodes_as_the_specifications_tables_say(dtype: torch.dtype) -> None:
    pairs = [value for byte in range(256) for value in (E2M1[byte & 15], E2M1[byte >> 4])]
    for scale in range(255):
        expected = torch.tensor([value * 2.0 ** (scale - 127) for value in pairs], dtype=torch.float64).to(dtype)
        assert same(decode(*all_bytes_at(scale), dtype).flatten(), expected), scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scale_byte_255_makes_every_value_of_its_block_nan_and_of_no_other(dtype: torch.dtype) -> None:
    blocks, scales = all_bytes_at(127)
    scales[3] = 255
    values = decode(blocks, scales, dtype).view(16, 32)
    assert values[3].isnan().all()
    assert not values[[0, 1, 2, *range(4, 16)]].isnan().any()


def test_only_magnitudes_of_two_to_the_128_and_more_overflow_in_bf16_and_fp32() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        values = {scale: decode(*one_code_per_block(scale), dtype)[::32].tolist()[:8] for scale in (252, 253, 254)}
        assert values[252] == [value * 2.0**125 for value in GRID]
        assert values[253] == [*(value * 2.0**126 for value in GRID[:6]), np.inf, np.inf]
        assert values[254] == [*(value * 2.0**127 for value in GRID[:4]), np.inf, np.inf, np.inf, np.inf]


def test_the_low_nibble_is_the_even_element() -> None:
    values = decode(torch.tensor([[0x21] + [0] * 15], dtype=torch.uint8), torch.tensor([127], dtype=torch.uint8))
    assert values[:3].tolist() == [0.5, 1.0, 0.0]


def test_decoding_agrees_with_transformers_on_random_blocks() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 5, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(60, 190, (3, 10, 5), generator=generator, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales)  # (experts, in, out)
    assert torch.equal(decode(blocks, scales).transpose(1, 2), expected)


@pytest.mark.parametrize(("dtype", "last"), [(torch.float64, 254), (torch.float32, 252), (torch.bfloat16, 252)])
def test_encoding_decoded_values_returns_the_same_values_for_all_codes_and_scales(
    dtype: torch.dtype, last: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in range(last + 1):
        random = torch.randint(0, 256, (8, 16), generator=generator, dtype=torch.uint8)
        for blocks, scales in (
            all_bytes_at(scale),
            one_code_per_block(scale),
            (random, torch.full((8,), scale, dtype=torch.uint8)),
        ):
            values = decode(blocks, scales, dtype)
            assert same(decode(*encode(values), dtype), values), scale


def test_ties_go_to_the_even_code_on_both_sides_of_zero() -> None:
    # 6 fixes the scale at 1; the 0.5s and 1.5s make the next larger scale worse.
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    weights = block_of(6.0, *ties, *(-tie for tie in ties), 1.5, 1.5, fill=0.5)
    blocks, scales = encode(weights)
    assert scales.tolist() == [127]
    rounded = decode(blocks, scales, torch.float32)
    assert rounded[1:15].tolist() == [*expected, *(-value for value in expected)]
    assert (codes_of(blocks)[1:8] % 2 == 0).all()


def test_values_between_two_codes_go_to_the_nearer_one() -> None:
    weights = block_of(6.0, 0.2, 0.3, 0.7, 0.8, 1.2, 1.3, 1.7, 1.8, 2.4, 2.6, 3.4, 3.6, 4.9, 5.1, 1.5, fill=0.5)
    rounded = decode(*encode(weights), torch.float32)
    assert rounded[1:15].tolist() == [0.0, 0.5, 0.5, 1.0, 1.0, 1.5, 1.5, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 6.0]


def test_a_value_above_six_saturates_where_the_larger_scale_would_cost_the_rest_more() -> None:
    blocks, scales = encode(block_of(7.5, -7.9, fill=0.5))
    assert scales.tolist() == [127]
    assert decode(blocks, scales, torch.float32)[:3].tolist() == [6.0, -6.0, 0.5]


def test_the_larger_scale_is_taken_where_saturation_would_cost_more() -> None:
    blocks, scales = encode(block_of(*[7.9] * 32))
    assert scales.tolist() == [128]
    assert decode(blocks, scales, torch.float32).tolist() == [8.0] * 32


def test_zero_blocks_get_scale_byte_0_or_keep_that_of_like() -> None:
    blocks, scales = encode(torch.zeros(2, 32))
    assert (scales.tolist(), blocks.any().item()) == ([[0], [0]], False)
    like = torch.zeros(2, 1, 16, dtype=torch.uint8), torch.tensor([[7], [200]], dtype=torch.uint8)
    assert torch.equal(encode(torch.zeros(2, 32), like=like)[1], like[1])


def test_the_sign_of_zero_and_of_what_rounds_to_zero_is_kept() -> None:
    weights = block_of(6.0, -0.0, 0.0, -0.1, 0.1, 1.5, fill=0.5)
    rounded = decode(*encode(weights), torch.float32)
    assert rounded[1:5].tolist() == [0.0] * 4
    assert torch.signbit(rounded[1:5]).tolist() == [True, False, True, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_without_a_code_is_refused_with_its_count(bad: float) -> None:
    weights = torch.ones(4, 64)
    weights[2, 5] = bad
    with pytest.raises(ValueError, match="1 of 256 values are NaN or infinite"):
        encode(weights)


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    blocks, scales = all_bytes_at(127)
    with pytest.raises(ValueError, match="last dimension is 33"):
        encode(torch.ones(33))
    with pytest.raises(ValueError, match="do not match"):
        decode(blocks[:, :8], scales)
    with pytest.raises(ValueError, match="expected uint8"):
        decode(blocks, scales.int())
    with pytest.raises(ValueError, match="`like` has scales of shape"):
        encode(torch.ones(4, 32), like=(blocks, scales))


def test_with_like_unchanged_blocks_keep_bytes_that_no_encoder_would_choose() -> None:
    # Values of codes 0..3 alone fit a smaller scale as well; some blocks of published checkpoints are of that kind.
    generator = torch.Generator().manual_seed(0)
    blocks = pack(torch.randint(0, 4, (64, 32), generator=generator, dtype=torch.uint8))
    like = blocks, torch.full((64,), 130, dtype=torch.uint8)
    values = decode(*like, torch.float32)
    assert not torch.equal(encode(values)[1], like[1]), "the example is no example"
    kept = encode(values, like=like)
    assert torch.equal(kept[0], like[0])
    assert torch.equal(kept[1], like[1])


def test_with_like_only_the_blocks_that_changed_get_new_bytes() -> None:
    generator = torch.Generator().manual_seed(1)
    like = (
        torch.randint(0, 256, (8, 4, 16), generator=generator, dtype=torch.uint8),
        torch.randint(118, 126, (8, 4), generator=generator, dtype=torch.uint8),
    )
    weights = decode(*like, torch.float32)
    weights[3, 40] += 0.75  # row 3, block 1
    weights[6, 96:] *= 1.3  # row 6, block 3
    blocks, scales = encode(weights, like=like)
    changed = (blocks != like[0]).any(-1) | (scales != like[1])
    assert changed.nonzero().tolist() == [[3, 1], [6, 3]]


def test_with_like_a_changed_block_keeps_its_scale_if_that_fits_as_well() -> None:
    values = block_of(3.0, 1.0, 2.0)  # exact at scale 1 and at scale 1/2
    assert encode(values)[1].tolist() == [126]
    like = pack(torch.zeros(1, 32, dtype=torch.uint8)), torch.tensor([127], dtype=torch.uint8)
    blocks, scales = encode(values, like=like)
    assert scales.tolist() == [127]
    assert torch.equal(decode(blocks, scales, torch.float32), values)


def test_with_like_a_nan_block_is_encoded_anew() -> None:
    like = torch.zeros(1, 16, dtype=torch.uint8), torch.tensor([255], dtype=torch.uint8)
    blocks, scales = encode(block_of(1.0, 2.0), like=like)
    assert decode(blocks, scales, torch.float32)[:2].tolist() == [1.0, 2.0]


def test_encoding_in_chunks_equals_encoding_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(7, 5 * 32, generator=torch.Generator().manual_seed(0))
    blocks, scales = encode(weights)
    monkeypatch.setattr("gptoss_infer.mxfp4.CHUNK_BLOCKS", 4)
    assert torch.equal(encode(weights)[0], blocks)
    for row in range(7):
        assert torch.equal(encode(weights[row])[1], scales[row])


def errors_on_grid(values: np.ndarray, scale: int) -> np.ndarray:
    """Distance of each value to the nearest representable one at a scale byte, in fp64."""
    representable = np.concatenate([-GRID, GRID]) * 2.0 ** (scale - 127)
    return np.abs(values[:, None] - representable).min(axis=1)


exponents = st.integers(-60, 60)
elements = st.one_of(
    st.floats(-8, 8, width=32, allow_subnormal=False),
    st.sampled_from([0.0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, -0.25, -2.5, -5.0]),
)


@settings(max_examples=300, deadline=None)
@given(values=st.lists(elements, min_size=32, max_size=32), exponent=exponents, like_scale=st.integers(40, 200))
def test_no_representable_value_on_a_candidate_grid_is_nearer_than_the_chosen_one(
    values: list[float], exponent: int, like_scale: int
) -> None:
    weights = torch.tensor(values, dtype=torch.float64) * 2.0**exponent
    like = torch.full((1, 16), 0x11, dtype=torch.uint8), torch.tensor([like_scale], dtype=torch.uint8)
    for given_like in (None, like):
        blocks, scales = encode(weights, like=given_like)
        chosen = int(scales[0])
        error = (decode(blocks, scales, torch.float64) - weights).abs().numpy()
        assert (error == errors_on_grid(weights.numpy(), chosen)).all()
        largest = float(weights.abs().max())
        if largest == 0:
            continue
        first = max(0, int(np.floor(np.log2(largest))) - 2 + 127)
        candidates = [first, first + 1] + ([like_scale] if given_like is not None else [])
        assert chosen in candidates
        best = min((errors_on_grid(weights.numpy(), scale) ** 2).sum() for scale in candidates)
        assert (error**2).sum() <= best * (1 + 1e-12)
