"""`exact`: any questions of yours whose answer is one exact text; also the reader and grader behind `addition`.

Each line of the file is `{"messages": [...], "answer": "46"}`, with an optional `id` and `tools`. The last message is
the user's (or a tool's), and a reply is correct when the text of its final channel equals the answer, apart from blanks
around.
"""

from __future__ import annotations

from pathlib import Path

from evals.jsonl import read_objects, text_field
from evals.task import Grade, Json, Outcome, Reply, Sample, Task, check_unique
from gptoss_infer.errors import DataError, UsageError


def load(path: Path | None) -> list[Sample]:
    """The samples of a JSON-lines file; ids are its `id` fields, or the line numbers."""
    if path is None:
        raise UsageError("the task 'exact' has no data of its own; give it a file with --data exact=PATH.jsonl")
    samples = [_sample(record, f"{path}:{number}", number) for number, record in read_objects(path)]
    return check_unique(samples, str(path))


def grade(sample: Sample, reply: Reply) -> Grade:
    """Compare the text of the final channel with the gold text, blanks around both left out."""
    given = (reply.final or "").strip()
    if not given:
        return Grade(Outcome.NO_ANSWER, None, "the final message is empty")
    outcome = Outcome.CORRECT if given == str(sample.gold).strip() else Outcome.WRONG
    return Grade(outcome, given, f"expected {sample.gold!r}")


def _sample(record: dict[str, Json], where: str, number: int) -> Sample:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{where}: 'messages' is {messages!r}, expected a list of messages")
    last = messages[-1]
    role = last.get("role") if isinstance(last, dict) else None
    if role not in ("user", "tool"):
        raise DataError(
            f"{where}: the last message has role {role!r}, expected 'user' or 'tool' for the model to answer"
        )
    chat: dict[str, Json] = {"messages": messages}
    if "tools" in record:
        chat["tools"] = record["tools"]
    given_id = record.get("id")
    if given_id is not None and not isinstance(given_id, (str, int)):
        raise DataError(f"{where}: 'id' is {given_id!r}, expected text or a whole number")
    return Sample(str(number) if given_id is None else str(given_id), chat, text_field(record, "answer", where))


TASK = Task(
    name="exact",
    summary="your own questions, each with one exact answer on the final channel",
    source='--data exact=FILE.jsonl with lines {"messages": [...], "answer": "46"}',
    version=1,
    reads="final",
    load=load,
    grade=grade,
)
