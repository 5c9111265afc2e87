"""Conversations from JSON in the OpenAI chat shape, checked so that nothing in them is lost in silence.

Here: `conversation_from_chat`. Not here: tokens (`render`), what a tool's parameters look like to the model (`schema`).
Used by training data, the command line and the evaluations.

A record is {"messages": [...], "tools": [...], "reasoning_effort": "low|medium|high"}; "id" and "metadata" are allowed
and ignored. Roles are system, developer, user, assistant and tool. An assistant message has "content", "thinking" and
"tool_calls"; with calls, its content is what the user reads before them (a preamble). A key whose value is null counts
as absent, because columnar stores add such keys. Everything else that would be dropped is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date as Date
from typing import Any

from gptoss_infer.errors import DataError, UsageError
from gptoss_infer.harmony.conversation import (
    EFFORTS,
    FUNCTIONS,
    JSON_CONTENT,
    Conversation,
    Message,
    ReasoningEffort,
    Tool,
)
from gptoss_infer.harmony.schema import adapt

_RECORD_KEYS = ("messages", "tools", "reasoning_effort", "id", "metadata")
_MESSAGE_KEYS = {
    "system": ("role", "content"),
    "developer": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "thinking", "tool_calls"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
_FUNCTION_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def conversation_from_chat(
    record: Mapping[str, Any], *, date: str | None, reasoning_effort: ReasoningEffort = "medium"
) -> Conversation:
    """The conversation in one record of chat data.

    System and developer texts at the start become the instructions, joined by a blank line. Each tool result is put
    right after its call, as at run time, where the model makes one call and waits.

    Args:
        date: the "Current date" the model reads, YYYY-MM-DD; None for none. Pinned by the caller, because a prompt that
            changes daily can be neither cached nor repeated.
        reasoning_effort: for records that do not say.
    Raises: DataError naming what is wrong in the record and where; UsageError for a bad `date` or `reasoning_effort`.
    """
    if date is not None and not _is_date(date):
        raise UsageError(f"date is {date!r}; expected YYYY-MM-DD, such as 2025-06-28")
    if reasoning_effort not in EFFORTS:
        raise UsageError(f"reasoning_effort is {reasoning_effort!r}; expected one of {', '.join(EFFORTS)}")
    fields = _object(record, "record", _RECORD_KEYS)
    effort = fields.get("reasoning_effort", reasoning_effort)
    if effort not in EFFORTS:
        raise DataError(f"reasoning_effort is {effort!r}; expected one of {', '.join(EFFORTS)}")
    entries = [_Entry.read(message, f"messages[{i}]") for i, message in enumerate(_array(fields, "messages", "record"))]
    instructions = [
        entry.content for entry in entries if entry.role in ("system", "developer") and entry.content.strip()
    ]
    return Conversation(
        messages=tuple(_messages(_body(entries))),
        instructions="\n\n".join(instructions) or None,
        tools=_tools(fields),
        reasoning_effort=effort,
        date=date,
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    """One chat message after its keys and types were checked; absent texts are empty."""

    where: str
    role: str
    content: str
    thinking: str
    calls: tuple[_Call, ...]
    name: str | None
    call_id: str | None

    @classmethod
    def read(cls, message: object, where: str) -> _Entry:
        fields = _object(message, where, None)
        role = fields.get("role")
        if not isinstance(role, str) or role not in _MESSAGE_KEYS:
            raise DataError(f"{where}: role is {_short(role)}; expected one of {', '.join(_MESSAGE_KEYS)}")
        where = f"{where} ({role})"
        fields = _object(message, where, _MESSAGE_KEYS[role])
        entry = cls(
            where=where,
            role=role,
            content=_text(fields, "content", where),
            thinking=_text(fields, "thinking", where),
            calls=tuple(_calls(fields, where)),
            name=_text(fields, "name", where) or None,
            call_id=_text(fields, "tool_call_id", where) or None,
        )
        if role == "assistant" and not (entry.content or entry.thinking or entry.calls):
            raise DataError(f"{where}: has no content, thinking or tool_calls; give it one or remove the message")
        if role == "user" and not entry.content:
            raise DataError(f"{where}: content is empty; give the user's text or remove the message")
        if role in ("system", "developer", "tool") and "content" not in fields:
            raise DataError(f"{where}: has no content; expected a string, which may be empty")
        return entry


@dataclass(slots=True)
class _Call:
    """A tool call, and its result once that is found."""

    message: Message
    function: str
    call_id: str | None
    result: Message | None = None


def _body(entries: Sequence[_Entry]) -> list[_Entry]:
    """The entries after the leading system and developer messages, in an order that harmony can say."""
    start = next((i for i, entry in enumerate(entries) if entry.role not in ("system", "developer")), len(entries))
    body = list(entries[start:])
    if not body:
        raise DataError("messages holds no user or assistant message; add what the conversation is about")
    for entry, following in zip(body, [*body[1:], None], strict=True):
        if entry.role in ("system", "developer"):
            raise DataError(
                f"{entry.where}: stands after the conversation began; move it to the start or into a user message"
            )
        if entry.role != "assistant" or entry.calls:
            continue
        if entry.content and following is not None and following.role != "user":
            raise DataError(
                f"{entry.where}: its content ends the turn, but {following.where} follows; "
                "put text and tool_calls into one message, or a user message between"
            )
        if not entry.content and (following is None or following.role != "assistant"):
            raise DataError(f"{entry.where}: thinks but does nothing; add content or tool_calls, or remove the message")
    return body


def _messages(body: Sequence[_Entry]) -> Iterator[Message]:
    """Harmony messages in order, each result right behind its call."""
    ordered: list[Message | _Call] = []
    calls: list[_Call] = []  # of the current turn
    for entry in body:
        if entry.role == "user":
            calls = []
            ordered.append(Message("user", entry.content))
        elif entry.role == "tool":
            call = _answered_call(entry, calls)
            call.result = Message(
                "tool", entry.content, channel="commentary", recipient="assistant", name=FUNCTIONS + call.function
            )
        else:
            if entry.thinking:
                ordered.append(Message("assistant", entry.thinking, channel="analysis"))
            if entry.content:
                ordered.append(Message("assistant", entry.content, channel="commentary" if entry.calls else "final"))
            ordered.extend(entry.calls)
            calls.extend(entry.calls)
    for item in ordered:
        if isinstance(item, Message):
            yield item
            continue
        yield item.message
        if item.result is not None:
            yield item.result


def _answered_call(entry: _Entry, calls: Sequence[_Call]) -> _Call:
    """The call of this turn that a tool message answers: by id, else by name, else the only one open."""
    waiting = [call for call in calls if call.result is None]
    name = entry.name.removeprefix(FUNCTIONS) if entry.name else None
    found = [call for call in waiting if name in (None, call.function)]
    if entry.call_id is not None and any(call.call_id is not None for call in calls):
        found = [call for call in found if call.call_id == entry.call_id]
    elif name is None and len(found) > 1:
        raise DataError(f"{entry.where}: {len(found)} calls wait for a result; say which by tool_call_id or name")
    if not found:
        said = ", ".join(
            f"{key} {value!r}" for key, value in (("tool_call_id", entry.call_id), ("name", name)) if value
        )
        have = (
            ", ".join(f"{call.function}" + (f" ({call.call_id})" if call.call_id else "") for call in waiting) or "none"
        )
        raise DataError(
            f"{entry.where}: a tool result without a call{f': {said}' if said else ''}; calls still open: {have}"
        )
    return found[0]


def _calls(fields: Mapping[str, Any], where: str) -> Iterator[_Call]:
    for i, raw in enumerate(_array(fields, "tool_calls", where) if fields.get("tool_calls") else ()):
        here = f"{where}.tool_calls[{i}]"
        call = _object(raw, here, ("id", "type", "function", "name", "arguments", "index"))
        if call.get("type", "function") != "function":
            raise DataError(f"{here}: type is {_short(call['type'])}; expected 'function'")
        function = _object(call["function"], f"{here}.function", ("name", "arguments")) if "function" in call else call
        name = _function_name(function, here)
        message = Message(
            "assistant",
            _arguments(function.get("arguments"), f"{here} ({name})"),
            channel="commentary",
            recipient=FUNCTIONS + name,
            content_type=JSON_CONTENT,
        )
        yield _Call(message, name, _text(call, "id", here) or None)


def _arguments(arguments: object, where: str) -> str:
    """The JSON text of a call's arguments. A string is that text already: encoding it again is a classic bug."""
    if arguments is None or arguments == "":
        return "{}"
    if isinstance(arguments, str):
        return _encodable(arguments, f"{where}.arguments")
    if not isinstance(arguments, Mapping):
        raise DataError(f"{where}: arguments is {_short(arguments)}; expected an object, or its JSON text as a string")
    try:
        text = json.dumps(dict(arguments), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: arguments cannot be written as JSON: {error}") from error
    return _encodable(text, f"{where}.arguments")


def _tools(fields: Mapping[str, Any]) -> tuple[Tool, ...]:
    tools: list[Tool] = []
    for i, raw in enumerate(_array(fields, "tools", "record") if fields.get("tools") else ()):
        where = f"tools[{i}]"
        outer = _object(raw, where, ("type", "function", "name", "description", "parameters", "strict"))
        if outer.get("type", "function") != "function":
            raise DataError(f"{where}: type is {_short(outer['type'])}; expected 'function'")
        function = outer
        if "function" in outer:
            function = _object(outer["function"], f"{where}.function", ("name", "description", "parameters", "strict"))
        name = _function_name(function, where)
        if any(tool.name == name for tool in tools):
            raise DataError(f"{where}: a second tool is named {name!r}; names must differ")
        parameters = function.get("parameters")
        if parameters is not None:
            parameters = adapt(_object(parameters, f"{where}.parameters", None), f"{where} ({name}).parameters")
            _encodable(json.dumps(parameters, ensure_ascii=False), f"{where}.parameters")
        tools.append(Tool(name, _text(function, "description", where), parameters))
    return tuple(tools)


def _function_name(fields: Mapping[str, Any], where: str) -> str:
    name = _text(fields, "name", where).removeprefix(FUNCTIONS)
    if not _FUNCTION_NAME.fullmatch(name):
        raise DataError(f"{where}: function name is {name!r}; expected letters, digits, '_', '-' and '.' only")
    return name


def _object(value: object, where: str, keys: Sequence[str] | None) -> dict[str, Any]:
    """A JSON object without its null entries; with `keys`, those and no others."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: is {_short(value)}; expected an object")
    fields = {key: entry for key, entry in value.items() if entry is not None}
    unknown = sorted(str(key) for key in fields if keys is not None and key not in keys)
    if unknown and keys is not None:
        raise DataError(
            f"{where}: unknown key {unknown[0]!r} would be dropped; remove it or use one of {', '.join(keys)}"
        )
    return fields


def _array(fields: Mapping[str, Any], key: str, where: str) -> list[object]:
    value = fields.get(key)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        raise DataError(f"{where}: {key} is {_short(value)}; expected a list with at least one entry")
    return list(value)


def _text(fields: Mapping[str, Any], key: str, where: str) -> str:
    value = fields.get(key, "")
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} is {_short(value)}; expected a string (join the text of content parts)")
    return _encodable(value, f"{where}.{key}")


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start} is half of a surrogate pair ({text[error.start]!a}), which is no text; "
            "repair the encoding of the source"
        ) from error
    return text


def _is_date(text: str) -> bool:
    try:
        return Date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
