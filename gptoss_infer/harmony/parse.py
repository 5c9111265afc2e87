"""Tokens to messages, for anything a model may emit: never an exception, always what could be read and what was wrong.

Here: `parse` and the list of DEFECTS. Not here: reading one message's header (`header`), tokens from messages
(`render`). Used by the command line, the server and the evaluations, which score defects.

It works on token ids, where control tokens cannot be confused with text that spells them. On tokens without defects
it agrees with openai-harmony's strict parser, except that `<|channel|>final <|constrain|>json<|message|>` is read as
what it says (openai-harmony takes the content type for a recipient).
"""

from __future__ import annotations

import bisect
import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from gptoss_infer.harmony.conversation import CHANNELS, FUNCTIONS, Message
from gptoss_infer.harmony.header import Header, Origin, read_header, split_unclosed
from gptoss_infer.harmony.vocabulary import (
    CALL,
    CHANNEL,
    END,
    END_OF_TEXT,
    FIRST_SPECIAL,
    MESSAGE,
    RETURN,
    START,
    VOCABULARY_SIZE,
    decode_checked,
)

Stop = Literal["return", "call", "end_of_text"]

DEFECTS: Final[Mapping[str, str]] = {
    "after_stop": "tokens follow a stop token, where generation should have ended",
    "call_outside_commentary": "a function is called on another channel than commentary",
    "content_type_without_recipient": "a format is named, but nobody to read it, as in `<|channel|>analysis code`",
    "empty_channel": "<|channel|> is followed by no name",
    "end_of_text": "<|endoftext|> inside a message",
    "header_text": "words in a header that belong to none of its parts, or stand in the wrong order",
    "header_token": "a special token in a header that has no place there",
    "invalid_token": "an id outside the vocabulary",
    "invalid_utf8": "bytes that are no UTF-8 text",
    "missing_channel": "an assistant message without <|channel|>",
    "missing_end": "a message begins before the one before it ended",
    "missing_message": "a header without <|message|>; what follows is read as text",
    "missing_role": "a header without a role",
    "missing_start": "a message without <|start|>",
    "recipient_without_to": "a recipient without `to=`",
    "repeated_channel": "a header with two channels; the last counts",
    "repeated_role": "the model wrote the role that the prompt had already given",
    "repeated_start": "<|start|> twice in a row",
    "special_in_content": "a special token inside a message, kept as text",
    "stray_stop": "an end or stop token outside any message",
    "truncated": "the tokens end inside a message, or a completion without a stop token",
    "unexpected_role": "a completion that speaks for somebody else than the assistant",
    "unknown_channel": "a channel other than analysis, commentary and final",
    "unknown_role": "a role that is neither known nor a tool's answer",
    "wrong_end": "<|end|>, <|return|> or <|call|> where another of them belongs",
}

_STOPS: Final[Mapping[int, Stop]] = {RETURN: "return", CALL: "call", END_OF_TEXT: "end_of_text"}
_CLOSERS = (END, RETURN, CALL, END_OF_TEXT)


