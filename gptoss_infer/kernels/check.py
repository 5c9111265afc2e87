"""Compare every kernel with its reference on this machine's GPU, at the sizes of a real model, and time it.

    python -m gptoss_infer.kernels.check
    python -m gptoss_infer.kernels.check --shape 120b --only "moe up" --tokens 1,64

prints a row per kernel and size: the error, what is allowed, and what the time means in memory and arithmetic, as
shares of rates measured first: copying 1 GiB, multiplying two matrices of 8,192 in bf16. Times are of CUDA graphs, so a
kernel that waited for the host could not be timed. Exit code 1 if a kernel is wrong, 3 without a GPU. A kernel's module
tells its checks, see `cases`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from gptoss_infer.config import published
from gptoss_infer.errors import MachineError, UsageError, run_command
from gptoss_infer.kernels import has_triton
from gptoss_infer.kernels.cases import Check, checks

TOKENS = (1, 8, 64, 512, 8192)
ROUNDS = 20
COPY_BYTES, PRODUCT_SIZE = 2**30, 8192


class Rates(NamedTuple):
    """What this GPU was seen to do at most."""

    bytes_per_s: float
    flops_per_s: float


def error_of(check: Check) -> float:
    """Return the error of the first run, relative in the norm; infinite for NaN or another shape."""
    got, expected = check.compared(check.runs[0]()), check.compared(check.expected())
    if got.shape != expected.shape:
        return torch.inf
    difference = (got.double() - expected.double()).norm()
    error = float(difference / expected.double().norm().clamp_min(1e-300))
    return error if error == error else torch.inf


def seconds(runs: Sequence[Callable[[], Any]]) -> float:
    """Return the time of one run, the median of some rounds through all of them, in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs:  # compiles, and allocates
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[ROUNDS // 2] / len(runs)


def measure_rates() -> Rates:
    """Copy and multiply."""
    source, target = torch.empty(2, COPY_BYTES, dtype=torch.uint8, device="cuda")
    left, right = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE, device="cuda", dtype=torch.bfloat16)
    return Rates(
        2 * COPY_BYTES / seconds([lambda: target.copy_(source)]),
        2 * PRODUCT_SIZE**3 / seconds([lambda: left @ right]),
    )


def row(check: Check, error: float, time_s: float, rates: Rates) -> str:
    """Return a line of the table."""
    memory, arithmetic = check.moved_bytes / time_s, check.flops / time_s
    return (
        f"{check.name:<52} {error:>9.1e} {check.allowed:>9.1e} {time_s * 1e6:>10.1f} "
        + (f"{memory / 1e9:>7.0f} {memory / rates.bytes_per_s:>6.1%} " if memory else f"{'-':>7} {'-':>6} ")
        + (f"{arithmetic / 1e12:>8.1f} {arithmetic / rates.flops_per_s:>6.1%}" if arithmetic else f"{'-':>8} {'-':>6}")
    )


def main(argv: Sequence[str]) -> int:
    """Print the table; 1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m gptoss_infer.kernels.check",
        description="Compare every kernel with its reference on a GPU, and time it.",
    )
    parser.add_argument("--shape", choices=("20b", "120b"), default="20b")
    parser.add_argument("--only", default="", metavar="TEXT", help="checks whose name has this in it")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), metavar="N,N", help="sizes of batches")
    options = parser.parse_args(argv)
    try:
        tokens = [int(text) for text in options.tokens.split(",")]
    except ValueError:
        raise UsageError(f"--tokens is {options.tokens!r}; expected numbers such as 1,64") from None
    if not torch.cuda.is_available():
        raise MachineError(
            "torch sees no GPU, and kernels are checked on one: run this where torch.cuda.is_available() is true "
            "(nvidia-smi or rocm-smi shows the driver; torch's build must be for CUDA or ROCm). Without a GPU, "
            "python -m gptoss_infer.kernels.crosscompile compiles them and pytest interprets them"
        )
    if not has_triton():
        raise MachineError("triton is not installed: pip install triton")
    rates = measure_rates()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, gpt-oss-{options.shape}")
    print(f"copies {rates.bytes_per_s / 1e9:.0f} GB/s, multiplies bf16 at {rates.flops_per_s / 1e12:.0f} TFLOP/s")
    print(f"{'kernel':<52} {'error':>9} {'allowed':>9} {'us':>10} {'GB/s':>7} {'':>6} {'TFLOP/s':>8}")
    wrong = 0
    for check in checks(published(options.shape), torch.device("cuda"), tokens):
        if options.only in check.name:
            error = error_of(check)
            wrong += error > check.allowed
            line = row(check, error, seconds(check.runs), rates)
            print(line + ("" if error <= check.allowed else "  WRONG"), flush=True)
    return 1 if wrong else 0


def entry() -> NoReturn:
    """Run from the command line."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
