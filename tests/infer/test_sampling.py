"""Sampling against transformers' filters, log_softmax, the softmax' frequencies and Random123's known answers."""

from __future__ import annotations

import pytest
import torch
from draws import V, draws, logits_of, mask_of, rows_of
from torch import Tensor

from gptoss_infer.sampling import gumbel, philox, sample


def assert_drawn_from(ids: Tensor, probabilities: Tensor) -> None:
    """Chi-square over the ids expected at least 5 times, the others pooled; and nothing impossible was drawn."""
    counts = torch.bincount(ids, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(ids)
    assert (counts[expected == 0] == 0).all(), "drew an id that the filters exclude"
    common = expected >= 5
    pooled = [torch.cat([x[common], x[~common].sum().view(1)]) for x in (counts, expected)]
    statistic = ((pooled[0] - pooled[1]) ** 2 / pooled[1].clamp_min(1e-9)).sum()
    freedom = int(common.sum())
    assert freedom > 0
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5  # mean and 5 standard deviations of chi-square


def warped(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """What transformers leaves of one row, as probabilities."""
    from transformers.generation import logits_process as hf

    scores = hf.TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = hf.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = hf.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = hf.MinPLogitsWarper(min_p)(None, scores)
    return scores[0].softmax(-1)


FILTERS = [(0, 1.0, 0.0), (5, 1.0, 0.0), (1, 1.0, 0.0), (0, 0.5, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.1), (20, 0.7, 0.05)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
def test_ids_are_drawn_as_often_as_transformers_filtered_softmax_says(
    top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = logits_of(1)[0]
    n = 800
    chosen, _ = sample(
        logits.expand(n, -1), draws(n, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), logprobs=False
    )
    expected = warped(logits, temperature, top_k, top_p, min_p)
    assert_drawn_from(chosen, expected)
    seen = torch.bincount(chosen, minlength=V) > 0
    assert seen[expected > 20 / n].all(), "never drew an id that the filters keep"


def test_of_equal_logits_a_filter_keeps_the_lower_ids() -> None:
    logits = torch.zeros(1, V)
    logits[0, [9, 70, 71, 190]] = 5.0  # e^5 / (4 e^5 + 197) is 18.8% each
    for given, kept in (
        ({"top_k": 3}, {9, 70, 71}),
        ({"top_k": 1}, {9}),
        ({"top_p": 0.37}, {9, 70}),
        ({"top_p": 0.56}, {9, 70, 71}),
        ({"top_k": 3, "top_p": 0.5}, {9, 70}),
        ({"min_p": 0.5}, {9, 70, 71, 190}),
    ):
        chosen, _ = sample(logits.expand(80, -1), draws(80, **given), logprobs=False)
        assert set(chosen.tolist()) == kept


def test_greedy_takes_the_first_of_the_largest_whatever_the_filters() -> None:
    logits = logits_of(3)
    logits[0, [64, 130]] = 50.0
    logits[1, [3, 4]] = 50.0
    logits[2] = -1.0
    for given in ({}, {"top_k": 4, "top_p": 0.2, "min_p": 0.3}):
        chosen, _ = sample(logits, draws(3, temperature=0.0, **given))
        assert chosen.tolist() == [64, 3, 0]


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 512, 1000])
def test_any_vocabulary_size_draws_ids_inside_it(size: int) -> None:
    logits = logits_of(50, size)
    for given in ({"temperature": 0.0}, {}, {"top_k": 300}, {"top_p": 0.8}, {"min_p": 0.01, "top_p": 0.99}):
        chosen, logprobs = sample(logits, draws(50, **given))
        assert ((chosen >= 0) & (chosen < size)).all()
        assert logprobs is not None
        expected = logits.double().log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        assert torch.allclose(logprobs.double(), expected, atol=1e-5)
    assert torch.equal(sample(logits, draws(50, temperature=0.0))[0], logits.argmax(-1))


def test_forbidden_ids_are_never_drawn_and_the_others_as_if_those_were_not_there() -> None:
    logits = logits_of(1)[0]
    allowed = torch.rand(1, V, generator=torch.Generator().manual_seed(1)) < 0.5
    allowed[0, :64] = False
    allowed[0, 64:128] = True
    assert not allowed[0, logits.argmax()], "the likeliest id should be forbidden here"
    n = 800
    for given in ({}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.6}):
        chosen, logprobs = sample(logits.expand(n, -1), draws(n, **given), mask_of(allowed))
        limits = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | given
        assert_drawn_from(chosen, warped(logits.masked_fill(~allowed[0], -torch.inf), **limits))
        assert torch.allclose(logprobs, logits.log_softmax(-1)[chosen], atol=1e-5)  # raw: the forbidden ids count
        unasked, none = sample(
            logits.expand(30, -1), rows_of(draws(n, **given), torch.arange(30)), mask_of(allowed), logprobs=False
        )
        assert torch.equal(unasked, chosen[:30])
        assert none is None
    best, _ = sample(logits[None], draws(1, temperature=0.0), mask_of(allowed))
    assert best == logits.masked_fill(~allowed[0], -torch.inf).argmax()


def test_each_row_has_its_own_mask() -> None:
    only = torch.tensor([5, 64, 200, 63])
    allowed = torch.zeros(4, V, dtype=torch.bool)
    allowed[torch.arange(4), only] = True
    for temperature in (0.0, 1.0, 0.3):
        for top_p in (1.0, 0.5):
            chosen, _ = sample(logits_of(4), draws(4, temperature=temperature, top_p=top_p), mask_of(allowed))
            assert torch.equal(chosen, only)


def test_a_row_alone_and_among_others_yields_the_same_bits() -> None:
    n = 24
    logits = logits_of(n, 1000)
    mixed = draws(
        n, temperature=[0.0, 1.0, 0.7] * 8, top_k=[0, 0, 5, 40] * 6, top_p=[1.0, 0.9] * 12, min_p=[0.0] * 20 + [0.1] * 4
    )
    together = sample(logits, mixed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    shuffled = sample(logits[order], rows_of(mixed, order))
    for row in range(n):
        alone = sample(logits[row, None], rows_of(mixed, torch.tensor([row])))
        place = int((order == row).nonzero())
        for part in range(2):
            assert alone[part][0] == together[part][row] == shuffled[part][place]


@pytest.mark.parametrize("changed", ["seed", "request", "sample", "position"])
def test_every_part_of_the_key_gives_independent_draws(changed: str) -> None:
    n = 3000
    logits = logits_of(1, spread=1.0)
    chosen, _ = sample(logits.expand(n, -1), draws(n, **{"request": 5, changed: torch.arange(n)}), logprobs=False)
    probabilities = logits[0].softmax(-1)
    assert_drawn_from(chosen, probabilities)
    repeats = (chosen[1:] == chosen[:-1]).double().mean()
    expected = (probabilities**2).sum()
    assert abs(repeats - expected) < 5 * (expected / n) ** 0.5


def test_logits_that_differ_by_a_rounding_draw_the_same_ids() -> None:
    logits = logits_of(2000, spread=3.0)
    moved = logits * (1 + 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)))
    same = sample(logits, draws(2000))[0] == sample(moved, draws(2000))[0]
    assert same.double().mean() > 0.998


