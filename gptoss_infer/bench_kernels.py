"""`gptoss-infer bench --kernels`: each kernel by itself, at the sizes of a model, with shares of the machine's rates.

On a CPU these are the compiled kernels (`gptoss_infer.kernels.cpu`), over random weights of one layer and the
unembedding; on a GPU, Triton's, which `gptoss_infer.kernels.check` times and also compares with their references.
Weights are read once in a run, so a share of the bandwidth above 100% says that some stayed in a cache.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptoss_infer import kernels, roofline
from gptoss_infer.config import ModelConfig
from gptoss_infer.errors import MachineError
from gptoss_infer.kernels import cpu

PAGE_TOKENS = 64


class Work(NamedTuple):
    """A kernel with its arguments, and what it needs at least."""

    name: str
    run: Callable[[], Any]
    moved_bytes: float
    flops: float


def time_kernels(
    config: ModelConfig, batches: Sequence[int], context: int, dtype: torch.dtype, rounds: int
) -> Iterator[dict[str, Any]]:
    """Yield a line of results per compiled kernel and number of tokens, each of another sequence of `context` tokens.

    Raises: MachineError where there are no compiled kernels.
    """
    compiled = kernels.cpu_kernels()
    if compiled is None:
        raise MachineError("there are no compiled kernels to time here; the line above says why")
    peak = roofline.measure_peak(torch.device("cpu"), dtype)
    weights = _Weights(config, dtype)
    for tokens in batches:
        for work in _works(compiled, config, weights, tokens, context):
            seconds = min(_seconds(work.run) for _ in range(rounds + 1))  # the first touches pages
            yield {
                "kernel": work.name,
                "device": "cpu",
                "dtype": str(dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "tokens": tokens,
                "context": context,
                "us": round(seconds * 1e6, 1),
                "gb_per_s": round(work.moved_bytes / seconds / 1e9, 2),
                "share_of_bandwidth": round(work.moved_bytes / seconds / peak.read_bytes_per_s, 3),
                "gflops": round(work.flops / seconds / 1e9, 1),
                "share_of_arithmetic": round(work.flops / seconds / peak.flops, 3),
            }


class _Weights:
    """Random weights of one layer, and the unembedding."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        c, d, e, i = config.hidden_size, config.head_dim, config.num_local_experts, config.intermediate_size
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        self.norm = torch.ones(c)
        self.qkv, self.o = self._affine((heads + 2 * kv) * d, c, dtype), self._affine(c, heads * d, dtype)
        self.router, self.head = self._affine(e, c, dtype), self._affine(config.vocab_size, c, dtype)
        self.gate_up, self.down = self._packed(e, 2 * i, c, dtype), self._packed(e, c, i, dtype)
        self.sinks = torch.zeros(heads, dtype=dtype)

    @staticmethod
    def _affine(out: int, features: int, dtype: torch.dtype) -> cpu.Affine:
        return cpu.Affine(torch.empty(out, features, dtype=dtype).normal_(std=0.02), torch.zeros(out, dtype=dtype))

    @staticmethod
    def _packed(experts: int, out: int, features: int, dtype: torch.dtype) -> cpu.Packed:
        blocks = torch.empty(experts, out, features // 32, 2, dtype=torch.int64).random_(-(2**63), 2**63 - 1)
        scales = torch.empty(experts, out, features // 32, dtype=torch.uint8).random_(118, 122)
        return cpu.Packed(blocks.view(torch.uint8), scales, torch.zeros(experts, out, dtype=dtype))


def _works(compiled: cpu.Kernels, config: ModelConfig, w: _Weights, n: int, context: int) -> Iterator[Work]:
    """Yield the kernels of a step in the order in which it calls them."""
    dtype, c, d = w.qkv.weight.dtype, config.hidden_size, config.head_dim
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    x, attended = torch.randn(n, c).to(dtype), torch.randn(n, heads * d).to(dtype)
    yield Work("rms_norm", lambda: compiled.rms_norm(x, w.norm, 1e-5), 2 * x.nbytes, 4 * x.numel())
    yield _product("q, k, v", compiled, x, w.qkv)
    for name, window in (("attention, full", 0), ("attention, window", config.sliding_window)):
        yield _attention(name, compiled, (n, heads, kv, d), w.sinks, context, window)
    yield _product("o", compiled, attended, w.o)
    yield _product("router", compiled, x, w.router)
    weights, chosen = compiled.top_k(torch.randn(n, config.num_local_experts), config.num_experts_per_tok)
    share = len(chosen.unique()) / config.num_local_experts
    held = sum(part.nbytes for packed in (w.gate_up, w.down) for part in (packed.blocks, packed.scales))
    activation = (config.swiglu_alpha, config.swiglu_limit)
    yield Work(
        "experts",
        lambda: compiled.experts(x, weights, chosen, w.gate_up, w.down, activation),
        share * held,
        2.0 * chosen.numel() * 3 * c * config.intermediate_size,
    )
    yield _product("unembedding", compiled, x, w.head, torch.float32)
    logits = torch.randn(n, config.vocab_size)
    yield Work("likeliest token", lambda: compiled.argmax(logits), logits.nbytes, 0.0)


def _product(name: str, compiled: cpu.Kernels, x: Tensor, affine: cpu.Affine, dtype: torch.dtype | None = None) -> Work:
    weight = affine.weight
    return Work(name, lambda: compiled.linear(x, affine, dtype), weight.nbytes, 2.0 * len(x) * weight.numel())


def _attention(
    name: str, compiled: cpu.Kernels, shape: tuple[int, int, int, int], sinks: Tensor, context: int, window: int
) -> Work:
    """The last token of each of n sequences of `context` tokens attends to all before it, or to those in the window."""
    n, heads, kv, d = shape
    seen = min(context, window) if window else context
    first = (context - seen) // PAGE_TOKENS
    held = -(-context // PAGE_TOKENS) - first  # pages of a sequence
    pools = [torch.randn(n * held, kv, PAGE_TOKENS, d).to(sinks.dtype) for _ in range(2)]
    q, k, v = (torch.randn(n, number, d).to(sinks.dtype) for number in (heads, kv, kv))
    places = cpu.Places(torch.arange(n), torch.full((n,), context - 1))
    pages = cpu.Pages(torch.randperm(n * held).view(n, held), torch.full((n,), first))
    return Work(
        name,
        lambda: compiled.attention(q, k, v, sinks, (pools[0], pools[1]), places, pages, window),
        2.0 * n * seen * kv * d * sinks.itemsize,
        4.0 * n * seen * heads * d,
    )


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def check_gpu(shape: str, batches: Sequence[int]) -> int:
    """Compare and time Triton's kernels on this machine's GPU; return an exit code."""
    from gptoss_infer.kernels import check

    print("comparing each kernel with its reference, and timing it", file=sys.stderr)
    return check.main(["--shape", shape, "--tokens", ",".join(map(str, batches))])


def header() -> str:
    """Return the head of the table."""
    return (
        f"{'kernel':<18} {'tokens':>6} {'context':>7}  {'us':>11}  {'GB/s':>7} {'of bandwidth':>12}  "
        f"{'GFLOP/s':>8} {'of arithmetic':>13}"
    )


def row(result: dict[str, Any]) -> str:
    """Return a line of it."""
    return (
        f"{result['kernel']:<18} {result['tokens']:>6} {result['context']:>7}  {result['us']:>11,.1f}  "
        f"{result['gb_per_s']:>7.2f} {result['share_of_bandwidth']:>12.1%}  {result['gflops']:>8,.1f} "
        f"{result['share_of_arithmetic']:>13.1%}"
    )
