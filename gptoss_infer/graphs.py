"""Decoding steps as CUDA graphs: one launch for all layers, where some 15 a layer would keep a GPU waiting.

A graph replays what was launched once, on the memory it was launched with. So the tables of a step lie at fixed places
(`StaticStep`), one copy from the host fills them, and shapes come in a few sizes: slots for sequences, some of which
stay empty, and pages that a sequence holds. A graph is recorded when its size first comes up.

Without a graph run: steps that read prompts, steps with an adapter (its factors change places), steps whose sequences
share what they begin with (which is then read once for all), and batches beyond the largest size. Used by the engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptoss_infer import kernels
from gptoss_infer.errors import MachineError
from gptoss_infer.model import Angles, GptOss, MoE
from gptoss_infer.page_tables import Batch, Sequences, shared_beginnings
from gptoss_infer.pages import Kind, PagedCache, held_of
from gptoss_infer.scheduler import Chunk

SWITCH = "GPTOSS_CUDA_GRAPHS"  # in the environment: 0 decodes step by step
SLOTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
ALIGNMENT = 4  # numbers: parts begin at multiples of 16 bytes, as tensors do, so that kernels are compiled once

Replay = Callable[[], Tensor]


def why_no_graphs(model: GptOss, cache: PagedCache) -> str | None:
    """Return why decoding runs without graphs; None if it can run with them."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 is set"
    if cache.why_no_kernels is not None:
        return f"attention runs in plain PyTorch: {cache.why_no_kernels}"
    if any(isinstance(module, MoE) and module.tiled is None for module in model.modules()):
        return "experts run in plain PyTorch, whose host waits for the routing"
    return None


class Size(NamedTuple):
    """What a graph has room for."""

    slots: int
    pages: int  # of the full layers, per sequence

    @classmethod
    def of(cls, num_sequences: int, num_pages: int) -> Size:
        """Return the smallest that holds so many sequences of so many pages at most."""
        return cls(next(slots for slots in SLOTS if slots >= num_sequences), 1 << (num_pages - 1).bit_length())


class StaticStep:
    """What the model sees as its cache in a decoding step: tables that are filled anew for every step, in place."""

    def __init__(self, cache: PagedCache, size: Size, device: torch.device) -> None:
        self.cache, self.size = cache, size
        window_pages = (cache.window + cache.page_tokens - 2) // cache.page_tokens + 1
        self.num_pages: dict[Kind, int] = {"full": size.pages, "window": window_pages}
        parts: dict[str, tuple[int, ...]] = {"ids": (size.slots,), "positions": (size.slots,)}
        for kind in sorted(set(cache.kinds)):
            parts |= {f"{kind} places": (size.slots,), f"{kind} own": (size.slots,)}
            parts[f"{kind} pages"] = (size.slots, self.num_pages[kind])
        total, self._spans = 0, {}
        for name, shape in parts.items():
            count = shape[0] * (shape[1] if len(shape) > 1 else 1)
            self._spans[name] = slice(total, total + count)
            total += -(-count // ALIGNMENT) * ALIGNMENT
        self._host = torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._packed = torch.zeros(total, dtype=torch.int32, device=device)
        tables = {name: self._packed[span].view(parts[name]) for name, span in self._spans.items()}
        self.input_ids, self.positions = tables["ids"], tables["positions"]
        rows = torch.arange(size.slots, dtype=torch.int32, device=device)
        self.places: dict[Kind, Tensor] = {}
        self.batches: dict[Kind, Batch] = {}
        for kind in set(cache.kinds):
            self.places[kind] = tables[f"{kind} places"]
            decode = Sequences(tables[f"{kind} pages"], tables[f"{kind} own"], rows, torch.ones_like(rows))
            self.batches[kind] = Batch(decode, None, self.num_pages[kind] * cache.page_tokens, 0)
        self._own = tables[f"{cache.kinds[0]} own"]

    @property
    def real(self) -> Tensor:
        """Which slots hold a sequence, bool (slots,)."""
        return self._own >= 0

    def fill(self, chunks: Sequence[Chunk]) -> None:
        """Put the last token of some sequences into the first slots; the others stay empty."""
        empty, page_tokens = self.size.slots - len(chunks), self.cache.page_tokens
        self._put("ids", [chunk.sequence.tokens[chunk.first] for chunk in chunks] + [0] * empty)
        self._put("positions", [chunk.first for chunk in chunks] + [0] * empty)
        for kind, num_pages in self.num_pages.items():
            if kind not in self.batches:
                continue
            pages, own, places = [], [], []
            for sequence, first, _ in chunks:
                held, before = held_of(sequence, kind, page_tokens)
                at = first - before
                pages += [*held, *[0] * (num_pages - len(held))]
                own.append(at)
                places.append(held[at // page_tokens] * page_tokens + at % page_tokens)
            self._put(f"{kind} pages", pages + [0] * (empty * num_pages))
            self._put(f"{kind} own", own + [-1] * empty)
            self._put(f"{kind} places", places + [-1] * empty)
        self._packed.copy_(self._host, non_blocking=True)

    def _put(self, name: str, values: list[int]) -> None:
        self._host[self._spans[name]] = torch.tensor(values, dtype=torch.int32)

    def attend(
        self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], angles: Angles, sinks: Tensor, window: int | None
    ) -> Tensor:
        """Do what `pages.Step.attend` does; rows of empty slots hold anything."""
        kind = self.cache.kinds[layer]
        pages = self.cache.keys[layer], self.cache.values[layer], self.places[kind]
        return kernels.attend_paged(qkv, angles, pages, sinks, self.batches[kind], window=window)


class Graphs:
    """The graphs of a model over a cache."""

    def __init__(self, model: GptOss, cache: PagedCache, record: Callable[[Replay], Replay] | None = None) -> None:
        """Record nothing yet. `record` turns a function into one that does the same again; by default a CUDA graph."""
        self.model, self.cache = model, cache
        self._record = record or _Recorder()
        self._recorded: dict[Size, tuple[StaticStep, Replay]] = {}

    def logits(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """Compute a step and return the logits (B, V) of its sequences, or None if there is no graph for such a step.

        They are overwritten by the next step.
        """
        if len(chunks) > SLOTS[-1] or not all(chunk.length == 1 and chunk.reaches_end for chunk in chunks):
            return None
        held = [chunk.sequence.full for chunk in chunks]
        if shared_beginnings(held, [chunk.first for chunk in chunks], self.cache.page_tokens):
            return None
        size = Size.of(len(chunks), max(1, *map(len, held)))
        if size not in self._recorded:
            step = StaticStep(self.cache, size, self.model.device)
            step.fill(chunks)
            self._recorded[size] = step, self._record(lambda: self._run(step))
        step, replay = self._recorded[size]
        step.fill(chunks)
        return replay()[: len(chunks)]

    def _run(self, step: StaticStep) -> Tensor:
        hidden = self.model.hidden(step.input_ids[None], step.positions[None], step)[0]  # (slots, C)
        return self.model.lm_head(hidden)


class _Recorder:
    """Records CUDA graphs that take their memory from one pool, as only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Replay) -> Replay:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # compiles kernels, which cannot be recorded; what it writes is written again
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                result = run()
        except RuntimeError as error:
            raise MachineError(f"a step cannot be recorded ({error}); {SWITCH}=0 decodes without graphs") from error
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
