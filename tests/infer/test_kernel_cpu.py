"""The CPU's kernels against definitions in fp64, at every level this machine runs; rows alone and in batches."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from oracles import slow_decode
from torch import Tensor

from gptoss_infer.errors import MachineError
from gptoss_infer.kernels.cpu import DTYPES as DTYPE_CODES
from gptoss_infer.kernels.cpu import Affine, Kernels, LowRank, Packed, Pages, Places, build

DTYPES = tuple(DTYPE_CODES)
# Half a unit in the last place, and the rounding of an fp32 sum of up to 3,000 terms, each relative to what is summed.
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-24}
SUMMING = 3000**0.5 * 2**-23
TARGETS = {"native": build.THIS_CPU, "avx2": ("-march=x86-64-v3",), "sse": ("-march=x86-64-v2",)}
NEEDED_FLAGS = {"native": set(), "avx2": {"avx2", "fma", "bmi2"}, "sse": {"ssse3", "sse4_2"}}


@functools.cache
def kernels_for(level: str) -> Kernels | str:
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    if not NEEDED_FLAGS[level] <= flags:
        return f"this CPU lacks {sorted(NEEDED_FLAGS[level] - flags)}"
    try:
        return Kernels(TARGETS[level])
    except MachineError as error:
        return str(error)


@pytest.fixture(params=TARGETS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    found = kernels_for(request.param)
    if isinstance(found, str):
        pytest.skip(f"no kernels for {request.param}: {found}")
    return found


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * size).to(dtype)


def assert_close(got: Tensor, expected: Tensor, summed: Tensor | float, steps: int = 1) -> None:
    """`expected` is fp64; `summed` what the magnitudes of a sum's terms add up to; `steps` roundings to the dtype."""
    assert got.shape == expected.shape
    error = (got.double() - expected).abs()
    allowed = steps * ROUNDING[got.dtype] * (expected.abs() + (summed if steps > 1 else 0)) + SUMMING * summed
    assert (error <= allowed).all(), f"largest excess {((error - allowed).max()).item()}"


SIZES = [(1, 7, 32), (1, 201, 256), (2, 130, 8), (3, 33, 100), (4, 16, 2880), (5, 1, 31), (17, 96, 64), (70, 100, 48)]


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("rank", [0, 3])
def test_products_with_bias_and_lora_equal_fp64(
    kernels: Kernels, dtype: torch.dtype, m: int, n: int, k: int, rank: int
) -> None:
    x, weight, bias = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype), randn(n, dtype=dtype)
    a, b = randn(rank, k, dtype=dtype, size=k**-0.5), randn(n, rank, dtype=dtype)
    lora = LowRank(a, b) if rank else None
    low = (x.double() @ a.double().T).to(dtype).double()  # the factors' product is an input of the second one, rounded
    expected = x.double() @ weight.double().T + bias.double() + low @ b.double().T
    terms = x.double().abs() @ weight.double().abs().T + bias.double().abs() + 2 * low.abs() @ b.double().abs().T
    rounding = (low.abs() * 2 * ROUNDING[dtype]) @ b.double().abs().T  # of `low`, which fp64 may round the other way
    assert_close(kernels.linear(x, Affine(weight, bias, lora)), expected, terms + rounding / SUMMING)
    wide = kernels.linear(x, Affine(weight, None, lora), torch.float32)
    assert_close(wide, expected - bias.double(), terms + rounding / SUMMING)


