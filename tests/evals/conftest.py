"""Evaluation directories written by hand, and an engine that says what a test tells it to."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from evals.records import Record, append, appending
from evals.task import Outcome
from gptoss_infer import harmony
from gptoss_infer.engine import Completion, FinishReason, SamplingParams
from gptoss_infer.harmony.vocabulary import encoding


def record(sample_id: str, outcome: str, **changes: object) -> Record:
    fields: dict = {
        "task": "addition", "effort": "medium", "epoch": 0, "seed": 1, "answer": "5", "gold": "5", "explanation": "",
        "well_formed": True, "defects": [], "finish_reason": "stop", "prompt_tokens": 10, "completion_tokens": 4,
        "prompt": [{"role": "user", "content": sample_id}], "token_ids": [35, 200002],
        "messages": [{"role": "assistant", "channel": "final", "recipient": None, "content": "5"}],
    } | changes  # fmt: skip
    return Record(sample_id=sample_id, outcome=Outcome(outcome), **fields)


@pytest.fixture
def write_evaluation(tmp_path: Path) -> Callable[..., Path]:
    """Write an evaluation directory from `{sample id: outcome}`, or a list of records; settings can be changed."""

    def write(name: str, outcomes: dict[str, str] | list[Record], *, data: str = "same", **settings: object) -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        records = [record(*item) for item in outcomes.items()] if isinstance(outcomes, dict) else outcomes
        run = {
            "version": 1,
            "settings": {
                "efforts": ["medium"], "epochs": 1, "limit": None, "max_tokens": 64, "temperature": 1.0, "top_p": 1.0,
                "seed": 0, "date": None, "header": None, "dtype": "float32",
            } | settings,
            "target": {"given": name, "variant": "model", "checkpoint_sha256": name, "adapter_sha256": None},
            "tasks": {
                "addition": {"version": 1, "n_samples": len({r.sample_id for r in records}), "samples_sha256": data}
            },
        }  # fmt: skip
        (directory / "run.json").write_text(json.dumps(run))
        with appending(directory) as file:
            for one in records:
                append(file, one)
        return directory

    return write


@pytest.fixture
def make_record() -> Callable[..., Record]:
    """Build a record of a sample that ended in an outcome; any field can be changed."""
    return record


@dataclass
class FakeEngine:
    """Answers every prompt with what `answer` makes of its text: text with control tokens, or an error to raise."""

    answer: Callable[[str], str | Exception]
    prompts: list[str] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)

    def as_completed(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> Generator[Completion]:
        """Answer in order; an error ends it for all, as in the real engine."""
        for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            text = harmony.decode(prompt)
            self.prompts.append(text)
            self.params.append(one)
            answer = self.answer(text)
            if isinstance(answer, Exception):
                raise answer
            ids = encoding().encode(answer, allowed_special="all")
            reason: FinishReason = "stop" if ids[-1] in harmony.STOP_TOKENS else "length"
            yield Completion(index, 0, ids, None, reason)


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], str | Exception]], FakeEngine]:
    """Put an engine that answers by a function of the prompt's text in the place of the real one."""

    def install(answer: Callable[[str], str | Exception]) -> FakeEngine:
        engine = FakeEngine(answer)
        monkeypatch.setattr("evals.__main__._load_engine", lambda *_: engine)
        return engine

    return install
