"""`samples.jsonl`: what survives a kill, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evals.records import append, appending, read_json, read_records, write_json
from gptoss_infer.errors import DataError


def test_records_read_back_equal_and_the_last_of_a_key_counts(tmp_path: Path, make_record: Callable) -> None:
    first = make_record("1+1", "infra_error", error="down", messages=[], answer=None)
    other = make_record("2+2", "correct", answer="4\u2028\x00\n", gold={"n": [1, None]})
    again = make_record("1+1", "wrong")
    with appending(tmp_path) as file:
        for one in (first, other, again):
            append(file, one)
    assert list(read_records(tmp_path).values()) == [again, other]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_half_written_line_is_passed_over_and_cut_off_with_a_message(
    tmp_path: Path, make_record: Callable, capsys: pytest.CaptureFixture[str], cut: int
) -> None:
    with appending(tmp_path) as file:
        append(file, make_record("1+1", "correct"))
        append(file, make_record("2+2", "correct"))
    path = tmp_path / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [key.sample_id for key in read_records(tmp_path)] == ["1+1"]
    with appending(tmp_path) as file:
        append(file, make_record("3+3", "wrong"))
    assert "cut off a half-written record" in capsys.readouterr().err
    assert [key.sample_id for key in read_records(tmp_path)] == ["1+1", "3+3"]


def test_a_file_with_nothing_but_a_half_written_line_becomes_empty(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_bytes(b'{"task": "' + b"x" * 200_000)
    with appending(tmp_path):
        pass
    assert (tmp_path / "samples.jsonl").read_bytes() == b""


@pytest.mark.parametrize("line", [b"garbage\n", b"{}\n", b'{"version": 1, "task": "addition"}\n', b'"text"\n'])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, make_record: Callable, line: bytes) -> None:
    with appending(tmp_path) as file:
        append(file, make_record("1+1", "correct"))
        file.write(line)
        append(file, make_record("2+2", "correct"))
    with pytest.raises(DataError, match=r"samples\.jsonl:2"):
        read_records(tmp_path)


def test_records_of_another_version_are_refused(tmp_path: Path, make_record: Callable) -> None:
    with appending(tmp_path) as file:
        append(file, make_record("1+1", "correct", version=99))
    with pytest.raises(DataError, match="version 99, this program reads 1"):
        read_records(tmp_path)


def test_a_json_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    path.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_json(path)
