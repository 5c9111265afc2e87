"""`gsm8k`: 1,319 grade-school word problems, asked without examples, graded by the last number of the final channel.

Source: K. Cobbe et al., "Training verifiers to solve math word problems", arXiv 2110.14168 (MIT licence).
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

from evals.jsonl import read_objects, text_field
from evals.task import Grade, Json, Outcome, Reply, Sample, Task, check_unique
from gptoss_infer.errors import DataError, MachineError

HUB_ID = "openai/gsm8k"

# A separator of thousands: a comma (LaTeX may brace it), a LaTeX or typographic thin space, or a no-break space.
_THOUSANDS = re.compile(r"(?<=[0-9])(?:,|\{,\}|\\[,!;: ]|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
# A minus counts as a sign only where it cannot be a subtraction or a range, as in "16-3" or "10-12".
_NUMBER = re.compile(r"(?P<sign>(?<![\w)\]}%])[-\u2212]\s?)?\\?\$?\s?(?P<digits>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")


def last_number(text: str) -> Decimal | None:
    """The last number in the text, without its thousands separators and units; None where there is none.

    "$1,234.50." is 1234.50, "-$5" is -5, "18%" is 18 and "\\boxed{18}" is 18.
    """
    matches = list(_NUMBER.finditer(_THOUSANDS.sub("", text)))
    if not matches:
        return None
    last = matches[-1]
    value = Decimal(last["digits"])
    return -value if last["sign"] else value


def question_text(question: str) -> str:
    """The user message for a question of the data set; train with it to be asked as in training."""
    return f"{question.strip()}\n\nFinish with the answer as a single number."


def load(path: Path | None) -> list[Sample]:
    """The test split from a JSON-lines file, from a directory with `test.jsonl`, or from the hub."""
    if path is None:
        return _load_from_hub()
    file = path / "test.jsonl" if path.is_dir() else path
    samples = [_sample(record, f"{file}:{number}", number - 1) for number, record in read_objects(file)]
    return check_unique(samples, str(file))


def grade(sample: Sample, reply: Reply) -> Grade:
    """Compare the last number of the final channel with the gold number, as decimals: 18.00 equals 18."""
    given = last_number(reply.final or "")
    if given is None:
        return Grade(Outcome.NO_ANSWER, None, "no number in the final message")
    gold = Decimal(str(sample.gold))
    return Grade(Outcome.CORRECT if given == gold else Outcome.WRONG, str(given), f"expected {gold}")


def _sample(record: dict[str, Json], where: str, index: int) -> Sample:
    question = text_field(record, "question", where)
    _, marker, tail = text_field(record, "answer", where).rpartition("####")
    gold = last_number(tail) if marker else None
    if gold is None:
        raise DataError(f"{where}: 'answer' ends in {tail[-40:]!r}, expected '#### NUMBER'")
    return Sample(f"gsm8k_{index:04d}", {"messages": [{"role": "user", "content": question_text(question)}]}, str(gold))


def _load_from_hub() -> list[Sample]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MachineError(
            f"gsm8k comes from the hub through the package 'datasets', which cannot be imported ({error}); "
            "install it, or give a file with --data gsm8k=PATH/test.jsonl"
        ) from error
    try:
        rows = load_dataset(HUB_ID, "main", split="test")
    except OSError as error:  # what datasets and huggingface_hub raise for a missing network, offline mode or data set
        raise MachineError(
            f"{HUB_ID} could not be fetched from the hub ({error}); "
            "give a copy on disk with --data gsm8k=PATH (a directory with test.jsonl, or the file)"
        ) from error
    samples = [_sample(dict(row), f"{HUB_ID} test[{index}]", index) for index, row in enumerate(rows)]
    return check_unique(samples, HUB_ID)


TASK = Task(
    name="gsm8k",
    summary="grade-school word problems (1,319); the last number of the final channel",
    source=f"hub data set {HUB_ID}; or --data gsm8k=DIR_OR_FILE (test.jsonl)",
    version=1,
    reads="final",
    load=load,
    grade=grade,
)
