"""Chat records: what they become, and what is said about those that would lose something."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_infer.errors import DataError, UsageError
from gptoss_infer.harmony import Conversation, Message, conversation_from_chat, render

USER = {"role": "user", "content": "hi"}
RESULT = {"role": "tool", "content": "sunny"}
WEATHER = {"name": "weather", "description": "Weather.", "parameters": {"type": "object", "properties": {}}}


def read(*messages: object, **more: Any) -> Conversation:
    return conversation_from_chat({"messages": list(messages), **more}, date=None)


def call(name: str = "weather", arguments: object = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def assistant(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", **fields}


def call_message(arguments: str, name: str = "weather") -> Message:
    return Message("assistant", arguments, "commentary", f"functions.{name}", "<|constrain|>json")


def result_message(text: str, name: str = "weather") -> Message:
    return Message("tool", text, "commentary", "assistant", name=f"functions.{name}")


def test_thinking_is_analysis_content_is_final_and_system_texts_are_instructions() -> None:
    conversation = read(
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        USER,
        assistant(thinking="hm", content="hello"),
        reasoning_effort="high",
    )
    assert conversation.instructions == "Be brief.\n\nBe kind."
    assert conversation.reasoning_effort == "high"
    assert conversation.messages == (
        Message("user", "hi"),
        Message("assistant", "hm", "analysis"),
        Message("assistant", "hello", "final"),
    )


def test_content_before_calls_is_a_preamble_on_the_commentary_channel() -> None:
    conversation = read(USER, assistant(content="Looking.", tool_calls=[call(arguments={"city": "Köln"})]))
    assert conversation.messages[1:] == (
        Message("assistant", "Looking.", "commentary"),
        call_message('{"city":"Köln"}'),
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"a": [1, None]}, '{"a":[1,null]}'),
        ('{"a": 1}', '{"a": 1}'),  # the model's own spelling is kept
        ("{broken", "{broken"),  # history may hold it; training_samples refuses it
        ("", "{}"),
        (None, "{}"),
    ],
)
def test_arguments_are_encoded_once(arguments: object, text: str) -> None:
    assert read(USER, assistant(tool_calls=[call(arguments=arguments)])).messages[1].content == text


def test_results_find_their_calls_by_id_by_name_or_by_being_alone() -> None:
    two = assistant(tool_calls=[call("a", "1", id="x"), call("b", "2", id="y")])
    by_id = read(
        USER,
        two,
        {"role": "tool", "tool_call_id": "y", "content": "rb"},
        {"role": "tool", "tool_call_id": "x", "content": "ra"},
    )
    by_name = read(
        USER,
        assistant(tool_calls=[{"name": "a", "arguments": "1"}, {"name": "b", "arguments": "2"}]),
        {"role": "tool", "name": "functions.b", "content": "rb"},
        {"role": "tool", "content": "ra"},
    )
    expected = (call_message("1", "a"), result_message("ra", "a"), call_message("2", "b"), result_message("rb", "b"))
    assert by_id.messages[1:] == expected
    assert by_name.messages[1:] == expected


def test_null_and_ignored_keys_change_nothing() -> None:
    padded = {**USER, "name": None, "tool_calls": None, "thinking": None}
    answer = assistant(content="x", tool_calls=[], refusal=None)
    record = {"messages": [padded, answer], "tools": None, "id": 7, "metadata": {"source": "s"}}
    assert conversation_from_chat(record, date=None) == read(USER, assistant(content="x"))


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: {"type": "function", "function": t}, lambda t: {"type": "function", **t}]
)
def test_tools_may_be_bare_or_wrapped(wrap: Any) -> None:
    tools = read(USER, tools=[wrap({**WEATHER, "strict": True})]).tools
    assert [(tool.name, tool.description, tool.parameters) for tool in tools] == [
        ("weather", "Weather.", WEATHER["parameters"])
    ]


def test_the_effort_of_the_record_wins_over_the_default() -> None:
    record: dict[str, Any] = {"messages": [USER]}
    assert conversation_from_chat(record, date=None, reasoning_effort="low").reasoning_effort == "low"
    record["reasoning_effort"] = "high"
    assert conversation_from_chat(record, date=None, reasoning_effort="low").reasoning_effort == "high"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"messages is \[\]; expected a list with at least one entry"),
        (["hi"], r"messages\[0\]: is 'hi'; expected an object"),
        ([{"role": "bot", "content": "x"}], r"messages\[0\]: role is 'bot'; expected one of system, developer, user"),
        ([{"content": "x"}], "role is None"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\] \(user\): content is \['x'\]; expected a string"),
        ([{"role": "user"}], "content is empty"),
        ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
        ([{"role": "system", "content": "x"}], "holds no user or assistant message"),
        ([{"role": "system"}, USER], "has no content"),
        ([USER, {"role": "system", "content": "x"}], r"messages\[1\] \(system\): stands after the conversation began"),
        ([USER, assistant(content="")], "has no content, thinking or tool_calls"),
        ([USER, assistant(thinking="x")], "thinks but does nothing"),
        ([USER, assistant(content="a"), assistant(content="b")], r"the turn, but messages\[2\] \(assistant\) follows"),
        ([USER, assistant(content="a", reasoning="b")], "unknown key 'reasoning' would be dropped.*thinking"),
        ([{**USER, "name": "Ann"}], "unknown key 'name' would be dropped"),
        ([USER, {**RESULT, "name": "f"}], "a tool result without a call: name 'f'; calls still open: none"),
        ([USER, assistant(tool_calls=[call(id="a")]), {**RESULT, "tool_call_id": "b"}], r"open: weather \(a\)"),
        ([USER, assistant(tool_calls=[call(), call()]), RESULT], "2 calls wait for a result"),
        ([USER, assistant(tool_calls=[call()]), USER, RESULT], "a tool result without a call"),
        ([USER, assistant(tool_calls=[call("get weather")])], "function name is 'get weather'"),
        ([USER, assistant(tool_calls=[call(arguments=[1])])], r"tool_calls\[0\] \(weather\): arguments is \[1\]"),
        ([USER, assistant(tool_calls=[call(arguments={"a": float("nan")})])], "cannot be written as JSON"),
        ([USER, assistant(tool_calls=[{"type": "custom", "name": "f"}])], "type is 'custom'; expected 'function'"),
        ([USER, assistant(tool_calls="f")], "tool_calls is 'f'; expected a list"),
    ],
)  # fmt: skip
def test_a_bad_message_is_refused_with_its_place_and_the_cure(messages: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(*messages)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "x"}, "record: unknown key 'prompt' would be dropped"),
        ({"reasoning_effort": "max"}, "reasoning_effort is 'max'; expected one of low, medium, high"),
        ({"tools": [WEATHER, WEATHER]}, r"tools\[1\]: a second tool is named 'weather'"),
        ({"tools": [{**WEATHER, "returns": {}}]}, "unknown key 'returns'"),
        ({"tools": [{"type": "web_search"}]}, "type is 'web_search'"),
        ({"tools": [{**WEATHER, "parameters": {"type": "dict"}}]}, r"tools\[0\] \(weather\).parameters: 'dict' is no"),
        ({"tools": [{**WEATHER, "parameters": "none"}]}, r"tools\[0\].parameters: is 'none'; expected an object"),
        ({"tools": [{**WEATHER, "parameters": {"description": "\ud800"}}]}, "surrogate"),
    ],
)
def test_a_bad_record_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(USER, **fields)


def test_a_record_that_is_no_object_is_refused() -> None:
    with pytest.raises(DataError, match=r"record: is \['x'\]; expected an object"):
        conversation_from_chat(json.loads('["x"]'), date=None)


@pytest.mark.parametrize("date", ["today", "2025-6-28", "2025-02-30", ""])
def test_a_date_that_is_none_is_a_usage_error(date: str) -> None:
    with pytest.raises(UsageError, match="expected YYYY-MM-DD"):
        conversation_from_chat({"messages": [USER]}, date=date)
    with pytest.raises(UsageError, match="reasoning_effort is 'max'"):
        conversation_from_chat({"messages": [USER]}, date=None, reasoning_effort="max")  # type: ignore[arg-type]


JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["tool", "f", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FULL: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "s"},
        USER,
        assistant(thinking="t", tool_calls=[call("f", {"a": 1}, id="x")]),
        {"role": "tool", "tool_call_id": "x", "content": "r"},
        assistant(content="c"),
    ],
    "tools": [
        {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"a": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/B"}]}, "b": {"enum": [1]}},
                "required": ["a"],
                "allOf": [{"properties": {"c": {"type": "array", "items": {"type": ["string", "null"]}}}}],
                "$defs": {"B": {"const": "x"}},
            },
        }
    ],
}


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.data())
def test_any_change_to_a_record_is_read_and_rendered_or_refused_as_data(data: st.DataObject) -> None:
    record = copy.deepcopy(FULL)
    holder: Any = record
    while True:
        key = data.draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        if not isinstance(holder[key], (dict, list)) or not holder[key] or data.draw(st.booleans()):
            break
        holder = holder[key]
    holder[key] = data.draw(JSON_VALUE)
    try:
        conversation = conversation_from_chat(record, date=None)
    except DataError:
        return
    assert render(conversation).token_ids
