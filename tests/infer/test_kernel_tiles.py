"""Tiles hold exactly the bytes that they were made of, where the kernels look for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.kernels import tiles

ORDERS = ("wgmma", "mma", "mfma")


def random_pair(*shape: int, scales: tuple[int, int] = (0, 129)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(*scales, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(1, 64, 2), (2, 64, 4), (3, 70, 3), (1, 1, 1), (2, 192, 7), (2, 128, 6)], ids=str)
def test_unpacking_returns_every_byte_that_was_packed(shape: tuple[int, ...], order: tiles.Order) -> None:
    blocks, scales = random_pair(*shape)
    packed = tiles.pack(blocks, scales, order)
    assert (packed.out_features, packed.in_features) == (shape[1], 32 * shape[2])
    for got, expected in zip(tiles.unpack(packed), (blocks, scales), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_a_word_is_four_pairs_of_bf16_at_the_documented_bits_and_places(order: tiles.Order) -> None:
    """Worked out word by word with Python integers, from the module's description alone."""
    blocks, scales = random_pair(1, 128, 4)
    packed = tiles.pack(blocks, scales, order)
    values = mxfp4.decode(blocks, torch.full_like(scales, 127), torch.float32)[0]  # (128, 128), codes only
    mask = 0xFFFFFFFF
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        tile_row, tile_column, n, a, b, c, d = (
            int(torch.randint(size, (), generator=generator)) for size in (2, 2, 4, 8, 4, 2, 2)
        )
        place = (((n * 8 + a) * 4 + b) * 2 + c) * 2 + d
        if order == "mfma":
            place = (((n * 4 + b) * 2 + c) * 8 + a) * 2 + d
        q = b + 4 * d if order == "wgmma" else 2 * b + d
        word = int(packed.words[0, tile_row, tile_column, place]) & mask
        twelve, ten = (((word << by) | (word >> (32 - by))) & mask for by in (12, 10))
        pairs = [word & 0x81C081C0, (word << 6) & 0x81C081C0, twelve & 0x81C081C0]
        pairs.append((ten & 0x81808180) | ((word << 2) & 0x00400040))
        row = 64 * tile_row + 16 * n + 2 * a + c
        for i, pair in enumerate(pairs):
            for half in range(2):
                bits = pair >> 16 * half & 0xFFFF
                value = torch.tensor(bits << 16 if bits < 2**15 else (bits << 16) - 2**32).int().view(torch.float32)
                column = 64 * tile_column + 16 * i + 2 * q + half
                assert float(value) * 2.0**126 == float(values[row, column])


def test_a_scale_word_holds_four_exponents_of_a_row_in_order() -> None:
    blocks, scales = random_pair(1, 64, 5)
    packed = tiles.pack(blocks, scales, "mma")
    assert packed.scales.shape == (1, 1, 2, 64)
    for n in range(4):
        for a in range(8):
            for c in range(2):
                row = [*(scales[0, 16 * n + 2 * a + c].int() + 126).tolist(), 0, 0, 0]  # 3 columns fill up
                for half in range(2):
                    word = int(packed.scales[0, 0, half, (n * 8 + a) * 2 + c]) & 0xFFFFFFFF
                    assert list(word.to_bytes(4, "little")) == row[4 * half : 4 * half + 4]


def test_tiles_of_gpt_oss_shapes_are_no_larger_than_its_blocks_and_hold_scales_with_one_byte_in_46_to_spare() -> None:
    made = tiles.empty(1, 5760, 2880, "wgmma", device="meta")
    assert made.words.numel() * 4 == 5760 * 2880 // 2
    assert made.scales.numel() * 4 == 5760 * 92  # 90 blocks


def test_a_scale_byte_that_a_bf16_exponent_cannot_hold_is_refused_with_the_cure() -> None:
    blocks, scales = random_pair(3, 64, 2)
    scales[1, 5, 1] = 128
    tiles.pack(blocks, scales, "mma")
    scales[1, 5, 1] = 129
    with pytest.raises(ValueError, match=r"expert 1 has scale byte 129, weights of up to 24; .*from its MXFP4 blocks"):
        tiles.pack(blocks, scales, "mma")
    with pytest.raises(ValueError, match=r"expected \(E, out, G\)"):
        tiles.pack(blocks[0], scales[0], "mma")


def test_packing_to_another_device_moves_one_expert_at_a_time() -> None:
    packed = tiles.pack(*random_pair(2, 64, 2), "mma", device="cpu")
    assert packed.words.device.type == "cpu"
    assert packed.words.dtype == torch.int32
