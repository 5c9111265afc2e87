"""Decides in which one outcome a completion ends. Pure; the graders of single tasks are in `evals.tasks`.

The order, first match wins:

1. `infra_error`: the engine raised or the request was cancelled. Nothing was learned about the model, so it is left out
   of every score, fails the run and is retried by the next one.
2. `truncated`: `max_tokens` was reached. It is not graded even where a final message had begun, because the number or
the
   call it would have ended in may be cut in two.
3. `malformed_harmony`: the completion ended, and what the task reads (the final message, or the arguments of a call)
   cannot be read because the harmony structure is broken.
4. `no_answer`: the structure is sound or at least readable, and there is nothing in it to grade.
5. `correct` or `wrong`, by the task's grader. Defects beside a readable answer do not change the verdict; they show in
   `well_formed`, which is recorded for every sample and reported as the format validity rate.

All but `infra_error` count in the denominator of the accuracy, and `correct` alone in its numerator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from evals.task import Grade, Outcome, Reply, Sample, Task


def settle(
    task: Task,
    sample: Sample,
    reply: Reply,
    *,
    finish_reason: Literal["stop", "length", "cancelled"],
    defects: Sequence[str],
) -> Grade:
    """The outcome of one completion; `defects` are those the harmony parser recorded."""
    if finish_reason == "cancelled":
        return Grade(Outcome.INFRA_ERROR, None, "the engine cancelled the request before it was done")
    if finish_reason == "length":
        return Grade(Outcome.TRUNCATED, None, "the token limit was reached before the model stopped")
    unreadable = _unreadable(task, reply, defects)
    return task.grade(sample, reply) if unreadable is None else unreadable


def _unreadable(task: Task, reply: Reply, defects: Sequence[str]) -> Grade | None:
    """The outcome of a reply that lacks what the task reads, or None where it can be graded."""
    if task.reads == "final":
        if reply.final is not None:
            return None
        missing = "no message on the final channel"
        return _malformed(defects) if defects else Grade(Outcome.NO_ANSWER, None, missing)
    if any(call.arguments is None for call in reply.calls):
        return _malformed(defects or ["the arguments of a tool call are no JSON object"])
    if reply.calls:
        return None
    if reply.final is None and defects:
        return _malformed(defects)
    return Grade(Outcome.NO_ANSWER, reply.final, "no tool was called")


def _malformed(defects: Sequence[str]) -> Grade:
    return Grade(Outcome.MALFORMED_HARMONY, None, "; ".join(defects))
