"""MXFP4 weights of experts in the order in which the product kernels read them, and back. Plain torch, run at load.

A tile has 64 rows (outputs) of 64 columns (inputs): 2 KiB that lie together, tiles in order of their columns. The bytes
for a thread go from memory to its registers as the matrix instructions want them, and a word of 8 codes becomes 4 pairs
of bf16 in 9 instructions: no table, no shuffle, no second pass through shared memory.

**Words.** A word of 32 bits holds 8 codes of one row as 4 pairs. Pair i is columns 16 i + 2 q and the next, q being the
word's place. A bf16 with the code's sign at bit 15 and its other bits at 8..6 is the code's value times 2**-126 (0.5 is
a subnormal), so a pair is these bits of the two halves of a word, 0x81C081C0, and one multiplication scales both:

    pair 0: w & 0x81C081C0                        pair 1: (w << 6) & 0x81C081C0
    pair 2: rotate(w, 12) & 0x81C081C0            pair 3: rotate(w, 10) & 0x81808180 | (w << 2) & 0x00400040

The sets of bits that they take fill the word. (Four shifts of one set cannot: no translates of {15, 8, 7, 6} tile 16.)

**Order in a tile.** The word of row 16 n + 2 a + c and place q is word (n, a, b, c, d) of (4, 8, 4, 2, 2). Thread
(n, a, b) of 128 gets the words (c, d): its part of the left operand of a 64-row product with rows 16 n + 8 c + a. So
the rows of a thread are neighbours in the checkpoint: gate and up of one unit, in gate_up_proj, meet in one thread.
What differs by GPU, for its instruction's operand:

    "wgmma" (9.0)   q = b + 4 d    a thread has columns 2 b, 2 b + 1, 2 b + 8 and 2 b + 9 of 16
    "mma" (others)  q = 2 b + d    a thread has columns 4 b to 4 b + 3 of 16
    "mfma" (AMD)    as "mma", but in memory (n, b, c, a, d): the rows of a wave are its lowest lanes

**Scales.** A word holds the scales of a row for two tiles, 128 columns, lowest byte first: byte s + 126, the bf16
exponent of 2**(s - 127) times the 2**126 that codes lack. So s is at most 128 (values up to 12; `pack` refuses others).
Rows are in the order (n, a, c).

Rows and columns that fill up the last tile are zero, with scale byte 0, which multiplies by 0.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.kernels import MAX_TILED_SCALE

ROWS, COLUMNS, WORDS = 64, 64, 512  # of a tile
EXPONENT = 126  # what a scale byte has more than in MXFP4, so that bf16 exponents end at scale byte 128
Order = Literal["wgmma", "mma", "mfma"]
_PAIR_BITS = 0x81C081C0


class Tiles(NamedTuple):
    """One projection of every expert of a layer."""

    words: Tensor  # int32 (E, tiles of rows, tiles of columns, 512)
    scales: Tensor  # int32 (E, tiles of rows, half the tiles of columns, rounded up, 64)
    out_features: int
    in_features: int
    order: Order


def empty(
    num_experts: int, out_features: int, in_features: int, order: Order, device: torch.device | str = "cpu"
) -> Tiles:
    """Return tiles without values for weights (E, out, in); `in_features` is a multiple of 32."""
    rows, columns = -(-out_features // ROWS), -(-in_features // COLUMNS)
    return Tiles(
        torch.empty(num_experts, rows, columns, WORDS, dtype=torch.int32, device=device),
        torch.empty(num_experts, rows, -(-columns // 2), ROWS, dtype=torch.int32, device=device),
        out_features,
        in_features,
        order,
    )


def pack(blocks: Tensor, scales: Tensor, order: Order, device: torch.device | str | None = None) -> Tiles:
    """Bring MXFP4 weights into tiles, one expert at a time: beside the result it needs room for about eight experts.

    Args:
        blocks: uint8 (E, out, G, 16). scales: uint8 (E, out, G).
        order: of the GPU that is to read them, `tuning.ORDERS`.
        device: where the tiles go, and where the work is done; that of `blocks` if omitted.
    Raises: ValueError if shapes or dtypes disagree, or a scale byte is above 128.
    """
    mxfp4.check_pair(blocks, scales)
    if scales.dim() != 3:
        raise ValueError(f"scales have shape {tuple(scales.shape)}, expected (E, out, G)")
    num_experts, out_features, groups = scales.shape
    tiles = empty(num_experts, out_features, groups * mxfp4.BLOCK, order, device or blocks.device)
    if blocks.is_meta:  # of a plan: tiles without values
        return tiles
    for expert in range(num_experts):
        _pack_expert(blocks[expert].to(tiles.words.device), scales[expert].to(tiles.words.device), expert, tiles)
    return tiles


def unpack(tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Return blocks uint8 (E, out, G, 16) and scales uint8 (E, out, G): what `pack` was given."""
    groups = tiles.in_features // mxfp4.BLOCK
    shape = (len(tiles.words), tiles.out_features, groups)
    blocks = torch.empty(*shape, 16, dtype=torch.uint8, device=tiles.words.device)
    scales = torch.empty(shape, dtype=torch.uint8, device=tiles.words.device)
    for expert in range(shape[0]):
        rows, columns = tiles.words.shape[1:3]
        words = _by_row(tiles.words[expert], tiles.order).reshape(rows * ROWS, columns, 8)
        pairs = torch.stack(_pairs(words), dim=2)  # (rows, columns, 4, 8) int64
        nibbles = pairs >> 6 & 7 | pairs >> 12 & 8, pairs >> 22 & 7 | pairs >> 28 & 8
        of_expert = (nibbles[0] | nibbles[1] << 4).to(torch.uint8).view(rows * ROWS, columns * 2, 16)
        blocks[expert] = of_expert[: tiles.out_features, :groups]
        fields = tiles.scales[expert].view(torch.uint8).view(rows, -1, 4, 8, 2, 4)
        fields = fields.permute(0, 2, 3, 4, 1, 5).reshape(rows * ROWS, -1)
        scales[expert] = fields[: tiles.out_features, :groups] - EXPONENT
    return blocks, scales


