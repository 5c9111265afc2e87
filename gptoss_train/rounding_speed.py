"""How fast MXFP4 is rounded and decoded, and in how much memory, against peers: `gptoss-train study --speed`.

One expert of each shape, on a CPU. All calls take turns in one process, so that what else the machine does hits them
alike. A figure is the median of the rounds, a ratio a peer's median over ours: by the clock, and in parentheses by the
CPU time of all threads, which on one thread is what an idle machine's clock would show. What is timed:

- **rounding**: `mxfp4.encode` without and with `like`, and `rounding.merge` by every rule, which decodes the base and
  adds the delta as well; against what torchao (by its default rule) and ModelOpt need to quantize weights that are
  merged already. All weights are fp32.
- **decoding** to bf16 and fp32, against transformers, which transposes as well: so does our `transposed`. A result that
  differs from transformers' ends the command.

Decoding is timed twice. **Recycled**: a result is freed before the next call, and malloc may use its memory again.
**Fresh**: results are kept, and malloc gives back all that is free before each call, ours or a peer's, so that the
kernel has to supply every page: what loading a model is like. `pages` is this alone, zeros written to a tensor of the
size, and so the bound of any decoder.

On one thread of an idle virtual AMD EPYC (torch 2.13, transformers 5.23), decoding on fresh pages was 13.7 and 11.2
times as fast as transformers in bf16 (larger, smaller shape), 10.0 and 7.4 times in fp32. There the pages alone, 1.6 us
for each 4 KiB, are two thirds of our time, and the bound is 14.7 and 11.4 times. `THP_MEM_ALLOC_ENABLE=1` in the
environment makes torch ask for huge pages, peers' too: 18 and 13 times in bf16, 28 and 11 in fp32 by the CPU time of a
busy machine, where it has them at hand.

**Peak** is what one call adds to the resident memory of a process of its own that holds its inputs; the result counts.
**Whole models** are computed from one expert's medians, not measured.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gptoss_infer import mxfp4, rounding
from gptoss_infer.rounding import Rounding
from gptoss_train import peers

SHAPES = ((5760, 2880), (2880, 2880))  # gate_up_proj and down_proj (out, in) of an expert, in 20b and 120b alike
EXPERTS = {"20b": 24 * 32, "120b": 36 * 128}  # layers times experts
QUANTIZERS = ("torchao floor", "modelopt")  # of the peers' rules: those that differ in speed
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MXFP4_BYTES = (mxfp4.BLOCK // 2 + 1) / mxfp4.BLOCK  # of a weight
MAX_OTHER_LOAD = 0.05  # of all cores, above which figures are said to be disturbed

Memory = Literal["recycled", "fresh"]


class Call(NamedTuple):
    """One thing that is timed."""

    name: str
    run: Callable[[], object]
    result_bytes: float
    peers: tuple[str, ...] = ()  # names of the calls that it is held against


class Timed(NamedTuple):
    """Medians over the rounds of one call."""

    ms: float
    cpu_ms: float  # of all threads, the kernel's work for them included
    faults: float  # pages that the kernel had to supply


def rounding_speed(shapes: Sequence[tuple[int, int]] = SHAPES, *, threads: int, rounds: int) -> dict[str, Any]:
    """Time everything in the module docstring; in a process whose work so far was on one thread, since it forks.

    Args:
        shapes: of the matrices (out, in) of one expert.
        rounds: timed, after one to warm up.
    Returns: `rows`, one per shape, call and kind of memory; `models`, one per model, call and kind of memory; and what
        they were taken with. What cannot be measured here is absent, and named on stderr.
    """
    can_measure_memory = _can_measure_memory()
    peaks = _peaks(shapes, threads) if can_measure_memory else [{} for _ in shapes]
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    others = _OtherLoad()
    for shape, peak in zip(shapes, peaks, strict=True):
        quantizing, decoding = _rounding_calls(shape), _decoding_calls(shape)
        rows += _rows(shape, "recycled", quantizing + decoding, rounds, peak)
        if can_measure_memory:
            rows += _rows(shape, "fresh", decoding + _page_calls(shape), rounds, peak)
    load = others.share()
    if load is not None and load > MAX_OTHER_LOAD:
        print(f"other work took {load:.0%} of the cores meanwhile: repeat this when it is done", file=sys.stderr)
    return {
        "threads": threads, "rounds": rounds, "cores": os.cpu_count(), "other_load": load, "versions": _versions(),
        "rows": rows, "models": _models(shapes, rows),
    }  # fmt: skip


def _rounding_calls(shape: tuple[int, int]) -> list[Call]:
    """Return what rounds one matrix of normal weights, to which a delta of rank 8 and 0.14% of their size is added."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(shape, generator=generator).mul_(0.02)
    left, right = (torch.randn(size, generator=generator) for size in ((shape[0], 8), (8, shape[1])))
    delta = (left @ right).mul_(1e-5)
    base = mxfp4.encode(weights)
    merged = weights.add_(delta)
    size = merged.numel() * MXFP4_BYTES
    theirs = {name: rule for name, rule in peers.rules().items() if name in QUANTIZERS}
    against = tuple(theirs)
    calls = [Call(name, functools.partial(rule.quantize, merged), size) for name, rule in theirs.items()]
    calls.append(Call("encode", lambda: mxfp4.encode(merged), size, against))
    calls.append(Call("encode like", lambda: mxfp4.encode(merged, like=base), size, against))
    for rule in get_args(Rounding):
        run = functools.partial(rounding.merge, base, delta, rule)
        calls.append(Call(f"merge {rule}", run, merged.numel() / 2, against))  # the scales are the base's
    return calls


