"""The header of one message: who speaks, to whom, on which channel, in which format.

Here: `read_header` for headers that <|message|> closed, `split_unclosed` for those it did not. Used by `parse` alone,
whose DEFECTS say what the defect names mean.

Three dialects exist, and all are read:
    assistant<|channel|>commentary to=functions.f <|constrain|>json     what the model itself writes
    assistant to=functions.f<|channel|>commentary <|constrain|>json     openai-harmony's renderer
    assistant to=functions.f<|channel|>commentary json                  the chat template of Hugging Face
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from gptoss_infer.harmony.conversation import CHANNELS
from gptoss_infer.harmony.vocabulary import CHANNEL, CONSTRAIN, FIRST_SPECIAL, VOCABULARY_SIZE, decode_checked

# Where a header begins: behind the prompt's `<|start|>assistant`, behind a <|start|>, or where that was left out.
Origin = Literal["prompt", "start", "nowhere"]

_ROLES = ("system", "developer", "user", "assistant")  # any other word is a tool's name
_CONSTRAINED = "<|constrain|>"
_SEPARATORS = re.compile(r"[ \t\n\r\f]+")
_WORD = re.compile(r"[A-Za-z0-9_.:/+-]+")
_TOOL_NAME = re.compile(r"(functions|browser)\..+|python")
_LEADING_ROLE = re.compile(r"\s*(system|developer|user|assistant)(?![A-Za-z])")
_UNCLOSED = re.compile(r"(?:\s*to=(?P<recipient>[\w.-]+))?(?:\s*<\|constrain\|>(?P<format>[a-z]+))?")


@dataclass(slots=True)
class Header:
    """What a header says; `defects` are (position, name)."""

    role: str = "assistant"
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    defects: list[tuple[int, str]] = field(default_factory=list)


class _Segment(NamedTuple):
    marker: int | None
    position: int
    text: str


def read_header(ids: Sequence[int], offset: int, origin: Origin) -> Header:
    """Read the tokens between <|start|> and <|message|>; `offset` is the position of the first."""
    header = Header()
    words: list[tuple[int, str]] = []  # recipient and content type, in order
    for segment in _segments(ids, offset, header):
        found = [word for word in _SEPARATORS.split(segment.text) if word]
        if segment.marker is None:
            found = _take_role(found, segment.position, origin, header)
        elif segment.marker == CHANNEL:
            found = _take_channel(found, segment, header)
        elif not found or segment.text[0].isspace():
            header.defects.append((segment.position, "header_text"))
        else:
            words.append((segment.position, _CONSTRAINED + found.pop(0)))
        words += [(segment.position, word) for word in found]
    for position, word in words:
        _take_word(word, position, header)
    if header.role == "tool" and header.recipient is None:
        header.defects.append((offset, "unknown_role"))
    is_structured_answer = header.channel == "final" and (header.content_type or "").startswith(_CONSTRAINED)
    if header.content_type and header.recipient is None and not is_structured_answer:
        header.defects.append((offset, "content_type_without_recipient"))
    return header


def split_unclosed(ids: Sequence[int], offset: int, origin: Origin) -> tuple[Header, str]:
    """What a header without <|message|> says, and the text that was meant to follow it."""
    header = Header()
    end = ids.index(CHANNEL) if CHANNEL in ids else len(ids)
    before, after = _decode_all(ids[:end], offset, header), _decode_all(ids[end + 1 :], offset + end + 1, header)
    role = _LEADING_ROLE.match(before)
    if role is not None and (origin == "start" or (origin == "nowhere" and role[1] == "assistant")):
        header.role, before = role[1], before[role.end() :]
    elif origin == "start":
        header.defects.append((offset, "missing_role"))
    before = _take_prefix(before, header)
    if end == len(ids):
        return header, before
    header.channel = next((channel for channel in CHANNELS if after.startswith(channel)), None)
    after = _take_prefix(after[len(header.channel or "") :], header)
    return header, before + after


def _segments(ids: Sequence[int], offset: int, header: Header) -> list[_Segment]:
    """The header cut at its markers; the first segment, which has none, holds the role."""
    segments: list[_Segment] = []
    marker: int | None = None
    begin = position = 0
    for i, token in enumerate([*ids, CHANNEL]):
        if token not in (CHANNEL, CONSTRAIN):
            continue
        segments.append(_Segment(marker, offset + position, _decode(ids[begin:i], offset + begin, header)))
        marker, position, begin = token, i, i + 1
    return segments


def _decode(ids: Sequence[int], offset: int, header: Header) -> str:
    """Text of header tokens without special ones, which are defects here."""
    ordinary: list[int] = []
    for i, token in enumerate(ids):
        if 0 <= token < FIRST_SPECIAL:
            ordinary.append(token)
        else:
            known = 0 <= token < VOCABULARY_SIZE
            header.defects.append((offset + i, "header_token" if known else "invalid_token"))
    text, valid = decode_checked(ordinary)
    if not valid:
        header.defects.append((offset, "invalid_utf8"))
    return text


def _decode_all(ids: Sequence[int], offset: int, header: Header) -> str:
    """Text of tokens that are content, whatever was meant; special ones are spelled out."""
    text, valid = decode_checked(ids)
    if not valid:
        header.defects.append((offset, "invalid_utf8"))
    header.defects += [(offset + i, "invalid_token") for i, token in enumerate(ids) if not 0 <= token < VOCABULARY_SIZE]
    return text


def _take_role(words: list[str], position: int, origin: Origin, header: Header) -> list[str]:
    """Set role and name from the first word where it gives them; the words left."""
    if origin == "prompt":
        if words[:1] == ["assistant"]:
            header.defects.append((position, "repeated_role"))
            return words[1:]
        return words
    if not words or words[0].startswith("to="):
        if origin == "start":
            header.defects.append((position, "missing_role"))
        return words
    role, _, name = words[0].partition(":")
    if role in _ROLES:
        header.role, header.name = role, name or None
    elif origin == "start":
        header.role, header.name = "tool", words[0]
        _check(words[0], position, header)
    else:
        return words
    return words[1:]


def _take_channel(words: list[str], segment: _Segment, header: Header) -> list[str]:
    """Set the channel from the first word; the words left."""
    if header.channel is not None:
        header.defects.append((segment.position, "repeated_channel"))
    if not words or words[0].startswith("to="):
        header.defects.append((segment.position, "empty_channel"))
        return words
    if segment.text[0].isspace():
        header.defects.append((segment.position, "header_text"))
    header.channel = words[0]
    _check(words[0], segment.position, header)
    return words[1:]


def _take_word(word: str, position: int, header: Header) -> None:
    """Take a word as recipient or content type, in this order; anything else is a defect."""
    if word.startswith("to="):
        if header.recipient is not None or header.content_type is not None or word == "to=":
            header.defects.append((position, "header_text"))
        header.recipient = header.recipient or word.removeprefix("to=") or None
        _check(word.removeprefix("to="), position, header)
    elif header.recipient is None and _TOOL_NAME.fullmatch(word):
        header.recipient = word
        header.defects.append((position, "recipient_without_to"))
    elif header.content_type is None:
        header.content_type = word
        _check(word.removeprefix(_CONSTRAINED), position, header)
    else:
        header.defects.append((position, "header_text"))


def _take_prefix(text: str, header: Header) -> str:
    """Set recipient and format from the front of unclosed text; the text left."""
    found = _UNCLOSED.match(text)
    if found is None or not found.group().strip():
        return text
    header.recipient = header.recipient or found["recipient"]
    header.content_type = _CONSTRAINED + found["format"] if found["format"] else header.content_type
    return text[found.end() :]


def _check(word: str, position: int, header: Header) -> None:
    if not _WORD.fullmatch(word):
        header.defects.append((position, "header_text"))