def _pack_expert(blocks: Tensor, scales: Tensor, expert: int, tiles: Tiles) -> None:
    """Fill in one expert from (out, G, 16) and (out, G)."""
    if scales.numel() and (largest := int(scales.max())) > MAX_TILED_SCALE:
        raise ValueError(
            f"expert {expert} has scale byte {largest}, weights of up to {6 * 2.0 ** (largest - 127):.3g}; tiles hold "
            f"scale bytes up to {MAX_TILED_SCALE}: run this layer from its MXFP4 blocks"
        )
    words, packed = tiles.words[expert], tiles.scales[expert]
    rows, columns = words.shape[:2]
    missing_rows = rows * ROWS - blocks.shape[0]
    blocks = F.pad(blocks, (0, 0, 0, columns * 2 - blocks.shape[1], 0, missing_rows))
    source = blocks.view(rows * ROWS, columns, 4, 8)  # the 32 bytes of a row of a tile are (i, q)
    bits = [_byte_bits(blocks.device)[i].index_select(0, source[:, :, i].flatten().int()) for i in range(4)]
    by_row = _by_row(words, tiles.order)
    by_row.copy_((bits[0] | bits[1] | bits[2] | bits[3]).view(by_row.shape))
    fields = F.pad(scales + EXPONENT, (0, packed.shape[1] * 4 - scales.shape[1], 0, missing_rows))
    fields = fields.view(rows, 4, 8, 2, packed.shape[1], 4).permute(0, 4, 1, 2, 3, 5)
    packed.copy_(fields.contiguous().view(torch.int32).view_as(packed))


def _by_row(words: Tensor, order: Order) -> Tensor:
    """View one expert's words by row and place: (tiles of rows, n, a, c, tiles of columns, q in two dimensions)."""
    if order == "mfma":
        words = words.unflatten(-1, (4, 4, 2, 8, 2)).permute(0, 1, 2, 5, 3, 4, 6)  # n, b, c, a, d: to n, a, b, c, d
    else:
        words = words.unflatten(-1, (4, 8, 4, 2, 2))
    places = (6, 4) if order == "wgmma" else (4, 6)
    return words.permute(0, 2, 3, 5, 1, *places)


@functools.cache
def _byte_bits(device: torch.device) -> Tensor:
    """Return (4, 256) int32: what a byte, the codes of two neighbouring columns, is in a word as its pair i."""
    byte = torch.arange(256)
    table = torch.zeros(4, 256, dtype=torch.int64)
    for half in range(2):
        code = byte >> 4 * half & 15
        for bit, target in enumerate((6, 7, 8, 15)):  # of the code, and in a bf16
            target += 16 * half
            high = (target - 10) % 32 if bit else target - 2
            for pair, place in enumerate((target, target - 6, (target - 12) % 32, high)):
                table[pair] |= (code >> bit & 1) << place
    return torch.where(table >= 2**31, table - 2**32, table).to(torch.int32).to(device)


def _pairs(words: Tensor) -> list[Tensor]:
    """Return the four pairs of bf16 patterns in each word, int64, as the formulas above say."""
    w = words.long() & 0xFFFFFFFF

    def rotate(by: int) -> Tensor:
        return w << by | w >> 32 - by

    last = rotate(10) & 0x81808180 | w << 2 & 0x00400040
    return [w & _PAIR_BITS, w << 6 & _PAIR_BITS, rotate(12) & _PAIR_BITS, last]
