"""What a conversation is: messages as harmony has them, plus what its system and developer messages say.

Here: the data types that `chat`, `render` and `parse` share. Not here: reading them from JSON (`chat`), tokens
(`render`, `parse`). Used by training data, the engine's callers and the evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ReasoningEffort = Literal["low", "medium", "high"]
EFFORTS: tuple[ReasoningEffort, ...] = ("low", "medium", "high")
CHANNELS = ("analysis", "commentary", "final")
FUNCTIONS = "functions."  # the namespace of tools that the user declares
JSON_CONTENT = "<|constrain|>json"  # content type of a call, as the model itself writes it


@dataclass(frozen=True, slots=True)
class Message:
    """One harmony message.

    A tool call is an assistant message with a `recipient`; a tool's answer has the role "tool" and the tool's full name
    ("functions.f") as `name`. `content_type` is as spelled in the header, so "<|constrain|>json" or "json".
    `complete` is False for a parsed message whose end token never came.
    """

    role: str
    content: str
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None
    complete: bool = True

    @property
    def is_call(self) -> bool:
        """Whether this is the assistant calling a tool."""
        return self.role == "assistant" and self.recipient is not None


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call; `parameters` is a JSON schema that has been through `schema.adapt`."""

    name: str
    description: str
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """What the final message is to be, as the model is told; `gptoss_infer.constraints` can hold it to that.

    `schema` is the text of a JSON schema.
    """

    schema: str
    name: str = "answer"
    description: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """User, assistant and tool messages in order; the system and developer messages are made from the other fields.

    `instructions` is the user's system prompt, which harmony puts into the developer message. `date` is YYYY-MM-DD;
    None leaves the date line out. `response_format` is told at the end of the developer message.
    """

    messages: tuple[Message, ...]
    instructions: str | None = None
    tools: tuple[Tool, ...] = ()
    reasoning_effort: ReasoningEffort = "medium"
    date: str | None = None
    response_format: ResponseFormat | None = None
