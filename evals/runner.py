"""Runs an evaluation: asks the engine or a server, grades, and appends one record per sample until all are there.

Used by `gptoss-eval run`. What is not answered becomes an infra_error record with the engine's or server's message, and
the next run over the same directory asks it again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from evals.prompts import Prompter
from evals.records import Key, Record, append, appending, read_records
from evals.settings import Question, Settings
from evals.task import Outcome
from gptoss_infer.errors import Terminated

if TYPE_CHECKING:
    from gptoss_infer.engine import Completion, SamplingParams
    from gptoss_infer.remote import RemoteEngine

_PROGRESS_INTERVAL_S = 10.0


class LocalEngine(Protocol):
    """The part of `gptoss_infer.engine.Engine` that an evaluation needs."""

    def as_completed(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> Generator[Completion]:
        """Yield one completion per prompt, in the order in which they end."""


Answer = tuple[Question, list[int], "Completion | Exception"]  # a question, its prompt and what became of it


def ask_all(
    directory: Path,
    wanted: Sequence[Question],
    settings: Settings,
    *,
    load_engine: Callable[[], LocalEngine | RemoteEngine],
) -> dict[Key, Record]:
    """Ask what has no record yet or ended in an infra_error; returns the records of all of `wanted`.

    The engine is loaded only if something is left to ask. On SIGINT and SIGTERM what is done is on disk, and a note
    says how to go on.
    """
    done = read_records(directory)
    pending = [question for question in wanted if _needs_asking(done.get(_key(question)))]
    if len(pending) < len(wanted):
        rest = f"asking the other {len(pending)}" if pending else "nothing is left to ask"
        print(f"{directory}: {len(wanted) - len(pending)} of {len(wanted)} samples are done, {rest}", file=sys.stderr)
    if pending:
        with appending(directory) as file:
            try:
                _ask(file, pending, settings, engine=load_engine())
            except (KeyboardInterrupt, Terminated):
                print(f"\nwhat is done is in {directory}; the same command goes on from there", file=sys.stderr)
                raise
        done = read_records(directory)
    return {key: done[key] for key in map(_key, wanted)}


def _ask(
    file: BinaryIO, pending: Sequence[Question], settings: Settings, *, engine: LocalEngine | RemoteEngine
) -> None:
    from gptoss_infer.remote import RemoteEngine

    prompter = Prompter(date=settings.date, header=settings.header)
    progress = _Progress(len(pending))
    if isinstance(engine, RemoteEngine):
        answers = _served(engine, prompter, pending, settings)
    else:
        answers = _answers(engine, prompter, pending, settings)
    for question, prompt, result in answers:
        if isinstance(result, Exception):
            record = _unanswered(question, prompt, settings, f"{type(result).__name__}: {result}")
        else:
            record = _answered(question, prompt, settings, result, prompter)
        append(file, record)
        progress.add(record)
    progress.finish()


def _served(
    engine: RemoteEngine, prompter: Prompter, pending: Sequence[Question], settings: Settings
) -> Iterator[Answer]:
    """Yield every question as its answer comes, so that one that takes long keeps no other from being asked or kept."""
    prompts = [prompter.render(question) for question in pending]
    params = [_params(question, settings) for question in pending]
    with closing(engine.attempts(prompts, params, [prompter.chat(question) for question in pending])) as attempts:
        for attempt in attempts:
            yield pending[attempt.prompt_index], prompts[attempt.prompt_index], attempt.result


def _params(question: Question, settings: Settings) -> SamplingParams:
    from gptoss_infer.engine import SamplingParams

    return SamplingParams(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=question.seed(settings.seed),
    )


def _answers(
    engine: LocalEngine, prompter: Prompter, asked: Sequence[Question], settings: Settings
) -> Iterator[Answer]:
    """Yield every question with its prompt and what became of it, in the order in which the answers end.

    Where the engine raises, what it had not answered is asked again in two halves, and so on: one bad prompt, or too
    many at once for the memory, does not fail the others.
    """
    prompts = [prompter.render(question) for question in asked]
    params = [_params(question, settings) for question in asked]
    left = dict.fromkeys(range(len(asked)))
    try:
        with closing(engine.as_completed(prompts, params)) as completions:
            for completion in completions:
                del left[completion.prompt_index]
                yield asked[completion.prompt_index], prompts[completion.prompt_index], completion
        if left:
            raise RuntimeError(f"the engine answered {len(asked) - len(left)} of {len(asked)} prompts")
        return
    except Exception as error:  # whatever the engine raises is an infra_error of a sample, recorded with its message
        failure = _without_frames(error)  # which hold the memory of the step that failed
    if len(asked) == 1:
        yield asked[0], prompts[0], failure
        return
    print(f"{len(left)} prompts failed ({type(failure).__name__}: {failure}); asking again in halves", file=sys.stderr)
    rest = [asked[index] for index in left]
    for half in (rest[: len(rest) // 2], rest[len(rest) // 2 :]):
        if half:
            yield from _answers(engine, prompter, half, settings)


def _without_frames(error: Exception) -> Exception:
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _answered(
    question: Question, prompt: list[int], settings: Settings, completion: Completion, prompter: Prompter
) -> Record:
    from gptoss_infer.remote import RemoteCompletion

    reading = prompter.read(question, completion)
    grade = reading.grade
    counts = [len(prompt), len(completion.token_ids)]
    if isinstance(completion, RemoteCompletion):  # in chat mode, neither prompt nor tokens are those of the server
        served = (completion.prompt_tokens, completion.completion_tokens)
        counts = [ours if theirs is None else theirs for ours, theirs in zip(counts, served, strict=True)]
    return replace(
        _unanswered(question, prompt, settings, grade.explanation if grade.outcome is Outcome.INFRA_ERROR else None),
        outcome=grade.outcome,
        answer=grade.answer,
        explanation=grade.explanation,
        well_formed=reading.well_formed,
        defects=reading.defects,
        finish_reason=completion.finish_reason,
        prompt_tokens=counts[0],
        completion_tokens=counts[1],
        messages=reading.messages,
        token_ids=list(completion.token_ids),
    )


def _unanswered(question: Question, prompt: list[int], settings: Settings, error: str | None) -> Record:
    """The record of a question that the engine failed on."""
    messages = question.sample.chat["messages"]
    return Record(
        task=question.task.name,
        effort=question.effort,
        sample_id=question.sample.id,
        epoch=question.epoch,
        seed=question.seed(settings.seed),
        outcome=Outcome.INFRA_ERROR,
        answer=None,
        gold=question.sample.gold,
        explanation="the engine failed",
        well_formed=False,
        defects=[],
        finish_reason=None,
        prompt_tokens=len(prompt),
        completion_tokens=0,
        prompt=messages if isinstance(messages, list) else [],
        messages=[],
        token_ids=[],
        error=error,
    )


def _key(question: Question) -> Key:
    return Key(question.task.name, question.effort, question.sample.id, question.epoch)


def _needs_asking(record: Record | None) -> bool:
    return record is None or record.outcome is Outcome.INFRA_ERROR


class _Progress:
    """A line on stderr about how far the run is: rewritten on a terminal, every ten seconds elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.tokens, self.correct = total, 0, 0, 0
        self.start = self.shown = time.monotonic()
        self.rewrites = sys.stderr.isatty()

    def add(self, record: Record) -> None:
        """Count a record, and show the line where it is due."""
        self.done += 1
        self.tokens += record.completion_tokens
        self.correct += record.outcome is Outcome.CORRECT
        if self.rewrites or time.monotonic() - self.shown >= _PROGRESS_INTERVAL_S:
            self._show(end="\r" if self.rewrites else "\n")

    def finish(self) -> None:
        """Show the last line."""
        self._show(end="\n")

    def _show(self, end: str) -> None:
        self.shown = time.monotonic()
        elapsed_s = max(self.shown - self.start, 1e-9)
        left_s = elapsed_s / max(self.done, 1) * (self.total - self.done)
        print(
            f"{self.done}/{self.total} samples, {self.correct} correct, {self.tokens / elapsed_s:,.0f} tokens/s, "
            f"{left_s:,.0f} s left   ",
            end=end,
            file=sys.stderr,
            flush=True,
        )