def test_a_product_is_the_same_bits_alone_or_in_any_batch_by_any_number_of_threads(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    x, weight, bias = randn(70, 100, dtype=dtype), randn(201, 100, dtype=dtype), randn(201, dtype=dtype)
    with threads(2):
        whole = kernels.linear(x, Affine(weight, bias))
    for size in (1, 2, 3, 4, 5, 7, 16, 33):
        parts = [kernels.linear(part.contiguous(), Affine(weight, bias)) for part in x.split(size)]
        assert torch.equal(torch.cat(parts), whole), size


class Moe:
    """Experts with random bytes, and what they compute by definition in fp64."""

    def __init__(
        self,
        experts: int,
        hidden: int,
        inter: int,
        dtype: torch.dtype,
        rank: int = 0,
        scales: tuple[int, int] = (118, 124),
    ) -> None:
        self.experts, self.dtype, self.activation = experts, dtype, (1.702, 7.0)
        self.projections = [self._random(*shape, rank, scales) for shape in ((2 * inter, hidden), (hidden, inter))]

    def _random(self, out: int, features: int, rank: int, scales: tuple[int, int]) -> Packed:
        generator = torch.Generator().manual_seed(out + features)
        shape = (self.experts, out, features // 32)
        lora = None
        if rank:
            a = randn(self.experts, rank, features, dtype=self.dtype, size=features**-0.5)
            lora = LowRank(a, randn(self.experts, out, rank, dtype=self.dtype, size=0.3))
        return Packed(
            torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8),
            torch.randint(*scales, shape, generator=generator, dtype=torch.uint8),
            randn(self.experts, out, dtype=self.dtype),
            lora,
        )

    def expected(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float64)
        alpha, limit = self.activation
        for e in range(self.experts):
            tokens, slots = (chosen == e).nonzero(as_tuple=True)
            pre = self._project(0, e, x[tokens].double())
            gate, up = pre[:, 0::2].clamp(max=limit), pre[:, 1::2].clamp(-limit, limit)
            y = self._project(1, e, gate * torch.sigmoid(alpha * gate) * (up + 1))
            out.index_add_(0, tokens, y * weights[tokens, slots].double()[:, None])
        return out

    def _project(self, which: int, e: int, x: Tensor) -> Tensor:
        packed = self.projections[which]
        dense = slow_decode(packed.blocks[e], packed.scales[e]).double()
        if packed.lora is not None:
            dense = dense + packed.lora.b[e].double() @ packed.lora.a[e].double()
        return x @ dense.T + packed.bias[e].double()

    def run(self, kernels: Kernels, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return kernels.experts(x, weights, chosen, *self.projections, self.activation)


def routed(tokens: int, experts: int, k: int) -> tuple[Tensor, Tensor]:
    """Random choices of all experts but number 1, which stays empty."""
    generator = torch.Generator().manual_seed(tokens)
    open_to = torch.tensor([e for e in range(experts) if e != 1])
    chosen = torch.stack([open_to[torch.randperm(len(open_to), generator=generator)[:k]] for _ in range(tokens)])
    return torch.rand(tokens, k, generator=generator).softmax(-1), chosen


MOE_CASES = [(1, 8, 4, 64, 96), (3, 6, 2, 96, 32), (9, 3, 1, 32, 160), (64, 8, 4, 64, 96), (130, 4, 2, 160, 64)]


@pytest.mark.parametrize(("tokens", "experts", "k", "hidden", "inter"), MOE_CASES)
@pytest.mark.parametrize("rank", [0, 3])
def test_experts_with_biases_and_lora_equal_their_definition(
    kernels: Kernels, dtype: torch.dtype, tokens: int, experts: int, k: int, hidden: int, inter: int, rank: int
) -> None:
    moe = Moe(experts, hidden, inter, dtype, rank)
    x, (weights, chosen) = randn(tokens, hidden, dtype=dtype), routed(tokens, experts, k)
    got, expected = moe.run(kernels, x, weights, chosen), moe.expected(x, weights, chosen)
    # Hidden values and LoRA products are rounded to the dtype on the way; their errors average out in the sum.
    steps = 8 * ROUNDING[dtype] + SUMMING
    assert (got.double() - expected).norm() <= steps * expected.norm()


def test_experts_give_a_token_the_same_bits_alone_or_in_any_batch(kernels: Kernels, dtype: torch.dtype) -> None:
    moe = Moe(6, 64, 96, dtype, rank=3)
    x, (weights, chosen) = randn(70, 64, dtype=dtype), routed(70, 6, 3)
    with threads(2):
        whole = moe.run(kernels, x, weights, chosen)
    for size in (1, 2, 5, 16, 33):
        slices = [slice(start, start + size) for start in range(0, 70, size)]
        parts = [moe.run(kernels, x[s].contiguous(), weights[s].contiguous(), chosen[s].contiguous()) for s in slices]
        assert torch.equal(torch.cat(parts), whole), size


def test_every_byte_at_every_scale_is_decoded_exactly(kernels: Kernels, dtype: torch.dtype) -> None:
    """Hidden values are a unit vector, so that the result is a column of down_proj."""
    scales = torch.arange(4, 250, dtype=torch.uint8)  # of normal numbers: AVX512_BF16 takes others for 0
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(len(scales), 1).view(1, -1, 1, 16)
    hidden = blocks.shape[1]
    down = Packed(blocks, scales.repeat_interleave(16).view(1, -1, 1), torch.zeros(1, hidden, dtype=dtype))
    expected = slow_decode(down.blocks[0], down.scales[0])  # (hidden, 32)
    nothing = (
        torch.zeros(1, 64, hidden // 32, 16, dtype=torch.uint8),
        torch.zeros(1, 64, hidden // 32, dtype=torch.uint8),
    )
    for column in range(32):
        bias = torch.zeros(1, 64)
        bias[0, 0::2], bias[0, 1::2], bias[0, 2 * column + 1] = 2, -1, 0  # 2 sigmoid(0) (up + 1) is 0, and once 1
        gate_up = Packed(*nothing, bias.to(dtype))
        x, weights, chosen = torch.zeros(1, hidden, dtype=dtype), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
        got = kernels.experts(x, weights, chosen, gate_up, down, (0.0, 7.0))[0].float()
        assert torch.equal(got, expected[:, column])


class Cache:
    """Sequences of random keys and values in shuffled pages, and attention by definition in fp64."""

    def __init__(
        self, heads: int, kv: int, d: int, page: int, dtype: torch.dtype, lengths: list[int], new: list[int]
    ) -> None:
        self.page, self.lengths, self.new, self.heads = page, lengths, new, heads
        generator = torch.Generator().manual_seed(page)
        self.history = [tuple(torch.randn(n, kv, d, generator=generator).to(dtype) for _ in range(2)) for n in lengths]
        self.q = torch.randn(sum(new), heads, d, generator=generator).to(dtype)
        self.sinks = torch.randn(heads, generator=generator).to(dtype)
        counts = [-(-n // page) for n in lengths]
        numbers = torch.randperm(sum(counts) + 3, generator=generator)
        self.pages = [part.tolist() for part in numbers[: sum(counts)].split(counts)]
        self.pools = tuple(torch.full((len(numbers), kv, page, d), torch.nan).to(dtype) for _ in range(2))
        for which in range(2):
            for tensors, pages, n, fresh in zip(self.history, self.pages, lengths, new, strict=True):
                for position in range(n - fresh):
                    self.pools[which][pages[position // page], :, position % page] = tensors[which][position]

    def run(self, kernels: Kernels, window: int, rows: slice = slice(None)) -> Tensor:
        """Attend from the new tokens `rows` of all; a window layer's pages begin with the first one seen."""
        sequences = torch.tensor([s for s, fresh in enumerate(self.new) for _ in range(fresh)])
        positions = torch.cat([torch.arange(n - fresh, n) for n, fresh in zip(self.lengths, self.new, strict=True)])
        first = [
            max(0, n - fresh - window + 1) // self.page if window else 0
            for n, fresh in zip(self.lengths, self.new, strict=True)
        ]
        held = [pages[start:] for pages, start in zip(self.pages, first, strict=True)]
        longest = max(map(len, held))
        table = torch.tensor([pages + [0] * (longest - len(pages)) for pages in held])
        k, v = (
            torch.cat([t[which][n - fresh :] for t, n, fresh in zip(self.history, self.lengths, self.new, strict=True)])
            for which in range(2)
        )
        places = Places(sequences[rows].contiguous(), positions[rows].contiguous())
        pages = Pages(table, torch.tensor(first))
        return kernels.attention(
            self.q[rows].contiguous(),
            k[rows].contiguous(),
            v[rows].contiguous(),
            self.sinks,
            self.pools,
            places,
            pages,
            window,
        )

    def expected(self, window: int) -> Tensor:
        parts, start = [], 0
        for (k, v), n, fresh in zip(self.history, self.lengths, self.new, strict=True):
            q = self.q[start : start + fresh].double()
            start += fresh
            k, v = (x.double().repeat_interleave(self.heads // x.shape[1], dim=1) for x in (k, v))
            distance = torch.arange(n - fresh, n)[:, None] - torch.arange(n)
            seen = (distance >= 0) & ((distance < window) if window else True)
            scores = torch.einsum("thd,shd->hts", q, k) * q.shape[2] ** -0.5
            sink = self.sinks.double().view(-1, 1, 1).expand(-1, fresh, 1)
            weights = torch.cat([scores.masked_fill(~seen, -torch.inf), sink], -1).softmax(-1)[..., :-1]
            parts.append(torch.einsum("hts,shd->thd", weights, v))
        return torch.cat(parts)


ATTENTION_CASES = {
    "one_token": (4, 2, 16, 64, [1], [1]),
    "groups_of_3": (9, 3, 16, 16, [40, 1, 17], [1, 1, 5]),
    "groups_of_8": (16, 2, 64, 64, [300, 65, 64, 63], [1, 1, 1, 63]),
    "beyond_a_split": (4, 1, 64, 64, [1100, 513], [1, 2]),
    "one_long": (2, 1, 24, 128, [1600], [1]),
    "odd_pages": (6, 2, 40, 48, [200, 97], [3, 1]),
    "large_pages": (4, 2, 16, 96, [250], [7]),
}


@pytest.mark.parametrize("window", [0, 1, 16, 64, 128, 600])
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_over_pages_equals_the_dense_softmax(
    kernels: Kernels, dtype: torch.dtype, case: str, window: int
) -> None:
    heads, kv, d, page, lengths, new = ATTENTION_CASES[case]
    cache = Cache(heads, kv, d, page, dtype, lengths, new)
    got, expected = cache.run(kernels, window), cache.expected(window)
    # Scores are exact to fp32's rounding, so are weights; values average to at most their largest.
    assert ((got.double() - expected).abs() <= ROUNDING[dtype] * expected.abs() + 2**-17).all()


@pytest.mark.parametrize("case", ["groups_of_3", "groups_of_8", "beyond_a_split"])
def test_attention_gives_a_token_the_same_bits_alone_or_in_any_batch(
    kernels: Kernels, dtype: torch.dtype, case: str
) -> None:
    heads, kv, d, page, lengths, new = ATTENTION_CASES[case]
    cache = Cache(heads, kv, d, page, dtype, lengths, new)
    for window in (0, 128):
        with threads(2):
            whole = cache.run(kernels, window)
        alone = [cache.run(kernels, window, slice(row, row + 1)) for row in range(sum(new))]
        assert torch.equal(torch.cat(alone), whole)


def test_norms_rotations_and_choices_equal_their_definitions(kernels: Kernels, dtype: torch.dtype) -> None:
    for n, c in ((1, 33), (5, 256), (70, 2880)):
        x, weight = randn(n, c, dtype=dtype), randn(c, dtype=torch.float32)
        expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        assert_close(kernels.rms_norm(x, weight, 1e-5), expected, expected.abs())
    for n, heads, d in ((1, 3, 16), (7, 8, 64), (70, 2, 24)):
        x, angles = randn(n, heads, d, dtype=dtype), randn(n, d // 2, dtype=torch.float32) * 10
        cos, sin = angles.cos(), angles.sin()
        first, second = x.double().chunk(2, -1)
        c, s = cos.double()[:, None], sin.double()[:, None]
        expected = torch.cat([first * c - second * s, second * c + first * s], -1)
        kernels.rotate_(x, cos, sin)
        assert_close(x, expected, 4.0)
    logits = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).mul_(4).round_()  # many are equal
    weights, chosen = kernels.top_k(logits, 4)
    order = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(chosen, order.indices[:, :4])
    assert torch.allclose(weights, order.values[:, :4].softmax(-1), atol=1e-6)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 201_088])
def test_the_largest_of_a_row_is_found_the_first_of_equals(kernels: Kernels, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    rows = [
        torch.randn(size, generator=generator),
        torch.zeros(size),
        torch.arange(size).float(),
        -torch.arange(size).float(),
    ]
    rows += [torch.randint(0, 3, (size,), generator=generator).float() for _ in range(3)]
    logits = torch.stack(rows)
    expected = [row.tolist().index(row.max().item()) for row in logits]
    assert kernels.argmax(logits).tolist() == expected


def test_a_nan_is_passed_on(kernels: Kernels, dtype: torch.dtype) -> None:
    x = randn(3, 64, dtype=dtype)
    x[1, 5] = torch.nan
    weight = randn(40, 64, dtype=dtype)
    assert kernels.linear(x, Affine(weight)).isnan().all(-1).tolist() == [False, True, False]
    moe = Moe(4, 64, 32, dtype)
    weights, chosen = routed(3, 4, 2)
    assert moe.run(kernels, x, weights, chosen).isnan().all(-1).tolist() == [False, True, False]
    cache = Cache(4, 2, 16, 64, dtype, [10, 12], [1, 1])
    cache.q[1, 0, 3] = torch.nan
    assert cache.run(kernels, 0).isnan().any(-1).any(-1).tolist() == [False, True]
