"""Training data: what carries loss, what becomes of bad lines, and the order of an epoch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoss_infer import harmony
from gptoss_infer.errors import DataError
from gptoss_train.data import CHANNELS, Sample, load_dataset, load_splits, pack
from gptoss_train.preview import show
from gptoss_train.recipe import Data, Recipe

USER = {"role": "user", "content": "2 + 3?"}
ANSWER = {"role": "assistant", "thinking": "2 + 3 is 5", "content": "It is 5."}
GOOD = {"messages": [USER, ANSWER]}
TWO_TURNS = {"messages": [USER, ANSWER, {"role": "user", "content": "4 + 4?"}, {"role": "assistant", "content": "8"}]}
WITH_TOOL = {
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}],
    "messages": [
        USER,
        {"role": "assistant", "content": "I will add.", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "5"},
    ],
}


def settings(**changes: Any) -> Data:
    return Data(train="unused", **changes)


def recipe_of(seed: int = 0, **data: Any) -> Recipe:
    sections = {"model": {"checkpoint": "unused"}, "data": {"train": "unused"} | data}
    return Recipe.model_validate({"version": 1, "train": {"epochs": 1, "seed": seed}} | sections)


def write(path: Path, *lines: object) -> Path:
    """Write JSON Lines; bytes go in as they are."""
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def labelled(sample: Sample) -> list[tuple[str, str]]:
    """(channel, text) of each run of tokens that carry loss under one channel."""
    runs: list[tuple[int, list[int]]] = []
    for code, token in zip(sample.channels.tolist(), sample.token_ids.tolist(), strict=True):
        if not runs or runs[-1][0] != code:
            runs.append((code, []))
        runs[-1][1].append(token)
    return [(CHANNELS[code - 1], harmony.decode(tokens)) for code, tokens in runs if code]


def test_labels_cover_what_the_model_writes_and_nothing_else(tmp_path: Path) -> None:
    (sample,) = load_dataset(write(tmp_path / "a.jsonl", GOOD), settings()).samples
    assert labelled(sample) == [
        ("analysis", "<|channel|>analysis<|message|>2 + 3 is 5<|end|>"),
        ("final", "<|start|>assistant<|channel|>final<|message|>It is 5.<|return|>"),
    ]
    text = harmony.decode(sample.token_ids.tolist())
    assert text.endswith("".join(part for _, part in labelled(sample)))
    assert "<|start|>user<|message|>2 + 3?<|end|><|start|>assistant<|channel|>analysis" in text


def test_tool_calls_and_preambles_have_their_own_channels_and_results_carry_no_loss(tmp_path: Path) -> None:
    (sample,) = load_dataset(write(tmp_path / "a.jsonl", WITH_TOOL), settings()).samples
    assert [channel for channel, _ in labelled(sample)] == ["commentary", "tool_call", "final"]
    assert "functions.add" in labelled(sample)[1][1]
    assert labelled(sample)[1][1].endswith("<|call|>")
    shown = show(sample, color=False)
    assert shown.count("⟦") == 3
    assert "⟦tool_call: " in shown
    assert "".join(text for _, text in labelled(sample)) == "".join(
        part.partition(": ")[2].partition("⟧")[0] for part in shown.split("⟦")[1:]
    )


def test_each_assistant_turn_is_a_sample_and_last_turn_keeps_the_last_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TWO_TURNS)
    both = load_dataset(path, settings()).samples
    last = load_dataset(path, settings(train_on="last_turn")).samples
    assert [[channel for channel, _ in labelled(s)] for s in both] == [["analysis", "final"], ["final"]]
    assert [s.token_ids.tolist() for s in last] == [both[1].token_ids.tolist()]
    assert "2 + 3 is 5" not in harmony.decode(last[0].token_ids.tolist()), "reasoning of an earlier turn is dropped"


def test_the_report_counts_lines_samples_tokens_and_labels(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path / "a.jsonl", GOOD, TWO_TURNS, WITH_TOOL), settings())
    report = dataset.report
    assert (report.lines, report.samples, report.bad_lines, report.too_long) == (3, 4, 0, 0)
    assert report.tokens == sum(len(s.token_ids) for s in dataset.samples)
    assert report.longest_tokens == max(len(s.token_ids) for s in dataset.samples)
    channels = Counter(code for s in dataset.samples for code in s.channels.tolist() if code)
    assert report.labels == {CHANNELS[code - 1]: count for code, count in sorted(channels.items())}
    assert "3 lines, 4 samples" in report.text()
    json.dumps(report.to_json())


BAD_LINES: dict[str, tuple[object, str]] = {
    "cut_off": (b'{"messages": [', "the line is not JSON"),
    "empty": (b"", "the line is empty"),
    "blank": (b"  \t", "the line is empty"),
    "no_object": ([1, 2], "expected an object"),
    "null": (b"null", "expected an object"),
    "not_utf8": (b'{"messages": [{"role": "user", "content": "\xff\xfe\xfa"}]}', "the line is not JSON"),
    "nested_too_deep": (b"[" * 100_000, "the line is not JSON"),
    "unknown_role": ({"messages": [{"role": "robot", "content": "x"}]}, "role is 'robot'; expected one of system"),
    "unknown_key": ({"messages": [USER, ANSWER], "mesages": []}, "mesages"),
    "no_messages": ({"tools": []}, "messages"),
    "no_answer": ({"messages": [USER]}, "no assistant message"),
    "empty_content": ({"messages": [{"role": "user", "content": ""}, ANSWER]}, "content is empty"),
    "content_no_text": ({"messages": [{"role": "user", "content": 5}, ANSWER]}, "content"),
    "lone_surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "content"),
    "undeclared_tool": ({"messages": WITH_TOOL["messages"]}, "add"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_with_file_line_and_cure(tmp_path: Path, kind: str) -> None:
    line, message = BAD_LINES[kind]
    path = write(tmp_path / "a.jsonl", GOOD, line, GOOD)
    with pytest.raises(DataError) as caught:
        load_dataset(path, settings())
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)
    assert "data.on_bad_line=skip" in str(caught.value)


def test_bad_lines_that_are_skipped_are_counted_and_the_first_ones_quoted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, *(line for line, _ in BAD_LINES.values()), GOOD)
    dataset = load_dataset(path, settings(on_bad_line="skip"))
    assert (dataset.report.lines, dataset.report.bad_lines) == (len(BAD_LINES) + 2, len(BAD_LINES))
    assert len(dataset.samples) == 2
    assert [example.split(" ")[0] for example in dataset.report.examples] == [f"{path}:{n}:" for n in (2, 3, 4)]
    assert f"{len(BAD_LINES)} bad lines skipped" in dataset.report.text()


def test_samples_over_the_limit_are_counted_or_an_error_with_the_cure(tmp_path: Path) -> None:
    long = {"messages": [USER, {"role": "assistant", "content": "very " * 500}]}
    path = write(tmp_path / "a.jsonl", GOOD, long)
    dataset = load_dataset(path, settings(max_tokens=200))
    assert (dataset.report.samples, dataset.report.too_long) == (1, 1)
    assert "1 samples over the limit skipped" in dataset.report.text()
    assert f"{path}:2: a sample has" in dataset.report.text()
    with pytest.raises(DataError, match=r"a\.jsonl:2: a sample has 5\d\d tokens, data\.max_tokens is 200; raise it"):
        load_dataset(path, settings(max_tokens=200, on_long="error"))
    longest = dataset.report.longest_tokens
    assert load_dataset(path, settings(max_tokens=longest)).report.samples == 1, "the limit itself fits"


def test_a_file_without_a_sample_is_an_error_that_says_what_became_of_its_lines(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl:1: the line is empty"):
        load_dataset(tmp_path / "empty.jsonl", settings())
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(DataError, match=r"gives no sample to train on: .*\n1 samples over the limit skipped"):
        load_dataset(path, settings(max_tokens=3))


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_a_missing_file_is_an_error_that_names_the_keys(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl cannot be read .*check data\.train"):
        load_splits(recipe_of(validation_fraction=fraction), tmp_path / "nowhere.jsonl", None)


def test_a_byte_order_mark_windows_line_ends_and_a_missing_last_newline_change_nothing(tmp_path: Path) -> None:
    plain = load_dataset(write(tmp_path / "a.jsonl", GOOD, TWO_TURNS), settings())
    text = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps(TWO_TURNS).encode()
    (tmp_path / "b.jsonl").write_bytes(text)
    other = load_dataset(tmp_path / "b.jsonl", settings())
    assert [s.token_ids.tolist() for s in other.samples] == [s.token_ids.tolist() for s in plain.samples]


def numbered(count: int) -> list[dict[str, Any]]:
    """Conversations of one to three turns that each say their number."""
    return [
        {"messages": [{"role": "user", "content": f"line {n}."}, ANSWER] * (1 + n % 3)} for n in range(count)
    ]  # fmt: skip


def lines_of(samples: list[Sample]) -> set[str]:
    return {harmony.decode(s.token_ids.tolist()).partition("line ")[2].partition(".")[0] for s in samples}


def test_a_validation_split_holds_out_whole_lines_and_is_the_same_every_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *numbered(40))
    train, held = load_splits(recipe_of(seed=3, validation_fraction=0.25), path, None)
    assert held is not None
    assert (train.report.lines, held.report.lines) == (30, 10)
    assert lines_of(train.samples) | lines_of(held.samples) == {str(n) for n in range(40)}
    assert not lines_of(train.samples) & lines_of(held.samples)
    again = load_splits(recipe_of(seed=3, validation_fraction=0.25), path, None)[1]
    other = load_splits(recipe_of(seed=4, validation_fraction=0.25), path, None)[1]
    assert again is not None
    assert other is not None
    assert lines_of(again.samples) == lines_of(held.samples) != lines_of(other.samples)


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_fraction_that_holds_out_nothing_or_everything_is_refused(tmp_path: Path, fraction: float) -> None:
    path = write(tmp_path / "a.jsonl", *numbered(10))
    with pytest.raises(DataError, match=r"validation_fraction 0\.\d+ of 10 lines holds out (0|10)"):
        load_splits(recipe_of(validation_fraction=fraction), path, None)


def test_packed_samples_lie_one_after_another_with_their_own_positions_and_next_tokens() -> None:
    first = Sample(torch.tensor([5, 6, 7]), torch.tensor([0, 0, 3], dtype=torch.uint8))
    second = Sample(torch.tensor([8, 9]), torch.tensor([0, 1], dtype=torch.uint8))
    batch = pack([first, second])
    assert batch.input_ids.tolist() == [5, 6, 8]
    assert batch.positions.tolist() == [0, 1, 0]
    assert batch.targets.tolist() == [6, 7, 9], "the last token of a sample never predicts the next sample"
    assert batch.channels.tolist() == [0, 3, 1]