def _decoding_calls(shape: tuple[int, int]) -> list[Call]:
    """Return what decodes one matrix.

    Raises: ValueError if transformers decodes it to something else.
    """
    blocks, scales = mxfp4.encode(torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02))
    theirs = peers.transformers_decode()
    calls = []
    for name, dtype in DTYPES.items():
        size = float(shape[0] * shape[1] * dtype.itemsize)
        ours = functools.partial(mxfp4.decode, blocks, scales, dtype)
        against: tuple[str, ...] = ()
        if theirs is not None:
            peer = functools.partial(theirs, blocks[None], scales[None], dtype)
            if not torch.equal(peer()[0].mT, ours()):
                raise ValueError(f"transformers decodes to other {name} values than mxfp4.decode, so times say nothing")
            against = (f"transformers {name}",)
            calls.append(Call(*against, peer, size))
        calls.append(Call(f"decode {name}", ours, size, against))
        calls.append(Call(f"decode {name} transposed", functools.partial(_transposed, ours), size, against))
    return calls


def _transposed(decode: Callable[[], Tensor]) -> Tensor:
    return decode().mT.contiguous()


def _page_calls(shape: tuple[int, int]) -> list[Call]:
    return [
        Call(f"pages {name}", functools.partial(_zeros, shape, dtype), float(shape[0] * shape[1] * dtype.itemsize))
        for name, dtype in DTYPES.items()
    ]


def _zeros(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype).zero_()  # torch.zeros may leave the pages for later


def _rows(
    shape: tuple[int, int], memory: Memory, calls: Sequence[Call], rounds: int, peak: dict[str, float]
) -> list[dict[str, Any]]:
    timed = _take_turns(calls, rounds, fresh=memory == "fresh")
    return [
        {
            "shape": list(shape), "call": call.name, "memory": memory, **timed[call.name]._asdict(),
            "times_faster": {name: timed[name].ms / timed[call.name].ms for name in call.peers},
            "times_less_cpu": {name: timed[name].cpu_ms / timed[call.name].cpu_ms for name in call.peers},
            "result_mib": call.result_bytes / 2**20, "peak_mib": peak.get(call.name),
        }
        for call in calls
    ]  # fmt: skip


def _take_turns(calls: Sequence[Call], rounds: int, *, fresh: bool) -> dict[str, Timed]:
    seen: dict[str, list[Timed]] = {call.name: [] for call in calls}
    for _ in range(rounds + 1):
        kept = []
        for call in calls:
            if fresh:
                _trim()
            before = _now()
            result = call.run()
            seen[call.name].append(Timed(*(after - start for after, start in zip(_now(), before, strict=True))))
            if fresh:
                kept.append(result)
            del result
    return {
        name: Timed(*(statistics.median(values) for values in zip(*turns[1:], strict=True)))
        for name, turns in seen.items()
    }


def _now() -> Timed:
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return Timed(time.perf_counter() * 1e3, time.process_time() * 1e3, faults)


def _can_measure_memory() -> bool:
    """Return whether malloc can be told to give back what is free, and Linux to forget a peak."""
    if hasattr(ctypes.CDLL(None), "malloc_trim") and Path("/proc/self/clear_refs").exists():
        return True
    print("fresh pages and peak memory are measured on Linux with glibc only: left out", file=sys.stderr)
    return False


def _trim() -> None:
    ctypes.CDLL(None).malloc_trim(0)


def _peaks(shapes: Sequence[tuple[int, int]], threads: int) -> list[dict[str, float]]:
    """Return, per shape, the MiB that each call adds."""
    torch.set_num_threads(1)  # threads that OpenMP has started are missing after a fork, which waits for them
    small = {call.name: call for call in _all_calls((32, 64))}
    return [
        {call.name: _peak_in_fork(call, small[call.name], threads) for call in _all_calls(shape)} for shape in shapes
    ]


def _all_calls(shape: tuple[int, int]) -> list[Call]:
    return _rounding_calls(shape) + _decoding_calls(shape) + _page_calls(shape)


def _peak_in_fork(call: Call, small: Call, threads: int) -> float:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(call, small, threads, sender))
    process.start()
    sender.close()
    peak: float = receiver.recv()
    process.join()
    return peak


