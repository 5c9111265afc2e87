"""What the expert kernels have in common: a tile of rows times an expert's MXFP4 weights, decoded in registers.

Weights are the left operand, tokens the right one: 64 rows of weights fill a matrix instruction however few the tokens.
Sums over columns go from the first to the last, in an order that only the layer determines. Functions for kernels, not
kernels; used by `moe`, `moe_backward` and `low_rank`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scaled(pairs, factors, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply words of two bf16 by words of two equal bf16, powers of two; exact, and subnormals stay.

    NVIDIA multiplies pairs (an addition of -0 makes it an instruction that 8.0 has). Elsewhere the two halves are fp32
    whose lower bits are zero, before and after.
    """
    if PACKED:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r",
            [pairs, factors, tl.full(pairs.shape, 0x80008000, tl.uint32)],
            dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    factor = (factors & 0xFFFF0000).to(tl.float32, bitcast=True)
    high = (pairs & 0xFFFF0000).to(tl.float32, bitcast=True) * factor
    low = (pairs << 16).to(tl.float32, bitcast=True) * factor
    return (high.to(tl.uint32, bitcast=True) & 0xFFFF0000) | (low.to(tl.uint32, bitcast=True) >> 16)


@triton.jit
def tile_rows(tiles, num_tiles, tile, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return BLOCK_M rows from a tile's first on, and which of them are its own; see `routing`."""
    lane = tl.arange(0, BLOCK_M)
    return tl.load(tiles + num_tiles + tile) + lane, lane < tl.load(tiles + 2 * num_tiles + tile)


@triton.jit
def halves(pairs):  # type: ignore[no-untyped-def]
    """Return words of two bf16 as a last dimension of two."""
    low = (pairs & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, (pairs >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True))


@triton.jit
def tile_values(words, scales, SHIFT: tl.constexpr, ORDER: tl.constexpr, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Decode words (rows x 8,) and scale words (rows,) to bf16 (rows, 64); see `tiles`. Rows come as 16 n + 8 c + a.

    Every step is one on the words that a thread has: the layout is the one of a product's left operand.
    """
    ROWS: tl.constexpr = scales.shape[0]
    if ORDER == "mfma":
        w = tl.permute(tl.reshape(words, (ROWS // 16, 4, 2, 8, 2)), (0, 3, 1, 2, 4))
    else:
        w = tl.reshape(words, (ROWS // 16, 8, 4, 2, 2))  # n, a, b, c, d
    scales = tl.reshape(scales, (ROWS // 16, 8, 1, 2, 1))
    first, _ = tl.broadcast(((scales >> SHIFT) & 255) * 0x00800080, w)  # two bf16 exponents
    second, _ = tl.broadcast(((scales >> (SHIFT + 8)) & 255) * 0x00800080, w)
    two = ((w << 12) | (w >> 20)) & 0x81C081C0
    three = (((w << 10) | (w >> 22)) & 0x81808180) | ((w << 2) & 0x00400040)
    even = tl.join(halves(scaled(w & 0x81C081C0, first, PACKED)), halves(scaled(two, second, PACKED)))
    odd = tl.join(halves(scaled((w << 6) & 0x81C081C0, first, PACKED)), halves(scaled(three, second, PACKED)))
    values = tl.join(even, odd)  # n, a, b, c, d, half, then the two bits of i
    if ORDER == "wgmma":
        values = tl.permute(values, (0, 3, 1, 6, 7, 4, 2, 5))
    else:
        values = tl.permute(values, (0, 3, 1, 6, 7, 2, 4, 5))
    return tl.reshape(values, (ROWS, 64))


@triton.jit
def product(  # type: ignore[no-untyped-def]
    x, inside, words, scales, expert, block,
    OUT: tl.constexpr, IN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, ORDER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Return fp32 (BLOCK_N, BLOCK_M): rows `block` of an expert's W, as 16 n + 8 c + a, times rows of x, transposed.

    x: pointers (BLOCK_M,) to the rows' first elements; `inside` (BLOCK_M,) says which there are.
    """
    TILE_ROWS: tl.constexpr = (OUT + 63) // 64
    COLUMNS: tl.constexpr = (IN + 63) // 64
    PAIRS: tl.constexpr = (COLUMNS + 1) // 2
    at = tl.arange(0, BLOCK_N * 8)
    row = tl.arange(0, BLOCK_N)
    # Rows of tiles behind the last are the last again: what they give is not stored.
    first = expert.to(tl.int64) * TILE_ROWS
    tile = first + tl.minimum(block * (BLOCK_N // 64) + at // 512, TILE_ROWS - 1)
    words += tile * (COLUMNS * 512) + at % 512
    tile = first + tl.minimum(block * (BLOCK_N // 64) + row // 64, TILE_ROWS - 1)
    scales += tile * (PAIRS * 64) + row % 64
    k = tl.arange(0, 64)[:, None]
    x = x[None, :] + k
    inside = inside[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if STEP == 2:
        for pair in range(PAIRS):
            scale = tl.load(scales).to(tl.uint32, bitcast=True)
            w = tl.load(words).to(tl.uint32, bitcast=True)
            x_tile = tl.load(x, mask=inside & (pair * 128 + k < IN), other=0.0)
            both = pair * 2 + 1 < COLUMNS
            w_next = tl.load(words + 512, mask=both, other=0).to(tl.uint32, bitcast=True)
            x_next = tl.load(x + 64, mask=inside & (pair * 128 + 64 + k < IN), other=0.0)
            sums = tl.dot(tile_values(w, scale, 0, ORDER, PACKED), x_tile, sums)
            sums = tl.dot(tile_values(w_next, scale, 16, ORDER, PACKED), x_next, sums)
            words += 1024
            scales += 64
            x += 128
    else:
        for column in range(COLUMNS):
            scale = tl.load(scales + column // 2 * 64).to(tl.uint32, bitcast=True) >> (column % 2 * 16)
            w = tl.load(words).to(tl.uint32, bitcast=True)
            x_tile = tl.load(x, mask=inside & (column * 64 + k < IN), other=0.0)
            sums = tl.dot(tile_values(w, scale, 0, ORDER, PACKED), x_tile, sums)
            words += 512
            x += 64
    return sums


@triton.jit
def transposed_product(  # type: ignore[no-untyped-def]
    y, inside, words, scales, expert, block,
    OUT: tl.constexpr, IN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ORDER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Return fp32 (BLOCK_N, BLOCK_M): columns `block` of an expert's W, in order, times rows of y, transposed.

    The sums go over the rows of W, so a decoded tile has to be turned: it goes once through shared memory, where that
    of `product` stays in registers. Tiles of one row of tiles lie together, as they are read here too.

    y: pointers (BLOCK_M,) to the rows' first elements, of OUT; `inside` (BLOCK_M,) says which there are.
    """
    TILE_ROWS: tl.constexpr = (OUT + 63) // 64
    COLUMNS: tl.constexpr = (IN + 63) // 64
    PAIRS: tl.constexpr = (COLUMNS + 1) // 2
    at = tl.arange(0, BLOCK_N * 8)
    row = tl.arange(0, BLOCK_N)
    # Tiles behind the last are the last again: what they give is not stored.
    first = expert.to(tl.int64) * TILE_ROWS
    words += (first * COLUMNS + tl.minimum(block * (BLOCK_N // 64) + at // 512, COLUMNS - 1)) * 512 + at % 512
    column = tl.minimum(block * (BLOCK_N // 64) + row // 64, COLUMNS - 1)
    scales += (first * PAIRS + column // 2) * 64 + row % 64
    shift = (column % 2 * 16).to(tl.uint32)
    k = tl.arange(0, 64)[:, None]
    y = y[None, :] + k
    inside = inside[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for tile_row in range(TILE_ROWS):
        scale = tl.load(scales).to(tl.uint32, bitcast=True) >> shift
        w = tl.load(words).to(tl.uint32, bitcast=True)
        y_tile = tl.load(y, mask=inside & (tile_row * 64 + k < OUT), other=0.0)
        values = tl.reshape(tile_values(w, scale, 0, ORDER, PACKED), (BLOCK_N // 64, 4, 2, 8, 64))
        values = tl.reshape(tl.permute(values, (0, 4, 1, 3, 2)), (BLOCK_N, 64))  # by column, rows in order
        sums = tl.dot(values, y_tile, sums)
        words += COLUMNS * 512
        scales += PAIRS * 64
        y += 64
    return sums


@triton.jit
def checkpoint_rows(block, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the rows of W, int32 (BLOCK_N,), that a block of `product` has as 16 n + 8 c + a."""
    n = tl.arange(0, BLOCK_N)
    return block * BLOCK_N + n // 16 * 16 + n % 8 * 2 + n // 8 % 2


@triton.jit
def add_low_rank(  # type: ignore[no-untyped-def]
    sums, low, b, row, inside, num_rows, expert, n,
    OUT: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add rows n of an adapter's B (E, OUT, RANK) times low (PARTS, rows, RANK), see `low_rank`, to the sums."""
    rank = tl.arange(0, 16)
    low += row.to(tl.int64)[None, :] * RANK + rank[:, None]
    b += (expert.to(tl.int64) * OUT + n)[:, None] * RANK + rank[None, :]
    for _ in tl.range(RANK // 16, num_stages=1):  # sums and little else in registers, nothing more in shared memory
        total = tl.zeros((16, BLOCK_M), tl.float32)
        for part in tl.static_range(PARTS):
            total += tl.load(low + part * num_rows.to(tl.int64) * RANK, mask=inside[None, :], other=0.0)
        sums = tl.dot(tl.load(b, mask=(n < OUT)[:, None], other=0.0), total.to(tl.bfloat16), sums)
        low += 16
        b += 16
    return sums
