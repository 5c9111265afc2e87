"""Intervals and tests against published tables, closed forms and simulated coverage."""

from __future__ import annotations

import numpy as np
import pytest

from evals.statistics import clustered_proportion, paired_difference, sign_test, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_the_published_table(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes / n, n) == pytest.approx((low, high), abs=5e-5)


def test_one_epoch_each_gives_plain_wilson() -> None:
    answers = [True] * 15 + [False] * 133
    estimate = clustered_proportion([[answer] for answer in answers])
    assert estimate.n_effective == 148
    assert estimate.interval == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_copies_of_an_answer_do_not_narrow_the_interval() -> None:
    once = [[True]] * 20 + [[False]] * 10
    copied = [epochs * 8 for epochs in once]
    assert clustered_proportion(copied).interval == pytest.approx(clustered_proportion(once).interval)


def test_epochs_that_agree_no_more_within_than_across_questions_count_in_full() -> None:
    assert clustered_proportion([[True, False]] * 10).n_effective == 20


def test_outcomes_that_never_varied_count_once_per_question() -> None:
    estimate = clustered_proportion([[True] * 8] * 30)
    assert estimate.mean == 1
    assert estimate.interval.low == pytest.approx(wilson(1.0, 30).low)


def test_interval_over_epochs_covers_the_truth_where_the_naive_one_does_not() -> None:
    rng = np.random.default_rng(0)
    truth, n, epochs, trials = 0.72, 100, 8, 400
    covered = naive = 0
    for _ in range(trials):
        difficulty = rng.beta(2 * truth, 2 * (1 - truth), n)
        answers = rng.random((n, epochs)) < difficulty[:, None]
        low, high = clustered_proportion(answers.tolist()).interval
        covered += low <= truth <= high
        low, high = wilson(answers.mean(), n * epochs)
        naive += low <= truth <= high
    # Three standard errors of a share of 0.95 in 400 trials are 0.033.
    assert covered / trials > 0.95 - 0.033
    assert naive / trials < 0.85


def test_sign_test_equals_the_binomial_by_hand() -> None:
    assert sign_test(8, 1) == pytest.approx(2 * (1 + 9) / 2**9)
    assert sign_test(1, 8) == sign_test(8, 1)
    assert sign_test(0, 5) == pytest.approx(2 / 32)


def test_sign_test_without_flips_or_with_a_tie_is_one() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(4, 4) == 1


def test_paired_interval_equals_the_textbook_at_many_pairs() -> None:
    # Approval of the prime minister, A. Agresti, Categorical Data Analysis (2nd ed.), section 10.1: 150 and 86 of 1600
    # changed their mind; difference 0.04 with standard error 0.0095.
    differences = [1.0] * 150 + [-1.0] * 86 + [0.0] * (1600 - 236)
    result = paired_difference(differences)
    assert result.mean == pytest.approx(0.04)
    assert result.interval == pytest.approx((0.04 - 1.96 * 0.0095, 0.04 + 1.96 * 0.0095), abs=3e-4)


def test_paired_interval_equals_agresti_and_min_by_hand() -> None:
    # b = 4, c = 1, n = 20: centre 3/22, standard error sqrt((4 + 1 + 1) - 3^2 / 22) / 22.
    result = paired_difference([1.0] * 4 + [-1.0] + [0.0] * 15)
    half = 1.959964 * (6 - 9 / 22) ** 0.5 / 22
    assert result.interval == pytest.approx((3 / 22 - half, 3 / 22 + half))


def test_paired_interval_without_any_flip_still_has_a_width() -> None:
    low, high = paired_difference([0.0] * 50).interval
    assert low == pytest.approx(-1.959964 / 52)
    assert high == pytest.approx(1.959964 / 52)
