"""Graders of text answers and the sources of their samples."""

from __future__ import annotations

import json
import sys
import types
from decimal import Decimal
from pathlib import Path

import pytest

from evals.task import Outcome, Reply, Sample, samples_sha256
from evals.tasks import arithmetic, exact, get_task, gsm8k
from gptoss_infer.errors import DataError, MachineError, UsageError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 18.", "18"),
        ("18.00", "18"),
        ("She makes $1,234.50.", "1234.5"),
        ("**$1,234,567**", "1234567"),
        ("a total of 25%", "25"),
        (r"\boxed{42}", "42"),
        (r"\[\boxed{\$1{,}200}\]", "1200"),
        (r"= 12\,000", "12000"),
        ("1\u202f200 eggs", "1200"),
        ("first 3, then 1,2,3", "3"),
        ("16-3", "3"),
        ("it fell by -5 degrees", "-5"),
        ("-$5", "-5"),
        ("\u22127", "-7"),
        ("half is .5", "0.5"),
        ("She has 3 apples and 4 pears", "4"),
    ],
)
def test_last_number_reads_what_people_write(text: str, number: str) -> None:
    assert gsm8k.last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no idea", "twelve", "$"])
def test_last_number_is_none_where_there_is_none(text: str) -> None:
    assert gsm8k.last_number(text) is None


@pytest.mark.parametrize(
    ("final", "outcome"),
    [
        ("It is 18.00 dollars.", Outcome.CORRECT),
        ("18 eggs make $36", Outcome.WRONG),
        ("I cannot say.", Outcome.NO_ANSWER),
    ],
)
def test_gsm8k_grades_the_last_number(final: str, outcome: Outcome) -> None:
    sample = Sample("q", {"messages": []}, "18")
    assert gsm8k.grade(sample, Reply(final)).outcome is outcome


def test_gsm8k_reads_a_directory_with_the_test_split(tmp_path: Path) -> None:
    rows = [
        {"question": "Two and two? ", "answer": "2+2=<<2+2=4>>4\n#### 4"},
        {"question": "A lot?", "answer": "so\n#### 1,200"},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = gsm8k.load(tmp_path)
    assert [sample.gold for sample in samples] == ["4", "1200"]
    assert samples[0].chat == {
        "messages": [{"role": "user", "content": "Two and two?\n\nFinish with the answer as a single number."}]
    }
    assert gsm8k.load(tmp_path / "test.jsonl") == samples


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("not json", "not a line of JSON"),
        ("[1]", "expected one JSON object"),
        ('{"question": "", "answer": "#### 1"}', "'question' is ''"),
        ('{"question": "q", "answer": "4"}', "expected '#### NUMBER'"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path: Path, line: str, part: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "q", "answer": "#### 1"}\n\n' + line + "\n")
    with pytest.raises(DataError) as error:
        gsm8k.load(path)
    assert f"{path}:3" in str(error.value)
    assert part in str(error.value)


def test_gsm8k_comes_from_the_hub_without_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    hub = types.ModuleType("datasets")

    def load_dataset(*arguments: str, split: str) -> list[dict[str, str]]:
        asked.append((*arguments, split))
        return [{"question": "q", "answer": "#### 7"}]

    monkeypatch.setattr(hub, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert gsm8k.load(None)[0].gold == "7"
    assert asked == [("openai/gsm8k", "main", "test")]


def test_a_hub_out_of_reach_names_the_way_around(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: str, split: str) -> None:
        raise ConnectionError(f"no route to the hub for {split}")

    hub = types.ModuleType("datasets")
    monkeypatch.setattr(hub, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(MachineError, match="--data gsm8k=PATH"):
        gsm8k.load(None)


@pytest.mark.parametrize(
    ("final", "outcome"),
    [(" 46\n", Outcome.CORRECT), ("46.", Outcome.WRONG), ("47", Outcome.WRONG), (" ", Outcome.NO_ANSWER)],
)
def test_exact_compares_the_whole_final_text(final: str, outcome: Outcome) -> None:
    assert exact.grade(Sample("q", {}, "46"), Reply(final)).outcome is outcome


def test_exact_reads_ids_tools_and_line_numbers(tmp_path: Path) -> None:
    question = [{"role": "user", "content": "17+29"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [{"messages": question, "answer": "46"}, {"id": "b", "messages": question, "answer": "46", "tools": tools}]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = exact.load(path)
    assert first == Sample("1", {"messages": question}, "46")
    assert second == Sample("b", {"messages": question, "tools": tools}, "46")
    assert arithmetic.load(path) == [first, second]


def test_exact_refuses_a_question_that_ends_in_its_answer(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "46"}], "answer": "46"}\n')
    with pytest.raises(DataError, match="last message has role 'assistant'"):
        exact.load(path)


def test_exact_refuses_two_samples_with_one_id(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": "a", "messages": [{"role": "user", "content": "x"}], "answer": "46"}\n' * 2)
    with pytest.raises(DataError, match="'a' occurs twice"):
        exact.load(path)


def test_exact_without_a_file_says_how_to_give_one() -> None:
    with pytest.raises(UsageError, match="--data exact=PATH"):
        exact.load(None)


def test_held_out_sums_never_meet_the_training_sums_in_either_order() -> None:
    train, held_out = arithmetic.problems("train"), arithmetic.problems("held_out")
    assert len(train) + len(held_out) == 90 * 90
    assert 0.08 < len(held_out) / 8100 < 0.12
    as_sums = {frozenset(pair) for pair in train}
    assert not as_sums & {frozenset(pair) for pair in held_out}


def test_the_seed_alone_decides_the_split_and_its_order() -> None:
    assert arithmetic.problems("held_out", seed=1) == arithmetic.problems("held_out", seed=1)
    assert set(arithmetic.problems("held_out", seed=1)) != set(arithmetic.problems("held_out", seed=2))
    assert len(arithmetic.problems("held_out", digits=1)) < 81
    with pytest.raises(ValueError, match="digits is 9"):
        arithmetic.problems("train", digits=9)


def test_addition_asks_for_held_out_sums() -> None:
    samples = arithmetic.load(None)
    for sample in samples:
        a, b = map(int, sample.id.split("+"))
        assert arithmetic.is_held_out(a, b)
        assert sample.gold == str(a + b)
        assert sample.chat == {"messages": [{"role": "user", "content": f"{a}+{b}"}]}


def test_hash_of_samples_changes_with_prompt_and_gold() -> None:
    base = Sample("1", {"messages": [{"role": "user", "content": "x"}]}, "1")
    other_prompt = Sample("1", {"messages": [{"role": "user", "content": "y"}]}, "1")
    other_gold = Sample("1", base.chat, "2")
    assert len({samples_sha256([one]) for one in (base, other_prompt, other_gold)}) == 3


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="gsm8k, bfcl_simple, addition, exact"):
        get_task("gsm9k")
