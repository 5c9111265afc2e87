"""Every completion ends in exactly one outcome, in the stated order, read from real harmony tokens."""

from __future__ import annotations

import pytest

from evals.prompts import Prompter, Reading
from evals.settings import Question
from evals.task import Sample
from evals.tasks import TASKS
from gptoss_infer import harmony
from gptoss_infer.engine import Completion
from gptoss_infer.harmony.vocabulary import encoding

FINAL = "<|channel|>final<|message|>"
THOUGHT = "<|channel|>analysis<|message|>17+29 is 46<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
TEXT_SAMPLE = Sample("q", {"messages": [{"role": "user", "content": "17+29"}]}, "46")
CALL_SAMPLE = Sample(
    "c",
    {"messages": [{"role": "user", "content": "call f"}], "tools": [{"type": "function", "function": {"name": "f"}}]},
    {
        "name": "f",
        "also": [],
        "parameters": {"properties": {"n": {"type": "integer"}}, "required": ["n"]},
        "arguments": {"n": [5]},
    },
)


def read(text: str, *, task: str, stop: int | None, reason: str = "stop", header: str | None = None) -> Reading:
    sample = CALL_SAMPLE if task == "bfcl_simple" else TEXT_SAMPLE
    ids = encoding().encode(text, allowed_special="all") + ([] if stop is None else [stop])
    question = Question(TASKS[task], sample, "medium", 0)
    completion = Completion(0, 0, ids, None, reason)
    return Prompter(date=None, header=header).read(question, completion)


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        (f"{THOUGHT}{FINAL}46", "correct"),
        (f"{FINAL}46", "correct"),
        (f"{THOUGHT}{FINAL}47", "wrong"),
        (f"{THOUGHT}{FINAL}", "no_answer"),  # an empty final message
        ("<|channel|>analysis<|message|>46<|end|>", "malformed_harmony"),  # <|return|> without a final message
        ("46", "malformed_harmony"),  # no channel at all
        (f"{THOUGHT}<|channel|>analysis<|message|>46", "malformed_harmony"),  # <|return|> ends reasoning
    ],
)
def test_completions_that_stopped_end_in_one_outcome(text: str, outcome: str) -> None:
    reading = read(text, task="addition", stop=harmony.RETURN)
    assert reading.grade.outcome == outcome
    assert reading.well_formed == (outcome != "malformed_harmony")


def test_reasoning_is_never_graded() -> None:
    assert read(f"{THOUGHT}{FINAL}I will not say", task="gsm8k", stop=harmony.RETURN).grade.outcome == "no_answer"


def test_a_call_where_words_were_asked_for_is_no_answer() -> None:
    assert read(f"{CALL}{{}}", task="addition", stop=harmony.CALL).grade.outcome == "no_answer"


def test_an_answer_that_can_be_read_is_graded_despite_defects_beside_it() -> None:
    reading = read(f"<|channel|>analysis<|message|>46{FINAL}46", task="addition", stop=harmony.RETURN)
    assert reading.grade.outcome == "correct"
    assert not reading.well_formed
    assert reading.defects


@pytest.mark.parametrize("text", [f"{FINAL}46", f"{THOUGHT}{FINAL}4", "46", THOUGHT, ""])
def test_reaching_the_token_limit_is_truncated_whatever_was_written(text: str) -> None:
    reading = read(text, task="addition", stop=None, reason="length")
    assert reading.grade.outcome == "truncated"
    assert not reading.well_formed


@pytest.mark.parametrize("text", [f"{FINAL}46", "46", ""])
def test_a_cancelled_request_is_an_infra_error_whatever_was_written(text: str) -> None:
    assert read(text, task="addition", stop=None, reason="cancelled").grade.outcome == "infra_error"


@pytest.mark.parametrize(
    ("text", "stop", "outcome"),
    [
        (f'{CALL}{{"n": 5}}', harmony.CALL, "correct"),
        (f'{THOUGHT}{CALL}{{"n": 5}}', harmony.CALL, "correct"),
        (f'{CALL}{{"n": 6}}', harmony.CALL, "wrong"),
        (f'{CALL.replace("functions.f", "functions.g")}{{"n": 5}}', harmony.CALL, "wrong"),
        (f"{CALL}n is 5", harmony.CALL, "malformed_harmony"),  # arguments are no JSON object
        (f"{CALL}[5]", harmony.CALL, "malformed_harmony"),
        (f"{FINAL}5", harmony.RETURN, "no_answer"),  # answered in words
        ("f(5)", harmony.RETURN, "malformed_harmony"),
    ],
)
def test_calls_end_in_one_outcome(text: str, stop: int, outcome: str) -> None:
    assert read(text, task="bfcl_simple", stop=stop).grade.outcome == outcome


def test_a_forced_header_is_part_of_prompt_and_reply() -> None:
    prompter = Prompter(date=None, header=FINAL)
    prompt = harmony.decode(prompter.render(Question(TASKS["addition"], TEXT_SAMPLE, "low", 0)))
    assert prompt.endswith(f"17+29<|end|><|start|>assistant{FINAL}")
    reading = read("46", task="addition", stop=harmony.RETURN, header=FINAL)
    assert reading.grade.outcome == "correct"
    assert reading.messages == [{"role": "assistant", "channel": "final", "recipient": None, "content": "46"}]


def test_effort_and_date_reach_the_system_message() -> None:
    prompter = Prompter(date="2025-06-28", header=None)
    prompt = harmony.decode(prompter.render(Question(TASKS["addition"], TEXT_SAMPLE, "high", 0)))
    assert "Reasoning: high" in prompt
    assert "Current date: 2025-06-28" in prompt
