"""The YAML of recipes: 1.2 scalars, and what is refused where stock PyYAML guesses, merges or expands."""

from __future__ import annotations

import contextlib
import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_infer.errors import UsageError
from gptoss_train.yaml_strict import MAX_BYTES, MAX_DEPTH, Value, dump, parse, parse_scalar

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=12
)


def frozen(value: object) -> object:
    """Lists as tuples, as `parse` gives them."""
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, list) else value


# The expectations are YAML 1.2.2's core schema, with booleans and nulls in lower case alone.
SPELLINGS: list[tuple[str, Value]] = [
    ("1e-4", 1e-4),
    ("1E5", 1e5),
    ("+.5", 0.5),
    ("3.", 3.0),
    ("-0.0", -0.0),
    ("012", 12),
    ("-7", -7),
    ("0x1F", 31),
    ("0o17", 15),
    (".inf", math.inf),
    ("-.inf", -math.inf),
    ("true", True),
    ("false", False),
    ("null", None),
    ("~", None),
    ("", None),
    *((text, text) for text in ("no", "yes", "on", "off", "y", "n", "No", "True", "FALSE", "Null", "NULL")),
    *(
        (text, text)
        for text in ("1_000", "12:30:45", "2025-06-28", "0b11", "1e", "e3", ".", "-", "1.2.3", "nan", "inf")
    ),
    ("'no'", "no"),
    ('"1e-4"', "1e-4"),
]


@pytest.mark.parametrize(("text", "want"), SPELLINGS)
def test_a_scalar_means_what_yaml_1_2_says_in_a_file_and_on_the_command_line(text: str, want: Value) -> None:
    if text != "-":  # a dash alone opens a list in a file
        got = parse(f"key: {text}\n".encode(), "f").data
        assert repr(got) == repr({"key": want})
    assert repr(parse_scalar(text)) == repr(want)


def test_keys_follow_the_same_rules_so_that_no_is_a_name() -> None:
    assert parse(b"no: 1\non: 2\n", "f").data == {"no": 1, "on": 2}


@given(value=VALUES)
def test_what_is_dumped_reads_back_equal(value: object) -> None:
    document = parse(dump(value).encode(), "f")
    assert document.problems == []
    assert repr(document.data) == repr(frozen(value))


@given(value=st.dictionaries(TEXT, VALUES, max_size=3))
def test_json_is_read_as_json_reads_it(value: dict) -> None:
    text = json.dumps(value, allow_nan=False) if math.inf not in floats(value) else dump(value)
    want = frozen(json.loads(text)) if text.startswith("{") else frozen(value)
    assert repr(parse(text.encode(), "f").data) == repr(want)


def floats(value: object) -> list[float]:
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [number for item in items for number in floats(item)]
    return [abs(value)] if isinstance(value, float) else []


@given(raw=st.binary(max_size=60) | st.text("ab:- []{}&*!#|>'\"\n\t%@,?", max_size=60).map(str.encode))
def test_garbage_is_a_usage_error_or_a_document_never_a_traceback(raw: bytes) -> None:
    with contextlib.suppress(UsageError):
        parse(raw, "f")


def test_command_line_values_may_be_lists_and_keep_characters_that_yaml_would_eat() -> None:
    assert parse_scalar("[q_proj, 1e-4]") == ("q_proj", 1e-4)
    assert parse_scalar("{gsm8k: a.jsonl}") == {"gsm8k": "a.jsonl"}
    assert parse_scalar("my file #1: a.jsonl") == "my file #1: a.jsonl"
    assert parse_scalar("<|start|>assistant") == "<|start|>assistant"


@pytest.mark.parametrize("text", ["[a, b", "{a: *b}", "'open"])
def test_a_command_line_value_that_is_no_yaml_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_scalar(text)


def test_every_duplicate_alias_and_tag_is_named_with_its_line_in_one_pass() -> None:
    document = parse(b"a: &x 1\nb: *x\na: 2\nc: !!python/object:os.system {}\n3: d\n", "f.yaml")
    assert [(problem.location.label, problem.path) for problem in document.problems] == [
        ("f.yaml:2", ("b",)),
        ("f.yaml:3", ("a",)),
        ("f.yaml:4", ("c",)),
        ("f.yaml:5", ()),
    ]
    assert "alias *x" in document.problems[0].text
    assert "first given at f.yaml:1" in document.problems[1].text
    assert "python/object" in document.problems[2].text


def test_a_bomb_of_aliases_costs_nothing() -> None:
    bomb = b"a0: &a0 [x, x]\n" + b"".join(
        b"a%d: &a%d [%s]\n" % (level, level, b", ".join([b"*a%d" % (level - 1)] * 9)) for level in range(1, 40)
    )
    started = time.monotonic()
    document = parse(bomb, "f")
    assert time.monotonic() - started < 1
    assert len(document.problems) == 39 * 9


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "f: empty"),
        (b"# nothing\n", "f: empty"),
        (b"a: [1, 2\nb: 3\n", "f:2:2: not valid YAML"),
        (b"a:\n\tb: 1\n", "f:2:1: not valid YAML"),
        (b"a: 1\n---\nb: 2\n", "f:2:1: not valid YAML"),
        (b"a: b\nc: \xff\n", "f:2: byte 0xff is not UTF-8"),
        (b"a: \x00\n", "f: not valid YAML"),
        (b"a: " + b"[" * (MAX_DEPTH + 1), "f:1:19: not valid YAML: more than 16 levels"),
        (b"#" * (MAX_BYTES + 1), "f: larger than 1048576 bytes"),
    ],
)
def test_what_is_no_document_is_refused_with_its_place(raw: bytes, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(raw, "f")
    assert str(caught.value).startswith(message)


def test_line_breaks_that_only_yaml_1_1_knows_survive_in_text() -> None:
    value = {"a": "\x85 b\u2028", "\u2029": "c\n"}
    assert parse(dump(value).encode(), "f").data == value


def test_escaped_surrogate_pairs_are_one_character_and_halves_are_refused() -> None:
    assert parse(rb'{"a": "\ud83d\ude00"}', "f").data == {"a": "\N{GRINNING FACE}"}
    (problem,) = parse(rb'{"a": "\ud83d"}', "f").problems
    assert "half a surrogate pair" in problem.text


def test_each_key_and_item_has_its_line_and_a_byte_order_mark_is_no_part_of_it() -> None:
    document = parse("\ufeffa:\n  - 1\n  - b: 2\n".encode(), "f")
    assert {path: location.label for path, location in document.locations.items()} == {
        ("a",): "f:1",
        ("a", 0): "f:2",
        ("a", 1): "f:3",
        ("a", 1, "b"): "f:3",
    }
