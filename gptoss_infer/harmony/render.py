"""Conversations to tokens, with the mask of those a model is trained to produce.

Here: `render` (a prompt, or a conversation as trained on), `training_samples` (one per assistant turn),
`render_answer` (a completion). Not here: reading JSON (`chat`), reading tokens (`parse`). Used by training, the
engine's callers and the evaluations.

Every message but tool calls is rendered by openai-harmony. Calls are rendered here, because openai-harmony puts the
recipient before the channel, while the model itself writes
    <|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>
and is trained and shown its past in that form. Both parse to the same message.

What earlier turns show follows what the model sees at run time: their analysis is dropped once a final message ended
the turn, and that message ends in <|end|>; analysis since the last final message stays, so that a model amid tool
calls keeps its thoughts. (openai-harmony's auto_drop_analysis drops only what precedes the *first* final message, and
nothing amid tool calls; it is not used.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss_infer.errors import DataError
from gptoss_infer.harmony.conversation import FUNCTIONS, JSON_CONTENT, Conversation, Message, ResponseFormat
from gptoss_infer.harmony.vocabulary import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    MESSAGE,
    RETURN,
    START,
    decode,
    encode,
    encoding,
)

if TYPE_CHECKING:
    import openai_harmony as oh

_CONSTRAIN_TEXT = JSON_CONTENT.removesuffix("json")


@dataclass(slots=True)
class Rendered:
    """Tokens of one sample or prompt; the three lists are equally long.

    `loss_mask` marks what the model must produce. `channels` names what such a token belongs to, header and end token
    included: "analysis", "commentary", "final", or "tool_call" for a call; None without loss.
    """

    token_ids: list[int]
    loss_mask: list[bool]
    channels: list[str | None]


def render(conversation: Conversation, *, completion: bool = False) -> Rendered:
    """Tokens of the whole conversation.

    With `completion`, a prompt: it ends in `<|start|>assistant` for the model to continue, and carries no loss.
    Without, the last turn (the assistant and tool messages after the last user message) is rendered as trained on: it
    keeps its analysis, carries loss, and ends in <|return|> if its last message is final.
    """
    parts = _Parts(conversation)
    messages = conversation.messages
    if completion:
        rendered = parts.assemble(len(messages), turn_start=len(messages))
        _append(rendered, parts.header)
        return rendered
    return parts.assemble(len(messages), turn_start=_start_of_last_turn(messages))


def training_samples(conversation: Conversation) -> list[Rendered]:
    """One sample per assistant turn: all that precedes it as the model sees it then, and the turn itself with loss.

    The loss covers exactly what the model must produce. The engine supplies `<|start|>assistant` at the beginning of
    a turn and after each call (with its result, if there is one); the model writes it itself after <|end|>, so there
    it carries loss. The end token always does. Tool results never do, and a sample ends with the turn's last
    assistant message.

    Raises: DataError if there is no assistant turn, or if a call could not be learned from: its arguments are no JSON
        object, or its function is not declared in the tools.
    """
    _check_calls(conversation)
    parts = _Parts(conversation)
    roles = [message.role for message in conversation.messages]
    # A turn's last assistant message is one that no other follows before the next user message.
    samples: list[Rendered] = []
    turn_start, last = 0, None
    for position, role in enumerate([*roles, "user"]):
        if role == "assistant":
            last = position
        elif role == "user":
            if last is not None:
                samples.append(parts.assemble(last + 1, turn_start))
            turn_start, last = position + 1, None
    if not samples:
        raise DataError("the conversation has no assistant message, so there is nothing to learn from it")
    return samples


def render_answer(messages: Sequence[Message]) -> list[int]:
    """Tokens of a completion that says these assistant messages: what follows the prompt's `<|start|>assistant`.

    The last message ends in <|call|> if it is a call and otherwise in <|return|>, whatever its channel; it has no end
    token if it is not `complete`.
    """
    tokens = [token for message in messages for token in _encode_message(message)]
    tokens = tokens[len([START, *encode("assistant")]) :]
    if not messages:
        return [RETURN]
    last = messages[-1]
    if not last.complete:
        return tokens[:-1]
    return tokens if last.is_call else [*tokens[:-1], RETURN]


class _Parts:
    """A conversation's tokens, message by message, so that each is encoded once however many samples hold it."""

    def __init__(self, conversation: Conversation) -> None:
        self.header = [START, *encode("assistant")]
        self._messages = conversation.messages
        self._preface = _preface(conversation)
        self._encoded = [_encode_message(message) for message in conversation.messages]

    def assemble(self, stop: int, turn_start: int) -> Rendered:
        """Messages up to `stop`, those from `turn_start` on as trained on."""
        rendered = Rendered([], [], [])
        _append(rendered, self._preface)
        finals = [i for i in range(turn_start) if self._messages[i].channel == "final"]
        last_final = finals[-1] if finals else -1
        model_continues = False  # whether the message before was the model's own and did not hand over
        for i, message in enumerate(self._messages[:stop]):
            tokens = self._encoded[i]
            trained = i >= turn_start and message.role == "assistant"
            if i < last_final and message.channel == "analysis":
                continue
            if trained and i == stop - 1 and message.channel == "final":
                tokens = [*tokens[:-1], RETURN]
            supplied = 0 if model_continues else len(self.header)
            if trained:
                _append(rendered, tokens[:supplied])
                _append(rendered, tokens[supplied:], _kind(message))
            else:
                _append(rendered, tokens)
            model_continues = trained and not message.is_call
        return rendered


