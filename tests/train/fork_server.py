"""Runs `gptoss-train` command lines in forks of one process that has paid for the imports.

A job is one line of JSON on stdin. `{"argv": [...], "log": PATH, "environment": {...}, "max_file_bytes": N}` starts one
and answers its process id; `{"wait": PID}` answers its exit code once it ended, minus the signal's number if one killed
it. What runs in the fork is the whole command, from its arguments to its exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import traceback
from typing import Any

from gptoss_infer.errors import run_command
from gptoss_train.__main__ import main

SLOW = ("gptoss_infer.lora", "gptoss_train.run", "gptoss_train.train")  # what a run imports, with all of torch and PEFT


def start(job: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(job["environment"])
        if job["max_file_bytes"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["max_file_bytes"], job["max_file_bytes"]))
        code = run_command(main, job["argv"])
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def serve() -> None:
    for name in SLOW:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        answer = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]) if "wait" in job else start(job)
        print(answer, flush=True)


if __name__ == "__main__":
    serve()