class ToolCall(NamedTuple):
    """A call the model made; `name` lacks the "functions." namespace, `arguments` is None if it is no JSON object."""

    name: str
    arguments_text: str
    arguments: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Parsed:
    """What was read.

    `defects` are names from DEFECTS with the token position, such as "missing_end@17". `spans` gives each message's
    tokens as (begin, end), header and end token included; a token outside them is named by a defect at its position.
    `stop` is the kind of the last token, if that is a stop token.
    """

    messages: list[Message]
    defects: list[str]
    spans: list[tuple[int, int]]
    stop: Stop | None

    @property
    def well_formed(self) -> bool:
        """Whether there were no defects; False also for a completion that was cut off."""
        return not self.defects

    @property
    def final(self) -> str | None:
        """Text of the last final message to the user, complete or not; None if there is none."""
        texts = [m.content for m in self.messages if m.role == "assistant" and m.channel == "final" and not m.recipient]
        return texts[-1] if texts else None

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Calls that were written to their end, in order; half a call is not to be run."""
        calls = [m for m in self.messages if m.is_call and m.complete]
        return [
            ToolCall((m.recipient or "").removeprefix(FUNCTIONS), m.content, _json_object(m.content)) for m in calls
        ]


def parse(token_ids: Iterable[int], *, prompt_ended_with_header: bool = True) -> Parsed:
    """The messages in a completion, or in a whole conversation. Never raises on any integers.

    Args:
        token_ids: what the model emitted, its stop token included.
        prompt_ended_with_header: whether the prompt ended in `<|start|>assistant`, so that the tokens are a completion.
            False for tokens that hold whole messages, such as a rendered conversation.
    """
    parser = _Parser([operator.index(token) for token in token_ids], prompt_ended_with_header)
    parser.run()
    stop = _STOPS.get(parser.ids[-1]) if parser.ids else None
    if prompt_ended_with_header and stop is None:
        parser.note("truncated", len(parser.ids))
    defects = [f"{name}@{position}" for position, name in sorted(parser.defects)]
    return Parsed(parser.messages, defects, parser.spans, stop)


class _Parser:
    """One pass over the tokens; each method that reads a message returns the position behind it."""

    def __init__(self, ids: list[int], is_completion: bool) -> None:
        self.ids = ids
        self.messages: list[Message] = []
        self.spans: list[tuple[int, int]] = []
        self.defects: set[tuple[int, str]] = set()
        self._is_completion = is_completion
        self._specials = [i for i, token in enumerate(ids) if not 0 <= token < FIRST_SPECIAL]
        self._boundaries = [i for i in self._specials if ids[i] in (START, MESSAGE, *_CLOSERS)]

    def note(self, defect: str, position: int) -> None:
        """Record a defect."""
        self.defects.add((position, defect))

    def run(self) -> None:
        """Read all tokens."""
        position = 0
        while position < len(self.ids):
            token = self.ids[position]
            follows_prompt = self._is_completion and position == 0
            if token in _CLOSERS:
                self.note("stray_stop", position)
                position = self._behind_closer(position)
            elif token != START:
                if not follows_prompt:
                    self.note("missing_start", position)
                position = self._read_message(position, position, "prompt" if follows_prompt else "nowhere")
            elif follows_prompt or self.ids[position + 1 : position + 2] == [START]:
                self.note("repeated_start", position)
                position += 1
                if follows_prompt and self.ids[1:2] != [START]:
                    position = self._read_message(0, position, "start")
            else:
                position = self._read_message(position, position + 1, "start")

    def _read_message(self, begin: int, header_begin: int, origin: Origin) -> int:
        boundary = self._boundary(header_begin)
        if boundary < len(self.ids) and self.ids[boundary] == MESSAGE:
            header = read_header(self.ids[header_begin:boundary], header_begin, origin)
            self._check_header(header, header_begin)
            text_end, text = self._read_content(boundary + 1)
            self._check_end(header, text_end)
        else:
            self.note("missing_message", header_begin)
            header, text = split_unclosed(self.ids[header_begin:boundary], header_begin, origin)
            text_end = boundary
        self.defects.update(header.defects)
        if self._is_completion and header.role != "assistant":
            self.note("unexpected_role", header_begin)
        end, complete = self._close(text_end)
        self.spans.append((begin, end))
        self.messages.append(
            Message(
                role=header.role,
                content=text,
                channel=header.channel,
                recipient=header.recipient,
                content_type=header.content_type,
                name=header.name,
                complete=complete,
            )
        )
        return end

    def _read_content(self, begin: int) -> tuple[int, str]:
        """The position where the content that starts at `begin` ends, and its text."""
        seen: set[str] = set()
        end = len(self.ids)
        for i in range(bisect.bisect_left(self._specials, begin), len(self._specials)):
            position = self._specials[i]
            token = self.ids[position]
            if token in _CLOSERS:
                end = position
                break
            if token in (START, CHANNEL) and self._opens_message(position):
                self.note("missing_end", position)
                end = position
                break
            defect = "special_in_content" if 0 <= token < VOCABULARY_SIZE else "invalid_token"
            if defect not in seen:  # the first of each kind tells it; a runaway message may hold thousands
                seen.add(defect)
                self.note(defect, position)
        text, valid = decode_checked(self.ids[begin:end])
        if not valid:
            self.note("invalid_utf8", begin)
        return end, text

    def _close(self, position: int) -> tuple[int, bool]:
        """Where the message whose text ends at `position` ends itself, and whether it is complete."""
        if position == len(self.ids):
            self.note("truncated", position)
            return position, False
        closer = self.ids[position]
        if closer == END_OF_TEXT:
            self.note("end_of_text", position)
        return self._behind_closer(position) if closer in _CLOSERS else position, closer in (END, RETURN, CALL)

    def _boundary(self, position: int) -> int:
        """The first position from here on of a token that ends a header."""
        i = bisect.bisect_left(self._boundaries, position)
        return self._boundaries[i] if i < len(self._boundaries) else len(self.ids)

    def _opens_message(self, position: int) -> bool:
        """Whether a header begins here: one that <|message|> closes."""
        boundary = self._boundary(position + 1)
        return boundary < len(self.ids) and self.ids[boundary] == MESSAGE

    def _behind_closer(self, position: int) -> int:
        """The position behind an end or stop token; more tokens there are a defect if it stops generation."""
        token, behind = self.ids[position], position + 1
        if behind < len(self.ids) and token != END and (self._is_completion or token != CALL):
            self.note("after_stop", behind)
        return behind

    def _check_header(self, header: Header, position: int) -> None:
        if header.role != "assistant":
            return
        if header.channel is None:
            self.note("missing_channel", position)
        elif header.channel not in CHANNELS:
            self.note("unknown_channel", position)
        if (header.recipient or "").startswith(FUNCTIONS) and header.channel != "commentary":
            self.note("call_outside_commentary", position)

    def _check_end(self, header: Header, position: int) -> None:
        """Calls end in <|call|>, a final message in <|return|> (once it is history, <|end|>), all else in <|end|>."""
        closer = self.ids[position] if position < len(self.ids) else None
        if closer not in (END, RETURN, CALL):
            return
        if header.role == "assistant" and header.recipient is not None:
            belongs = closer == CALL
        elif header.role == "assistant" and header.channel == "final":
            belongs = closer == RETURN or (closer == END and not self._is_completion)
        else:
            belongs = closer == END
        if not belongs:
            self.note("wrong_end", position)


def _json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is, or None; NaN and Infinity are no JSON."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # not JSON, or nested deeper than any argument is
        return None
    return value if isinstance(value, dict) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
