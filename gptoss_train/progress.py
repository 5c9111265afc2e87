"""What a person sees while training runs: step, loss, tokens per second and time left, on stderr.

Here: a live bar on a terminal, a plain line every few seconds elsewhere (a file, CI, a dumb terminal). Not here: the
record of the run (`gptoss_train.metrics`). Used by the training loop, on rank 0.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

import torch

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

PLAIN_INTERVAL_S = 10.0


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that was in use so far: allocated on a GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class Progress:
    """A context manager that shows each `update`.

    Args:
        total_steps: the step training ends at.
        start_step: the step it continues from; time left is estimated from the steps after it.
        stream: where to write; stderr by default. Colours follow NO_COLOR, and CI gets plain lines.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self.start_step = start_step
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started = self._shown = clock()
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        self._started = self._shown = self._clock()
        if _is_live(self._stream):
            self._bar = _make_bar(self._stream)
            self._bar.add_task("step", total=self.total_steps, completed=self.start_step, numbers="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Show that `step` is done. The first and the last step always get a line where there is no bar."""
        now = self._clock()
        done = step - self.start_step
        left_s = (now - self._started) / done * (self.total_steps - step) if done > 0 else float("nan")
        numbers = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  {_duration(left_s)} left"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, numbers=numbers)
        elif done <= 1 or step >= self.total_steps or now - self._shown >= PLAIN_INTERVAL_S:
            self._shown = now
            print(f"step {step}/{self.total_steps}  {numbers}", file=self._stream, flush=True)


def _is_live(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("CI") and os.environ.get("TERM", "") not in ("", "dumb")


def _make_bar(stream: TextIO) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=Console(file=stream),
    )


def _duration(seconds: float) -> str:
    if seconds != seconds:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
