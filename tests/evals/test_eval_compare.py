"""`gptoss-eval compare`, and the scores of records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from evals.__main__ import main
from evals.compare import compare, read_evaluation
from evals.scores import score
from gptoss_infer.errors import UsageError, run_command

RIGHT_10 = {f"{n}+1": "correct" for n in range(10)}


def test_flips_difference_and_p_are_counted_by_question(write_evaluation: Callable) -> None:
    a = write_evaluation("a", RIGHT_10 | {"0+1": "wrong", "1+1": "truncated", "2+1": "no_answer", "3+1": "wrong"})
    b = write_evaluation("b", RIGHT_10 | {"9+1": "malformed_harmony"})
    (result,) = compare(read_evaluation(a), read_evaluation(b))
    assert (result.accuracy_a, result.accuracy_b) == (0.6, 0.9)
    assert result.difference == pytest.approx(0.3)
    assert result.gained == ("0+1", "1+1", "2+1", "3+1")
    assert result.lost == ("9+1",)
    assert result.p_value == pytest.approx(2 * (1 + 5) / 2**5)  # binomial: at most 1 of 5
    assert result.interval.low < 0.3 < result.interval.high
    assert result.non_inferior is None


def test_epochs_of_a_question_are_one_pair(write_evaluation: Callable, make_record: Callable) -> None:
    def epochs(*outcomes: str) -> list:
        return [make_record("1+1", outcome, epoch=epoch) for epoch, outcome in enumerate(outcomes)]

    a = write_evaluation("a", epochs("wrong", "wrong", "correct", "wrong"), epochs=4)
    b = write_evaluation("b", epochs("correct", "correct", "correct", "wrong"), epochs=4)
    (result,) = compare(read_evaluation(a), read_evaluation(b))
    assert (result.n_questions, result.difference, result.gained) == (1, 0.5, ("1+1",))
    assert result.p_value == 1


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"data": "other"}, "samples_sha256"),
        ({"max_tokens": 65}, "max_tokens: 64 and 65"),
        ({"temperature": 0.0}, "temperature"),
        ({"date": "2025-06-28"}, "date"),
    ],
)
def test_evaluations_that_were_not_asked_alike_are_refused(
    write_evaluation: Callable, change: dict, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_evaluation("a", RIGHT_10), write_evaluation("b", RIGHT_10, **change)
    assert run_command(main, ["compare", str(a), str(b)]) == 2
    message = capsys.readouterr().err
    assert "not asked alike" in message
    assert part in message


def test_a_forced_header_is_named_and_not_refused(
    write_evaluation: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_evaluation("a", RIGHT_10, header="<|channel|>final<|message|>")
    b = write_evaluation("b", RIGHT_10, seed=5)
    assert run_command(main, ["compare", str(a), str(b)]) == 0
    assert "'<|channel|>final<|message|>' for A and None for B" in capsys.readouterr().out
    assert run_command(main, ["compare", str(a), str(b), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["comparisons"][0]["difference"] == 0
    assert "for A and None for B" in result["notes"][0]


def test_a_margin_turns_the_interval_into_an_exit_code(
    write_evaluation: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    many = {f"{n}": "correct" for n in range(400)}
    a, same = write_evaluation("a", many), write_evaluation("same", many)
    worse = write_evaluation("worse", many | {f"{n}": "wrong" for n in range(8)})
    assert run_command(main, ["compare", str(a), str(same), "--margin", "0.01"]) == 0
    assert re.search(r" shown +$", capsys.readouterr().out, re.MULTILINE)
    assert run_command(main, ["compare", str(a), str(worse), "--margin", "0.01"]) == 1
    assert "not shown" in capsys.readouterr().out
    assert run_command(main, ["compare", str(a), str(worse), "--margin", "0.05"]) == 0
    assert run_command(main, ["compare", str(a), str(same), "--margin", "1"]) == 2


def test_few_questions_prove_nothing_even_without_a_flip(write_evaluation: Callable) -> None:
    a, b = write_evaluation("a", RIGHT_10), write_evaluation("b", RIGHT_10)
    (result,) = compare(read_evaluation(a), read_evaluation(b), margin=0.01)
    assert result.difference == 0
    assert result.non_inferior is False


def test_infra_errors_are_left_out_and_stand_in_the_way_of_a_verdict(
    write_evaluation: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_evaluation("a", RIGHT_10)
    b = write_evaluation("b", RIGHT_10 | {"0+1": "infra_error"})
    assert run_command(main, ["compare", str(a), str(b)]) == 0
    captured = capsys.readouterr()
    assert "1 questions lack a scored sample and are left out" in captured.err
    assert "100.0%   100.0%" in captured.out
    assert run_command(main, ["compare", str(a), str(b), "--margin", "0.01"]) == 2


def test_a_directory_without_an_evaluation_is_refused(tmp_path: Path, write_evaluation: Callable) -> None:
    with pytest.raises(UsageError, match=r"no run\.json"):
        read_evaluation(tmp_path)


def test_scores_count_every_sample_but_infra_errors(make_record: Callable) -> None:
    records = [
        make_record("1", "correct", completion_tokens=10),
        make_record("2", "wrong", completion_tokens=20),
        make_record("3", "truncated", well_formed=False, completion_tokens=30),
        make_record("4", "malformed_harmony", well_formed=False, completion_tokens=40),
        make_record("5", "no_answer", completion_tokens=50),
        make_record("6", "infra_error", well_formed=False, completion_tokens=0),
        make_record("7", "correct", task="gsm8k"),
    ]
    result = score(records, task="addition", effort="medium", n_expected=6)
    assert (result.accuracy, result.format_validity) == (0.2, 0.6)
    assert (result.n_scored, result.n_questions, result.is_complete) == (5, 5, False)
    assert result.mean_completion_tokens == 30
    assert result.outcomes == dict.fromkeys(
        ("correct", "wrong", "no_answer", "truncated", "malformed_harmony", "infra_error"), 1
    )


def test_a_task_without_a_scored_sample_has_no_accuracy(make_record: Callable) -> None:
    result = score([make_record("1", "infra_error")], task="addition", effort="medium", n_expected=1)
    assert result.accuracy is None
    assert result.accuracy_interval is None