def _send_peak(call: Call, small: Call, threads: int, sender: Connection) -> None:
    torch.set_num_threads(threads)
    small.run()  # code that is paged in and tables that are made once are not the call's
    _trim()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident
    before = _status_mib("VmRSS")
    result = call.run()
    sender.send(_status_mib("VmHWM") - before)
    del result


def _status_mib(key: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 2**10  # Linux writes KiB


class _OtherLoad:
    """How much of all cores was taken by others, this process's own work and waiting aside."""

    def __init__(self) -> None:
        self.started, self.own, self.busy = time.perf_counter(), time.process_time(), _busy_seconds()

    def share(self) -> float | None:
        """Return the share since the start, or None where /proc is missing."""
        busy = _busy_seconds()
        if busy is None or self.busy is None:
            return None
        others = busy - self.busy - (time.process_time() - self.own)
        return max(0.0, others / (time.perf_counter() - self.started) / (os.cpu_count() or 1))


def _busy_seconds() -> float | None:
    """Return how long the cores have worked since the machine started, each counted."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, path.read_text().split()[1:11])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _versions() -> dict[str, str]:
    packages = ["torch"]
    if peers.transformers_decode() is not None:
        packages.append("transformers")
    packages += sorted({rule.package for rule in peers.rules().values()})
    return {package: metadata.version(package) for package in packages}


def _models(shapes: Sequence[tuple[int, int]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return minutes and GB for all experts of the real models, one expert after the other."""
    weights = sum(out * columns for out, columns in shapes)
    models = []
    for model, experts in EXPERTS.items():
        for call, memory in dict.fromkeys((row["call"], row["memory"]) for row in rows):
            of_call = [row for row in rows if (row["call"], row["memory"]) == (call, memory)]
            peak = [row["peak_mib"] for row in of_call if row["peak_mib"] is not None]
            models.append(
                {
                    "model": model, "experts": experts, "call": call, "memory": memory, "computed": True,
                    "minutes": experts * sum(row["ms"] for row in of_call) / 60e3,
                    "cpu_minutes": experts * sum(row["cpu_ms"] for row in of_call) / 60e3,
                    "mxfp4_gb": experts * weights * MXFP4_BYTES / 1e9, "bf16_gb": experts * weights * 2 / 1e9,
                    "peak_gb": max(peak) * 2**20 / 1e9 if peak else None,
                }
            )  # fmt: skip
    return models


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield the result as tables."""
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    load = "unknown" if result["other_load"] is None else f"{result['other_load']:.0%} of them"
    yield f"{versions}; {result['threads']} threads on {result['cores']} cores, work of others {load}"
    rows = result["rows"]
    for out, columns in dict.fromkeys(tuple(row["shape"]) for row in rows):
        of_shape = [row for row in rows if row["shape"] == [out, columns]]
        for memory in dict.fromkeys(row["memory"] for row in of_shape):
            yield ""
            yield f"one expert of {out} x {columns}, memory {memory}, medians of {result['rounds']} rounds"
            yield from _table([row for row in of_shape if row["memory"] == memory])
    yield ""
    yield "computed from these: all experts of a model, one after the other"
    first = {row["model"]: row for row in result["models"]}
    for model, row in first.items():
        sizes = f"{row['mxfp4_gb']:.1f} GB in MXFP4, {row['bf16_gb']:.1f} GB in bf16"
        yield f"{model}: {row['experts']} experts, {sizes}"
    heads = "".join(f"{f'{model}, minutes (CPU)':>24}" for model in first)
    yield f"{'':24} {'memory':>9}{heads} {'peak, GB':>10}"
    for call, memory in dict.fromkeys((row["call"], row["memory"]) for row in result["models"]):
        of_call = [row for row in result["models"] if (row["call"], row["memory"]) == (call, memory)]
        texts = (f"{row['minutes']:.2f} ({row['cpu_minutes']:.2f})" for row in of_call)
        minutes = "".join(f"{text:>24}" for text in texts)
        peak = "" if of_call[0]["peak_gb"] is None else f"{of_call[0]['peak_gb']:10.3f}"
        yield f"{call:24} {memory:>9}{minutes} {peak}".rstrip()


def _table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    against = list(dict.fromkeys(name.split()[0] for row in rows for name in row["times_faster"]))
    ratios = "".join(f"{f'x {name} (CPU)':>24}" for name in against)
    yield f"{'':24} {'ms':>9} {'CPU ms':>9}{ratios} {'faults':>9} {'peak, MiB':>10} {'result, MiB':>11}"
    for row in rows:
        faster = {
            name.split()[0]: f"{times:.1f} ({row['times_less_cpu'][name]:.1f})"
            for name, times in row["times_faster"].items()
        }
        ratios = "".join(f"{faster.get(name, ''):>24}" for name in against)
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
        yield (
            f"{row['call']:24} {row['ms']:9.2f} {row['cpu_ms']:9.2f}{ratios} {row['faults']:9.0f} {peak:>10} "
            f"{row['result_mib']:11.1f}"
        )
