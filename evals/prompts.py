"""From a question to prompt tokens, and from a completion to messages and a verdict; the only file here that knows
harmony.

Used by `evals.runner`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from evals.grading import settle
from evals.settings import Question
from evals.task import Call, Grade, Reply
from gptoss_infer import harmony
from gptoss_infer.harmony.vocabulary import encoding

if TYPE_CHECKING:
    from gptoss_infer.engine import Completion


class Reading(NamedTuple):
    """What was read from a completion. `well_formed` says that it stopped by itself and has no defect; None that this
    cannot be known, as a server took the answer apart."""

    grade: Grade
    messages: list[dict[str, str | None]]
    defects: list[str]
    well_formed: bool | None


class Prompter:
    """Renders and reads with one date and one forced header.

    `header` follows `<|start|>assistant` and is written with control tokens, such as "<|channel|>final<|message|>". It
    is put behind every prompt, and in front of every completion when that is read.
    """

    def __init__(self, *, date: str | None, header: str | None) -> None:
        self.date = date
        self.header_ids = encoding().encode(header, allowed_special="all") if header else []

    def chat(self, question: Question) -> dict[str, Any]:
        """The chat record of a question, with the effort that it is asked at."""
        chat = question.sample.chat
        return {**chat, "reasoning_effort": chat.get("reasoning_effort") or question.effort}

    def render(self, question: Question) -> list[int]:
        """Prompt tokens, the header included."""
        conversation = harmony.conversation_from_chat(self.chat(question), date=self.date)
        return [*harmony.render(conversation, completion=True).token_ids, *self.header_ids]

    def read(self, question: Question, completion: Completion) -> Reading:
        """The messages of a completion and its outcome."""
        from gptoss_infer.remote import RemoteCompletion

        parsed = harmony.parse([*self.header_ids, *completion.token_ids])
        defects = [str(defect) for defect in parsed.defects]
        reply = Reply(parsed.final, tuple(Call(call.name, call.arguments) for call in parsed.tool_calls))
        grade = settle(question.task, question.sample, reply, finish_reason=completion.finish_reason, defects=defects)
        messages = [
            {
                "role": message.role,
                "channel": message.channel,
                "recipient": message.recipient,
                "content": message.content,
            }
            for message in parsed.messages
        ]
        if isinstance(completion, RemoteCompletion) and completion.source == "parts":
            return Reading(grade, messages, defects, None)
        return Reading(grade, messages, defects, parsed.well_formed and completion.finish_reason == "stop")
