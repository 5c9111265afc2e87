"""The tasks that `gptoss-eval` knows, one file each, listed here by hand."""

from __future__ import annotations

from evals.task import Task
from evals.tasks import arithmetic, bfcl_simple, exact, gsm8k
from gptoss_infer.errors import UsageError

TASKS: dict[str, Task] = {task.name: task for task in (gsm8k.TASK, bfcl_simple.TASK, arithmetic.TASK, exact.TASK)}


def get_task(name: str) -> Task:
    """The task of that name; UsageError listing the known ones otherwise."""
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name]
