"""Errors that a user can cause, each with the exit code it ends in, and the one place that turns them into one.

Exit codes of every command: 0 done; 1 failed or fell short of a threshold; 2 wrong usage or config; 3 missing
capability of the machine; 4 bad data or checkpoint; 130 and 143 on SIGINT and SIGTERM.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn


class UsageError(ValueError):
    """A command line or recipe that cannot mean anything (exit 2)."""

    exit_code = 2


class MachineError(RuntimeError):
    """Something this machine lacks: a device, a package, a vocabulary, disk space (exit 3)."""

    exit_code = 3


class DataError(ValueError):
    """Data or a checkpoint that is damaged, inconsistent or not what it claims to be (exit 4)."""

    exit_code = 4


class Terminated(BaseException):
    """SIGTERM arrived; unwinds like KeyboardInterrupt so that `finally` blocks clean up (exit 143)."""


def _on_sigterm(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def run_command(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)` and return its exit code; a user's error is printed as one message, without a traceback."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    # Read by GNU's OpenMP when torch loads it, which is later. Its threads spin for each other: on cores that another
    # job uses too, the default of 300,000 turns made a training step 40 times slower; 5,000 cost nothing on idle ones.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    try:
        code = main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # here, where a full disk or a closed pipe behind stdout is still reported
        return code
    except (UsageError, MachineError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read stdout has seen enough, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        return 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            print(
                f"error: no space left on the device ({error}); free some or choose another directory. "
                "What was being written has been removed; finished outputs are untouched.",
                file=sys.stderr,
            )
            return MachineError.exit_code
        if isinstance(error, (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)):
            print(f"error: {error}", file=sys.stderr)
            return UsageError.exit_code
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print("terminated", file=sys.stderr)
        return 143
