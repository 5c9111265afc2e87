"""Training data: JSONL of conversations to token samples, with an account of every line, and the order of an epoch.

A line is `{"messages": [...], "tools": [...], "reasoning_effort": ...}` in the OpenAI chat shape; see
`gptoss_infer.harmony.conversation_from_chat`. One assistant turn makes one sample, which trains that turn's own
reasoning. Nothing is dropped in silence: the report counts every line and sample that is not trained on, and why.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoss_infer import harmony
from gptoss_infer.errors import DataError
from gptoss_train.recipe import Data, Recipe

# What a labelled token belongs to; its code in `Sample.channels` is the index + 1.
CHANNELS = ("analysis", "commentary", "final", "tool_call")
NUM_EXAMPLES = 3  # bad lines quoted in a report


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens of one sample, int32 (T,), and what each is labelled as, uint8 (T,): 0 carries no loss."""

    token_ids: Tensor
    channels: Tensor

    @property
    def num_tokens(self) -> int:
        """Length."""
        return len(self.token_ids)

    @property
    def num_inputs(self) -> int:
        """Tokens that the model reads: all but the last, which is only predicted."""
        return len(self.token_ids) - 1


@dataclass
class Report:
    """What became of a file."""

    path: str
    lines: int = 0
    bad_lines: int = 0
    samples: int = 0
    too_long: int = 0  # samples over max_tokens
    longest_tokens: int = 0
    tokens: int = 0
    labels: dict[str, int] = field(default_factory=dict)  # per channel
    examples: list[str] = field(default_factory=list)  # the first messages about what was not trained on

    def text(self) -> str:
        """One paragraph for a person."""
        labels = ", ".join(f"{name} {count:,}" for name, count in self.labels.items()) or "none"
        lost = [f"{self.bad_lines:,} bad lines skipped"] if self.bad_lines else []
        lost += [f"{self.too_long:,} samples over the limit skipped"] if self.too_long else []
        head = (
            f"{self.path}: {self.lines:,} lines, {self.samples:,} samples, {self.tokens:,} tokens "
            f"(longest {self.longest_tokens:,}); labelled: {labels}"
        )
        return "\n".join([head, *lost, *(f"  {example}" for example in self.examples)])

    def to_json(self) -> dict[str, Any]:
        """For environment.json."""
        return asdict(self)


@dataclass(frozen=True)
class Dataset:
    """The samples of a file in its order, their report, and the file's sha256."""

    samples: list[Sample]
    report: Report
    sha256: str


def load_dataset(path: str | Path, data: Data, *, keep_lines: range | set[int] | None = None) -> Dataset:
    """Read, check and render a JSONL file.

    Args:
        keep_lines: use these lines only, counted from 0 (a split of one file); the others are not reported.
    Raises: DataError with file and line for a bad line or an over-long sample (unless the recipe says skip), and for a
        file without a sample.
    """
    path = Path(path)
    raw = _read(path)
    report = Report(str(path))
    samples: list[Sample] = []
    for number, line in enumerate(_lines(raw)):
        if keep_lines is not None and number not in keep_lines:
            continue
        report.lines += 1
        try:
            rendered = _render(line, data)
        except DataError as error:
            problem = f"{path}:{number + 1}: {error}"
            if data.on_bad_line == "error":
                raise DataError(
                    f"{problem}. Mend the line, or count and skip bad ones with data.on_bad_line=skip"
                ) from None
            report.bad_lines += 1
            report.examples += [problem] if len(report.examples) < NUM_EXAMPLES else []
            continue
        for sample in rendered:
            if _fits(sample, f"{path}:{number + 1}", data, report):
                samples.append(sample)
                _count(sample, report)
    if not samples:
        raise DataError(f"{path} gives no sample to train on: {report.text()}")
    return Dataset(samples, report, hashlib.sha256(raw).hexdigest())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"data file {path} cannot be read ({error.strerror}); check data.train and data.validation"
        ) from None


