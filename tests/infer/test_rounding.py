"""Rounding a merge to MXFP4 against fp64 arithmetic on the specification's grid, and against what probability says."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from typing import get_args

import pytest
import torch
from torch import Tensor

from gptoss_infer.mxfp4 import pack
from gptoss_infer.rounding import Rounding, merge

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
ALL: tuple[Rounding, ...] = get_args(Rounding)
RANDOM: tuple[Rounding, ...] = ("stochastic", "systematic")
Base = tuple[Tensor, Tensor]


def codes_of(blocks: Tensor) -> Tensor:
    """Codes (out, in), the low nibble first."""
    return torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(1).long()


def scale_of(base: Base) -> Tensor:
    """Scales (out, in) in fp64."""
    return torch.exp2(base[1].double() - 127).repeat_interleave(32, dim=1)


def values_of(blocks: Tensor, scales: Tensor) -> Tensor:
    """Values (out, in) in fp64, by the tables of the specification."""
    codes = codes_of(blocks)
    return torch.where(codes >= 8, -1.0, 1.0) * GRID[codes % 8] * scale_of((blocks, scales))


def random_base(rows: int, groups: int, codes: int = 8, seed: int = 0) -> Base:
    """Random magnitudes of the first `codes` codes, both signs (-0 too), scales within a factor of 8."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.randint(0, codes, (rows, groups, 32), generator=generator)
    sign = torch.randint(0, 2, magnitude.shape, generator=generator)
    scales = torch.randint(118, 122, (rows, groups), generator=generator)
    return pack((magnitude + 8 * sign).to(torch.uint8)), scales.to(torch.uint8)