def _append(rendered: Rendered, token_ids: Sequence[int], channel: str | None = None) -> None:
    """Add tokens, with loss if `channel` is given."""
    rendered.token_ids.extend(token_ids)
    rendered.loss_mask.extend([channel is not None] * len(token_ids))
    rendered.channels.extend([channel] * len(token_ids))


def _start_of_last_turn(messages: Sequence[Message]) -> int:
    return max((i + 1 for i, message in enumerate(messages) if message.role == "user"), default=0)


def _kind(message: Message) -> str:
    """What a trained message counts as in the loss."""
    return "tool_call" if message.is_call else message.channel or "final"


def _preface(conversation: Conversation) -> list[int]:
    """The system message, and the developer message if there are instructions, tools or a response format."""
    import openai_harmony as oh

    system = oh.SystemContent(
        reasoning_effort=oh.ReasoningEffort(conversation.reasoning_effort.capitalize()),
        conversation_start_date=conversation.date,
    )
    options = oh.RenderOptions(conversation_has_function_tools=bool(conversation.tools))
    tokens = encoding().render(oh.Message.from_role_and_content(oh.Role.SYSTEM, system), options)
    told = _developer(conversation, options)
    return tokens + (told if conversation.response_format is None else _add_format(told, conversation.response_format))


def _developer(conversation: Conversation, options: oh.RenderOptions) -> list[int]:
    """The developer message as openai-harmony renders it; empty if there is nothing to tell."""
    import openai_harmony as oh

    if conversation.instructions is None and not conversation.tools:
        return []
    developer = oh.DeveloperContent(instructions=conversation.instructions)
    if conversation.tools:
        developer = developer.with_function_tools(
            [
                oh.ToolDescription(
                    name=tool.name,
                    description=tool.description,
                    parameters=None if tool.parameters is None else dict(tool.parameters),
                )
                for tool in conversation.tools
            ]
        )
    return encoding().render(oh.Message.from_role_and_content(oh.Role.DEVELOPER, developer), options)


def _add_format(developer: Sequence[int], told: ResponseFormat) -> list[int]:
    """The developer message with a response format at its end, which openai-harmony cannot render.

    Encoded anew as a whole, as tokens may span the end of what was there. Source: openai/harmony, docs/format.md.
    """
    header = [START, *encode("developer"), MESSAGE]
    before = decode(developer[len(header) : -1])
    comment = "".join(f"// {line}\n" for line in told.description.splitlines())
    section = f"# Response Formats\n\n## {told.name}\n\n{comment}{told.schema}"
    return [*header, *encode(f"{before}\n\n{section}" if before else section), END]


def _encode_message(message: Message) -> list[int]:
    """One message as history shows it: ending in <|end|>, or <|call|> for a call."""
    import openai_harmony as oh

    if message.is_call:
        return _encode_call(message)
    return encoding().render(
        oh.Message(
            author=oh.Author(role=oh.Role(message.role), name=message.name),
            content=[oh.TextContent(text=message.content)],
            channel=message.channel,
            recipient=message.recipient,
            content_type=message.content_type,
        )
    )


def _encode_call(message: Message) -> list[int]:
    """A tool call as the model writes it: recipient after the channel."""
    tokens = [START, *encode("assistant"), CHANNEL]
    header = f"{message.channel or 'commentary'} to={message.recipient}"
    content_type = message.content_type or ""
    if content_type.startswith(_CONSTRAIN_TEXT):
        tokens += [*encode(f"{header} "), CONSTRAIN, *encode(content_type.removeprefix(_CONSTRAIN_TEXT))]
    else:
        tokens += encode(f"{header} {content_type}".rstrip())
    return [*tokens, MESSAGE, *encode(message.content), CALL]


def _check_calls(conversation: Conversation) -> None:
    """Refuse calls that would teach the model to fail."""
    declared = {tool.name for tool in conversation.tools}
    for message in conversation.messages:
        if not message.is_call or not (message.recipient or "").startswith(FUNCTIONS):
            continue
        name = (message.recipient or "").removeprefix(FUNCTIONS)
        if name not in declared:
            have = ", ".join(sorted(declared)) or "none"
            raise DataError(
                f"the assistant calls {name!r}, which tools does not declare (declared: {have}); add it to tools"
            )
        try:
            arguments = json.loads(message.content)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"arguments of the call to {name!r} are no JSON ({error}): {message.content[:60]!r}"
            ) from error
        if isinstance(arguments, str):
            raise DataError(f"arguments of the call to {name!r} are JSON encoded twice; encode them once")
        if not isinstance(arguments, dict):
            raise DataError(f"arguments of the call to {name!r} are {message.content[:60]!r}; expected a JSON object")
