"""Tool parameters as openai-harmony's TypeScript: what it would lose is said otherwise, what it knows is left alone."""

from __future__ import annotations

import copy
import enum
from typing import Any, Literal

import openai_harmony as oh
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_infer.errors import DataError
from gptoss_infer.harmony.schema import adapt
from gptoss_infer.harmony.vocabulary import encoding


def typescript(parameters: dict[str, Any]) -> str:
    """The argument type that openai-harmony renders for `parameters`."""
    tool = oh.ToolDescription(name="f", description="", parameters=parameters)
    developer = oh.DeveloperContent().with_function_tools([tool])
    tokens = encoding().render(oh.Message.from_role_and_content(oh.Role.DEVELOPER, developer))
    text = encoding().decode(tokens)
    return text[text.index("(_: ") + 4 : text.rindex(") => any;")]


def field(schema: dict[str, Any], **definitions: Any) -> str:
    """How one required field `x` of this schema reads."""
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"], "$defs": definitions}
    return typescript(adapt(parameters)).removeprefix("{\n").removesuffix("\n}")


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "x: string | null,"),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "x: number | string,"),
        ({"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]}, 'x: "a" | "b" | null,'),
        ({"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]}, "x: string[] | null,"),
        ({"anyOf": [{"type": "string"}]}, "x: string,"),
        ({"const": "on"}, 'x: "on",'),
        ({"const": 5}, "x: 5,"),
        ({"const": None}, "x: null,"),
        ({"type": "integer", "enum": [1, 2, 3]}, "x: 1 | 2 | 3,"),
        ({"enum": ["a", 1, None, True]}, 'x: "a" | 1 | null | true,'),
        ({"enum": ["a", "b"]}, 'x: "a" | "b",'),
        ({"type": "null"}, "x: null,"),
        ({"type": ["string", "null"]}, "x: string | null,"),
        ({"items": {"type": "string"}}, "x: string[],"),
        ({"type": "array", "items": {"type": "integer", "enum": [1, 2]}}, "x: (1 | 2)[],"),
        ({"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}, "x: (number | null)[],"),
        ({"properties": {"y": {"type": "string"}}}, "x: {\n    y?: string,\n    },"),
        ({"type": "string", "description": "one\ntwo"}, "// one\n// two\nx: string,"),
        ({"type": "string", "default": "a\nb"}, 'x: string, // default: "a\\nb"'),
        ({"type": "integer", "default": None}, "x: number, // default: null"),
        ({"allOf": [{"type": "string"}], "description": "d"}, "// d\nx: string,"),
        ({"allOf": [{"type": "integer"}, {"type": "number"}]}, "x: number,"),
        ({"type": "array", "items": [{"type": "number"}, {"type": "string"}]}, "x: (number | string)[],"),
        (True, "x: any,"),
    ],
)
def test_a_type_that_openai_harmony_would_lose_is_written_out(schema: dict[str, Any], expected: str) -> None:
    assert field(schema).strip() == expected


def test_references_are_resolved_and_their_neighbours_kept() -> None:
    size = {"type": "string", "enum": ["S", "L"], "description": "generic"}
    assert field({"$ref": "#/$defs/Size", "description": "shirt"}, Size=size) == '// shirt\nx: "S" | "L",'
    assert field({"$ref": "#/$defs/a~1b%20c"}, **{"a/b c": {"type": "boolean"}}) == "x: boolean,"


def test_all_of_joins_fields_and_requirements() -> None:
    base = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    schema = {"allOf": [{"$ref": "#/$defs/Base"}, {"properties": {"b": {"type": "number"}}}]}
    assert field(schema, Base=base) == "x: {\n    a: string,\n    b?: number,\n    },"


def test_any_of_between_objects_shows_both() -> None:
    cat = {"type": "object", "properties": {"lives": {"type": "integer"}}, "required": ["lives"]}
    text = field({"anyOf": [{"$ref": "#/$defs/Cat"}, {"type": "null"}, {"type": "string"}]}, Cat=cat)
    lines = [line.strip() for line in text.splitlines()]
    assert lines == ["x:", "| {", "lives: number,", "}", "| null", "| string", ","]


def test_any_of_beside_fields_adds_them_to_each_variant_unless_it_only_bounds() -> None:
    fields = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}}
    bounds = {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}
    assert typescript(adapt({**fields, **bounds})) == "{\na?: string,\nb?: string,\n}"
    variants = {"anyOf": [{"properties": {"c": {"type": "string"}}}, {"properties": {"d": {"type": "string"}}}]}
    text = typescript(adapt({**fields, **variants}))
    assert [text.count(f"{name}?: string") for name in "abcd"] == [2, 2, 1, 1]


def test_a_type_that_contains_itself_is_cut_where_it_repeats() -> None:
    tree = {
        "type": "object",
        "properties": {"value": {"type": "number"}, "left": {"$ref": "#/$defs/Tree"}},
        "required": ["value"],
    }
    assert field({"$ref": "#/$defs/Tree"}, Tree=tree) == (
        "x: {\n    value: number,\n    // same type as Tree\n    left?: any,\n    },"
    )


class Unit(enum.IntEnum):
    METRE = 1
    FOOT = 2


class Place(pydantic.BaseModel):
    """Where.

    In two lines.
    """

    name: str
    inside: Place | None = None


class Arguments(pydantic.BaseModel):
    place: Place
    unit: Unit = Unit.METRE
    mode: Literal["walk", "drive"] | None = None
    tags: list[str | int] = pydantic.Field(default_factory=list, description="Labels.\nAny.")


def test_a_pydantic_model_reads_as_its_fields_with_every_comment_line_commented() -> None:
    text = typescript(adapt(Arguments.model_json_schema()))
    lines = [line.strip() for line in text.splitlines()]
    assert {"unit?: 1 | 2, // default: 1", 'mode?: "walk" | "drive" | null, // default: null'} <= set(lines)
    assert "tags?: (string | number)[]," in lines
    code = [line for line in lines if not line.startswith("//")]
    assert all(line.endswith((",", "{", "}")) or " // " in line for line in code), code


SIMPLE = st.sampled_from([{"type": name} for name in ("string", "number", "integer", "boolean")])
TEXT = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=1, max_size=8)
LEAF = SIMPLE | st.fixed_dictionaries(
    {"type": st.just("string"), "enum": st.lists(TEXT, min_size=1, max_size=3)},
    optional={"description": TEXT, "title": TEXT, "default": TEXT, "nullable": st.just(True)},
)
KNOWN = st.recursive(
    LEAF | st.just({"type": ["number", "string"]}) | st.just({"type": "array"}),
    lambda inner: (
        inner.map(lambda items: {"type": "array", "items": items})
        | st.lists(inner, min_size=1, max_size=3).map(lambda variants: {"oneOf": variants})
        | st.dictionaries(TEXT, inner, max_size=3).map(lambda fields: {"type": "object", "properties": fields})
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(TEXT, KNOWN, max_size=3))
def test_what_openai_harmony_knows_reads_the_same_after_adapting(fields: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": fields}
    before = copy.deepcopy(schema)
    assert typescript(adapt(schema)) == typescript(schema)
    assert schema == before


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "dict"}, r"parameters\.x: 'dict' is no JSON schema type; expected one of string"),
        ({"$ref": "#/$defs/Nope"}, "leads nowhere"),
        ({"$ref": "https://example.org/schema"}, "points outside"),
        ({"allOf": [{"type": "string"}, {"type": "object"}]}, "joins type 'string' with 'object'"),
        ({"anyOf": []}, "anyOf is \\[\\]; expected a list"),
        ("string", "'string' is no JSON schema"),
        ({"$ref": "#/properties/x"}, None),
        ({"allOf": [{"$ref": "#/properties/x"}]}, "leads back to itself"),
    ],
)
def test_a_schema_that_means_nothing_is_refused_with_its_place(schema: Any, message: str | None) -> None:
    parameters = {"type": "object", "properties": {"x": schema}}
    if message is None:
        assert "same type as x" in typescript(adapt(parameters))
        return
    with pytest.raises(DataError, match=message):
        adapt(parameters)


def test_a_schema_that_explodes_is_refused_at_once() -> None:
    definitions = {f"D{i}": {"properties": {name: {"$ref": f"#/$defs/D{i + 1}"} for name in "abcd"}} for i in range(30)}
    definitions["D30"] = {"type": "string"}
    with pytest.raises(DataError, match="simplify"):
        adapt({"$ref": "#/$defs/D0", "$defs": definitions})
    deep: dict[str, Any] = {}
    for _ in range(2000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(DataError, match="64 levels"):
        adapt(deep)