def random_delta(base: Base, size: float, seed: int = 1) -> Tensor:
    """Normal numbers with `size` scales for a standard deviation."""
    scale = scale_of(base)
    normal = torch.randn(scale.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (normal * size * scale).float()


def low_rank_delta(rows: int, columns: int, size: float) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    delta = torch.randn(rows, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
    return delta * (size / 2)


def written(base: Base, delta: Tensor, rounding: Rounding, **key: object) -> Tensor:
    """The values that a merge writes."""
    return values_of(merge(base, delta, rounding, **key), base[1])  # type: ignore[arg-type]


def neighbours(base: Base, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The representable values below and above base + delta, and the probability of the upper that is unbiased."""
    full = torch.cat([-GRID.flip(0), GRID[1:]])
    total = ((values_of(*base) + delta.double()) / scale_of(base)).clamp(-6, 6)
    lower = full[(torch.searchsorted(full, total, right=True) - 1).clamp(0, 14)]
    upper = full[torch.searchsorted(full, total).clamp(0, 14)]
    chance = torch.where(upper > lower, (total - lower) / (upper - lower), 0.0)
    return lower * scale_of(base), upper * scale_of(base), chance


@pytest.mark.parametrize("size", [0.01, 0.3, 1.0, 4.0, 20.0])
def test_nearest_is_nearest_on_the_bases_scale_with_ties_to_the_even_code(size: float) -> None:
    base = random_base(64, 4)
    delta = random_delta(base, size)
    quarter = scale_of(base) / 4  # sums on every tie, and the floats next to some of them
    delta[:32] = ((delta[:32] / quarter[:32]).round() * quarter[:32]).float()
    delta[16:24] = torch.nextafter(delta[16:24], torch.tensor(torch.inf))
    delta[24:32] = torch.nextafter(delta[24:32], torch.tensor(-torch.inf))
    total = (values_of(*base) + delta.double()) / scale_of(base)
    codes = codes_of(merge(base, delta, "nearest"))
    distance = (total.abs().clamp_max(6).unsqueeze(-1) - GRID).abs()
    best = distance.min(-1, keepdim=True).values
    even_first = (distance == best) * torch.tensor([2, 1] * 4)  # of two at one distance, the even code
    value = torch.where(codes >= 8, -1.0, 1.0) * GRID[codes % 8]
    assert torch.equal(value, torch.sign(total) * GRID[even_first.argmax(-1)])
    assert (best > 0).any()


@pytest.mark.parametrize("scale", [0, 1, 127, 253, 254])
def test_extreme_scales_are_rounded_like_others(scale: int) -> None:
    codes = torch.arange(32, dtype=torch.uint8).view(1, 1, 32)
    blocks, scales = pack(codes % 7 | codes % 2 << 3), torch.full((1, 1), 127, dtype=torch.uint8)
    delta = (torch.arange(32, dtype=torch.float64).view(1, 32) - 16) / 16
    for rounding in ALL:
        expected = merge((blocks, scales), delta.float(), rounding)
        there = blocks, torch.full_like(scales, scale)
        assert torch.equal(merge(there, (delta * scale_of(there)).float(), rounding), expected)


@pytest.mark.parametrize("rounding", RANDOM)
@pytest.mark.parametrize("size", [0.01, 0.3, 2.0])
def test_only_the_two_values_around_the_sum_are_ever_written(rounding: Rounding, size: float) -> None:
    base = random_base(16, 4, codes=5)
    delta = random_delta(base, size).clamp(-4 * scale_of(base).float(), 4 * scale_of(base).float())  # nothing clips
    lower, upper, _ = neighbours(base, delta)
    seen = torch.stack([written(base, delta, rounding, seed=seed) for seed in range(50)])
    assert ((seen == lower) | (seen == upper)).all()
    assert (seen == lower).any(0).logical_and((seen == upper).any(0)).any(), "nothing was random"


@pytest.mark.parametrize("rounding", RANDOM)
def test_what_is_written_is_the_sum_on_average(rounding: Rounding) -> None:
    base = random_base(8, 3, codes=5)
    delta = random_delta(base, 0.4).clamp(-2 * scale_of(base).float(), 2 * scale_of(base).float())
    lower, upper, chance = neighbours(base, delta)
    draws = 1500
    ups = sum((written(base, delta, rounding, seed=seed) == upper).double() for seed in range(draws))
    drawn = (upper > lower) & (chance > 0.02) & (chance < 0.98)
    z = ((ups / draws - chance) / (chance * (1 - chance) / draws).sqrt())[drawn]
    # Standard normal: 5 is beyond what one of 768 reaches in 2,000 runs; the mean square of n is 1 +- sqrt(2 / n).
    assert z.abs().max() < 5
    assert abs(float(z.square().mean()) - 1) < 5 * (2 / len(z)) ** 0.5
    assert (ups[chance == 0] == draws).all()  # lower is upper


@pytest.mark.parametrize("rounding", RANDOM)
def test_deltas_of_a_ten_thousandth_of_a_step_are_not_lost(rounding: Rounding) -> None:
    base = random_base(256, 64, codes=6)
    step = scale_of(base) / 2  # at least: the delta is a ten-thousandth of half the scale
    delta = (1e-4 * step * torch.where(torch.arange(2048) % 9 == 0, -1, 1)).float()
    lower, upper, chance = neighbours(base, delta)
    asked, got = 0.0, 0.0
    for seed in range(8):
        got += float(((written(base, delta, rounding, seed=seed) - values_of(*base)) / scale_of(base)).sum())
        asked += float((delta / scale_of(base)).sum())
    # Moves are rare and independent, or better: at most Poisson's variance.
    variance = 8 * float((chance * (1 - chance) * ((upper - lower) / scale_of(base)).square()).sum())
    assert abs(got - asked) < 5 * variance**0.5
    assert asked > 10 * variance**0.5, "too few draws to tell"


@pytest.mark.parametrize("rounding", RANDOM)
def test_seed_and_name_decide_the_bytes(rounding: Rounding) -> None:
    base = random_base(8, 4)
    delta = random_delta(base, 0.2)
    first = merge(base, delta, rounding, seed=3, name="layer 0, expert 1")
    assert torch.equal(first, merge(base, delta, rounding, seed=3, name="layer 0, expert 1"))
    assert not torch.equal(first, merge(base, delta, rounding, seed=4, name="layer 0, expert 1"))
    assert not torch.equal(first, merge(base, delta, rounding, seed=3, name="layer 0, expert 2"))


@pytest.mark.parametrize("rounding", ALL)
def test_bytes_do_not_depend_on_chunks_or_threads(rounding: Rounding, monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_base(301, 5)
    delta = random_delta(base, 0.2)
    whole = merge(base, delta, rounding)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(merge(base, delta, rounding), whole)
    finally:
        torch.set_num_threads(threads)
    for values in (1, 7 * 160):
        monkeypatch.setattr("gptoss_infer.rounding.CHUNK_VALUES", values)
        assert torch.equal(merge(base, delta, rounding), whole)


def mixed(number: int, key: int) -> int:
    """The module's hash in Python's integers, 26 bits; constants of lowbias32 (hash-prospector)."""
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        number = ((number ^ number >> shift) * multiplier % 2**32) ^ key
    return number >> 6


def position_of(value: Fraction) -> Fraction:
    """Where a value lies on the line of codes -7..7."""
    magnitude = min(abs(value), Fraction(6))
    code = max(code for code in range(8) if Fraction(GRID[code].item()) <= magnitude)
    if code < 7:
        lower, upper = (Fraction(GRID[at].item()) for at in (code, code + 1))
        return (1 if value > 0 else -1) * (code + (magnitude - lower) / (upper - lower))
    return Fraction(7 if value > 0 else -7)


@pytest.mark.parametrize("rounding", RANDOM)
def test_bytes_equal_those_of_exact_arithmetic_in_pure_python(rounding: Rounding) -> None:
    """What a recorded seed means on any device and release: whoever breaks this changes it."""
    rows, columns, seed, name = 3, 64, 5, "layer 0, expert 1"
    base = random_base(rows, columns // 32, codes=5)
    # Multiples of 1/64, in part of more than a step, and nothing that clips.
    delta = (torch.arange(rows * columns).view(rows, columns) * 29 % 211 - 105) / 64 * scale_of(base)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=12).digest()
    keys = [int.from_bytes(digest[at : at + 4], "little") for at in (0, 4, 8)]
    weyl = 0x9E3779B9
    expected = torch.empty(rows, columns, dtype=torch.float64)
    before, moved = values_of(*base) / scale_of(base), delta / scale_of(base)
    for row in range(rows):
        sums = [mixed((2 * row + way) * weyl + keys[0] & 0xFFFFFFFF, keys[2]) for way in (0, 1)]
        for column in range(columns):
            step = Fraction(moved[row, column].item())
            at = int(position_of(Fraction(before[row, column].item()) + step) * 2**26)
            if rounding == "stochastic":
                number = mixed((row * columns + column) * weyl + keys[0] & 0xFFFFFFFF, keys[1])
            else:
                number = sums[step < 0] % 2**26
                sums[step < 0] += at
            code = at + number >> 26
            expected[row, column] = GRID[abs(code)] * (1 if code > 0 else -1)
    got = written(base, delta.float(), rounding, seed=seed, name=name) / scale_of(base)
    assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and torch sees none")
@pytest.mark.parametrize("rounding", ALL)
def test_a_gpu_writes_the_same_bytes(rounding: Rounding) -> None:
    base = random_base(96, 90)
    delta = random_delta(base, 0.1)
    on_gpu = merge((base[0].cuda(), base[1].cuda()), delta.cuda(), rounding)
    assert torch.equal(on_gpu.cpu(), merge(base, delta, rounding))


@pytest.mark.parametrize("rounding", ALL)
def test_blocks_without_a_delta_keep_their_bytes(rounding: Rounding) -> None:
    base = random_base(64, 6)
    base[1][:, 2] = 255
    delta = random_delta((base[0], base[1].clamp_max(121)), 0.5)
    delta.view(64, 6, 32)[:, 1:4] = 0
    blocks = merge(base, delta, rounding)
    assert torch.equal(blocks[:, 1:4], base[0][:, 1:4])
    assert (blocks[:, [0, 4, 5]] != base[0][:, [0, 4, 5]]).any(-1).all()


@pytest.mark.parametrize("rounding", ALL)
def test_an_adapter_of_zeros_returns_the_base(rounding: Rounding) -> None:
    base = random_base(16, 4)
    assert torch.equal(merge(base, torch.zeros(16, 128), rounding), base[0])
    assert torch.equal(merge(base, -torch.zeros(16, 128), rounding), base[0])


@pytest.mark.parametrize("rounding", ALL)
def test_an_element_that_keeps_its_value_keeps_its_code_and_a_new_zero_its_sign(rounding: Rounding) -> None:
    base = random_base(64, 4, codes=3)
    delta = random_delta(base, 0.2)
    before, after = codes_of(base[0]), codes_of(merge(base, delta, rounding))
    kept = GRID[before % 8] == GRID[after % 8]
    assert torch.equal(before[kept & (after % 8 == 0)], after[kept & (after % 8 == 0)])
    assert (before == 8).logical_and(after == 8).any()
    emptied = (before % 8 != 0) & (after % 8 == 0)
    assert torch.equal(before[emptied] >= 8, after[emptied] >= 8)
    assert emptied.any()


@pytest.mark.parametrize("rounding", ALL)
def test_a_nan_block_keeps_its_bytes_and_the_rest_of_its_row_is_merged(rounding: Rounding) -> None:
    base = random_base(32, 3, codes=5)
    delta = random_delta(base, 0.5)
    broken = base[0], base[1].clone()
    broken[1][:, 1] = 255
    blocks, sound = merge(broken, delta, rounding), merge(base, delta, rounding)
    assert torch.equal(blocks[:, 1], base[0][:, 1])
    if rounding != "systematic":  # where what comes later in the row depends on what came before
        assert torch.equal(blocks[:, ::2], sound[:, ::2])
    assert not torch.equal(blocks[:, 2], base[0][:, 2])


def outward(base: Base, size: float) -> Tensor:
    """A delta of `size` scales that makes every magnitude larger."""
    return (size * scale_of(base) * torch.where(codes_of(base[0]) >= 8, -1, 1)).float()


def projection(base: Base, delta: Tensor, moved: Tensor) -> Tensor:
    """Per row, <moved, delta> / <delta, delta>."""
    delta = delta.double()
    return (moved * delta).sum(1) / delta.square().sum(1)


@pytest.mark.parametrize("rounding", RANDOM)
def test_what_clipping_takes_the_rest_of_the_row_makes_up_for(rounding: Rounding) -> None:
    base = random_base(256, 8)  # an eighth at magnitude 6, where half of the deltas point outward
    delta = random_delta(base, 0.02)
    draws = [written(base, delta, rounding, seed=seed) - values_of(*base) for seed in range(40)]
    kept = torch.stack([projection(base, delta, moved).mean() for moved in draws])
    clipped = (values_of(*base) + delta.double()).abs() > 6 * scale_of(base)
    without = 1 - projection(base, delta, torch.where(clipped, delta.double(), 0.0)).mean()
    error = float(kept.std()) / len(draws) ** 0.5
    assert without < 0.97
    assert abs(float(kept.mean()) - 1) < 5 * error
    assert error < 0.2 * (1 - without), "too few draws to tell"


@pytest.mark.parametrize("rounding", RANDOM)
def test_compensation_stops_at_twice_the_delta(rounding: Rounding) -> None:
    sixes, ones = torch.full((500, 1, 32), 7, dtype=torch.uint8), torch.full((500, 1, 32), 2, dtype=torch.uint8)
    base = pack(torch.cat([sixes, sixes, sixes, ones], dim=1)), torch.full((500, 4), 127, dtype=torch.uint8)
    moved = written(base, outward(base, 0.02), rounding) - values_of(*base)
    assert not moved[:, :96].any()
    mean = float(moved[:, 96:].mean())  # 16,000 elements move by half a scale with probability 0.08
    assert abs(mean - 2 * 0.02) < 5 * 0.5 * (0.08 / 16000) ** 0.5


@pytest.mark.parametrize("rounding", RANDOM)
def test_a_row_that_is_clipped_entirely_keeps_its_bytes(rounding: Rounding) -> None:
    base = torch.full((4, 2, 16), 0x7F, dtype=torch.uint8), torch.full((4, 2), 120, dtype=torch.uint8)
    assert torch.equal(merge(base, outward(base, 0.3), rounding), base[0])


def moments(base: Base, delta: Tensor, rounding: Rounding, draws: int) -> tuple[float, float, float]:
    """Mean squared error per value, of a row's sum and of a row's projection."""
    target = values_of(*base) + delta.double()
    squares = []
    for seed in range(draws):
        error = written(base, delta, rounding, seed=seed) - target
        squares.append(
            [error.square().mean(), error.sum(1).square().mean(), projection(base, delta, error).square().mean()]
        )
    mean = torch.tensor(squares, dtype=torch.float64).mean(0).tolist()
    return mean[0], mean[1], mean[2]


def test_systematic_draws_make_row_sums_and_projections_surer_and_no_weight_worse() -> None:
    base = random_base(128, 32, codes=7)
    delta = low_rank_delta(128, 1024, 0.02 / 64)  # scales are about 1 / 64
    independent, systematic = (moments(base, delta, rounding, 20) for rounding in RANDOM)
    value, row_sum, along = (b / a for a, b in zip(independent, systematic, strict=True))
    # Ratios of averages over 2,560 rows: about 4% of noise each.
    assert 0.9 < value < 1.1
    assert row_sum < 0.5
    assert along < 0.65


def test_with_systematic_draws_a_row_takes_its_expected_number_of_steps_each_way() -> None:
    base = random_base(64, 16, codes=6)
    delta = low_rank_delta(64, 512, 0.05 / 512)  # less than a step even of the smallest scale
    _, _, chance = neighbours(base, delta)
    rises = delta > 0
    for seed in range(5):
        moved = written(base, delta, "systematic", seed=seed) != values_of(*base)
        for way, probability in ((rises, chance), (~rises, 1 - chance)):
            expected = torch.where(way & (chance > 0), probability, 0.0).sum(1)
            # Give or take one; the fixed point's 512 roundings are far below the tolerance.
            assert ((moved & way).sum(1) - expected).abs().max() < 1 + 1e-4


def test_stochastic_draws_of_neighbours_seeds_and_names_are_uncorrelated() -> None:
    base = torch.full((512, 16, 16), 0x22, dtype=torch.uint8), torch.full((512, 16), 127, dtype=torch.uint8)
    delta = torch.full((512, 512), 0.25)  # each way with probability 1/2

    def signs(**key: object) -> Tensor:
        return torch.where(written(base, delta, "stochastic", **key) > 1.25, 1.0, -1.0)

    first = signs(seed=0, name="a")
    others = {
        "mean": torch.ones_like(first), "seed": signs(seed=1, name="a"), "name": signs(seed=0, name="b"),
        **{f"column {n}": first.roll(n, 1) for n in (1, 2, 3, 31, 32, 64)},
        **{f"row {n}": first.roll(n, 0) for n in (1, 2, 3, 128)},
        "pairs": first.roll(1, 1) * first.roll(1, 0) * first.roll((1, 1), (0, 1)),
    }  # fmt: skip
    for name, other in others.items():
        assert abs(float((first * other).mean())) < 5 / first.numel() ** 0.5, name


@pytest.mark.parametrize("rounding", ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_delta_that_is_not_finite_is_refused_with_its_count(rounding: Rounding, bad: float) -> None:
    base = random_base(4, 2)
    delta = torch.zeros(4, 64)
    delta[2, 5] = delta[3, 1] = bad
    with pytest.raises(ValueError, match="2 of 256 values of the delta are NaN or infinite"):
        merge(base, delta, rounding)


def test_arguments_that_do_not_fit_are_refused() -> None:
    base = random_base(4, 2)
    with pytest.raises(ValueError, match=r"delta has shape \(4, 32\)"):
        merge(base, torch.zeros(4, 32), "nearest")
    with pytest.raises(ValueError, match="do not match"):
        merge((base[0], base[1][:, :1]), torch.zeros(4, 64), "nearest")
    with pytest.raises(ValueError, match="choose one of nearest, stochastic, systematic"):
        merge(base, torch.zeros(4, 64), "floor")  # type: ignore[arg-type]


@pytest.mark.parametrize("rounding", ALL)
def test_half_precision_deltas_and_inference_mode_give_the_same_bytes(rounding: Rounding) -> None:
    base = random_base(8, 2)
    delta = random_delta(base, 0.3).bfloat16()
    expected = merge(base, delta.float(), rounding)
    assert torch.equal(merge(base, delta.requires_grad_(), rounding), expected)
    with torch.inference_mode():
        assert torch.equal(merge((base[0].clone(), base[1].clone()), delta.clone(), rounding), expected)