def _lines(raw: bytes) -> Iterator[bytes]:
    """Yield the lines of a file; a final newline ends the last one rather than starting an empty one."""
    return iter(raw.removesuffix(b"\n").split(b"\n"))


def _render(line: bytes, data: Data) -> list[Sample]:
    if not line.strip():
        raise DataError("the line is empty, expected a JSON object")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DataError(f"the line is not JSON ({error}), expected an object with messages") from None
    conversation = harmony.conversation_from_chat(record, date=data.date, reasoning_effort=data.reasoning_effort)
    rendered = harmony.training_samples(conversation)
    codes = {name: code for code, name in enumerate(CHANNELS, start=1)} | {None: 0}
    return [
        Sample(
            torch.tensor(sample.token_ids, dtype=torch.int32),
            torch.tensor([codes[channel] for channel in sample.channels], dtype=torch.uint8),
        )
        for sample in (rendered if data.train_on == "all_turns" else rendered[-1:])
    ]


def _fits(sample: Sample, where: str, data: Data, report: Report) -> bool:
    if data.max_tokens is None or sample.num_tokens <= data.max_tokens:
        return True
    problem = f"{where}: a sample has {sample.num_tokens:,} tokens, data.max_tokens is {data.max_tokens:,}"
    if data.on_long == "error":
        raise DataError(f"{problem}; raise it, shorten the conversation, or count and skip with data.on_long=skip")
    report.too_long += 1
    report.examples += [problem] if len(report.examples) < NUM_EXAMPLES else []
    return False


def _count(sample: Sample, report: Report) -> None:
    report.samples += 1
    report.tokens += sample.num_tokens
    report.longest_tokens = max(report.longest_tokens, sample.num_tokens)
    counts = Counter(sample.channels.tolist())
    for code, name in enumerate(CHANNELS, start=1):
        if counts[code]:
            report.labels[name] = report.labels.get(name, 0) + counts[code]


def load_splits(
    recipe: Recipe, train_path: str | Path, validation_path: str | Path | None
) -> tuple[Dataset, Dataset | None]:
    """Return training and validation data; `validation_fraction` holds out whole lines: no conversation is in both."""
    data = recipe.data.model_copy(update={"max_tokens": recipe.max_tokens})
    if validation_path is not None:
        return load_dataset(train_path, data), load_dataset(validation_path, data)
    if data.validation_fraction == 0:
        return load_dataset(train_path, data), None
    count = sum(1 for _ in _lines(_read(Path(train_path))))
    held_out = round(count * data.validation_fraction)
    if not 0 < held_out < count:
        raise DataError(
            f"data.validation_fraction {data.validation_fraction} of {count} lines holds out {held_out}; "
            "give a data.validation file or another fraction"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(recipe.train.seed)).tolist()
    held = set(order[:held_out])
    rest = load_dataset(train_path, data, keep_lines=set(range(count)) - held)
    return rest, load_dataset(train_path, data, keep_lines=held)


def some_of(samples: Sequence[Sample], max_tokens: int) -> list[Sample]:
    """Return a random part of the samples, the same at every call: just enough for so many tokens, or all."""
    chosen: list[Sample] = []
    total = 0
    for index in torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist():
        if total >= max_tokens:
            break
        chosen.append(samples[index])
        total += samples[index].num_inputs
    return chosen


@dataclass(frozen=True)
class PackedBatch:
    """Samples one after another, each a document of its own: positions start at 0 where one begins."""

    input_ids: Tensor  # int64 (N,)
    positions: Tensor  # int64 (N,)
    targets: Tensor  # int64 (N,): the next token of the same sample
    channels: Tensor  # uint8 (N,): what the target is labelled as; 0 carries no loss


def pack(samples: Sequence[Sample]) -> PackedBatch:
    """Join samples; the last token of each is a target only."""
    return PackedBatch(
        torch.cat([sample.token_ids[:-1] for sample in samples]).long(),
        torch.cat([torch.arange(sample.num_inputs) for sample in samples]),
        torch.cat([sample.token_ids[1:] for sample in samples]).long(),
        torch.cat([sample.channels[1:] for sample in samples]),
    )