def test_bf16_logits_are_sampled_as_their_fp32_values() -> None:
    logits = logits_of(40).bfloat16()
    for given in ({"temperature": 0.0}, {}, {"top_p": 0.9}):
        for got, expected in zip(
            sample(logits, draws(40, **given)), sample(logits.float(), draws(40, **given)), strict=True
        ):
            assert torch.equal(got, expected)


def test_random_words_are_those_of_random123s_known_answers() -> None:
    """philox4x32 10 in https://github.com/DEShawResearch/random123, tests/kat_vectors: counter, key, result."""
    ones = 2**32 - 1
    for counter, key, expected in (
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, [ones] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        words = philox(tuple(torch.tensor([x]) for x in counter), tuple(torch.tensor([x]) for x in key))
        assert [int(word) for word in words] == expected


def test_noise_has_the_distribution_of_gumbel() -> None:
    noise = gumbel(draws(100), torch.arange(0, 400, 4), 1000).flatten() * torch.tensor(2.0).log()  # bits to nats
    assert noise.isfinite().all()
    sorted_noise = noise.double().sort().values
    distance = ((-(-sorted_noise).exp()).exp() - torch.arange(len(noise)) / len(noise)).abs().max()
    assert distance < 2.0 / len(noise) ** 0.5  # Kolmogorov-Smirnov; exceeded with probability 0.07%


@pytest.mark.parametrize(
    ("rows", "allowed", "message"),
    [
        (3, None, "draws are for 3 rows, but logits have 2"),
        (2, torch.zeros(2, 6, dtype=torch.int32), r"expected int32 \(2 or 1, 7\)"),
        (2, torch.zeros(2, 7, dtype=torch.int64), "allowed is torch.int64"),
        (2, torch.zeros(3, 7, dtype=torch.int32), r"\(3, 7\)"),
    ],
)
def test_shapes_that_disagree_are_refused(rows: int, allowed: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(logits_of(2), draws(rows), allowed)
