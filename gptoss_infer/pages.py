"""Keys and values in pages, and attention over them: the memory that `gptoss_infer.scheduler` deals out.

Layers are of two kinds, full and window, with a pool of pages each; a page number stands for a page in every layer of
its kind. A page holds `page_tokens` tokens of one sequence: (K, page_tokens, D) of keys, and as many of values.

A step is what the model sees as its cache: a flat batch of N tokens, some of each of several sequences. It stores their
keys and values and attends. `KernelStep` does so by the kernels of a GPU. `Step` is plain PyTorch: a sequence with one
new token goes with all others like it, padded to the longest; one with more is worked through alone, by blocks of
queries.

Legend: N tokens of the step, H query heads, K key/value heads, R = H / K, D head size, P pages of a sequence, S = P
page_tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as ListOf
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptoss_infer import kernels
from gptoss_infer.attention import cached_attention, chunk_attention
from gptoss_infer.config import ModelConfig
from gptoss_infer.model import Angles, rotate
from gptoss_infer.page_tables import Batch, Held, batch_of
from gptoss_infer.scheduler import Chunk, Sequence

Kind = Literal["full", "window"]


class PagedCache:
    """The pages of all layers."""

    def __init__(
        self,
        config: ModelConfig,
        num_pages: dict[Kind, int],
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_tokens, self.window = page_tokens, config.sliding_window
        self.kinds: list[Kind] = ["window" if kind == "sliding_attention" else "full" for kind in config.layer_types]
        shapes = [(num_pages[kind], config.num_key_value_heads, page_tokens, config.head_dim) for kind in self.kinds]
        self.keys = [_zeros(shape, dtype, device) for shape in shapes]
        self.values = [_zeros(shape, dtype, device) for shape in shapes]
        self.why_no_kernels = kernels.why_not_paged(self.keys[0])  # None if there are

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> dict[Kind, int]:
        """Return what a token takes in all layers of a kind."""
        per_layer = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
        windows = sum(kind == "sliding_attention" for kind in config.layer_types)
        return {"window": windows * per_layer, "full": (len(config.layer_types) - windows) * per_layer}


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros, since what is hidden is still multiplied, by 0; on a CPU they take no memory until written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch writes its zeros; numpy asks the system for pages that are.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class _Table(NamedTuple):
    """Where the tokens of a step and all they can see are, in the layers of one kind."""

    page: Tensor  # int64 (N,): of each new token
    single: Tensor  # int64 (B, P): pages of the sequences with one new token, padded with page 0
    single_seen: Tensor  # bool (B, S): which of the tokens there are seen
    several: list[
        tuple[Tensor, int]
    ]  # of each other sequence: int64 (P,) pages, and which token there is its first new


def step_of(cache: PagedCache, chunks: ListOf[Chunk], device: torch.device) -> Step | KernelStep:
    """Return one step over the cache, by kernels if there are."""
    return (KernelStep if cache.why_no_kernels is None else Step)(cache, chunks, device)


class _Tokens:
    """The tokens of a step, which `GptOss.hidden` takes with it."""

    real: Tensor | None = None  # all of them are

    def __init__(self, cache: PagedCache, chunks: ListOf[Chunk], device: torch.device) -> None:
        self.cache = cache
        ids = [token for s, first, length in chunks for token in s.tokens[first : first + length]]
        positions = [position for _, first, length in chunks for position in range(first, first + length)]
        self.input_ids, self.positions = torch.tensor([ids, positions], device=device)  # int64 (N,) each
        self.ends = list(accumulate(chunk.length for chunk in chunks))
        self.last_rows = [end - 1 for end in self.ends]  # of each chunk


class KernelStep(_Tokens):
    """One step over the cache by kernels; what decoding sequences share in full layers is read once for all of them."""

    def __init__(self, cache: PagedCache, chunks: ListOf[Chunk], device: torch.device) -> None:
        super().__init__(cache, chunks, device)
        self.places: dict[Kind, Tensor] = {}  # int32 (N,): page times its tokens, plus the place in it
        self.batches: dict[Kind, Batch] = {}
        size = cache.page_tokens
        for kind in set(cache.kinds):
            held, places = [], []
            for (sequence, first, length), end in zip(chunks, self.ends, strict=True):
                pages, before = held_of(sequence, kind, size)
                held.append(Held(pages, first - before, end - length, length))
                own = range(first - before, first - before + length)
                places += [pages[place // size] * size + place % size for place in own]
            self.places[kind] = torch.tensor(places, dtype=torch.int32, device=device)
            self.batches[kind] = batch_of(held, device, page_tokens=size if kind == "full" else 0)

    def attend(
        self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], angles: Angles, sinks: Tensor, window: int | None
    ) -> Tensor:
        """Do what `Step.attend` does."""
        kind = self.cache.kinds[layer]
        pages = self.cache.keys[layer], self.cache.values[layer], self.places[kind]
        return kernels.attend_paged(qkv, angles, pages, sinks, self.batches[kind], window=window)


class Step(_Tokens):
    """One step over the cache in plain PyTorch."""

    def __init__(self, cache: PagedCache, chunks: ListOf[Chunk], device: torch.device) -> None:
        super().__init__(cache, chunks, device)
        ends = self.ends
        single = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.length == 1]
        self.single_rows = torch.tensor(single, dtype=torch.int64, device=device)
        self.several_rows = [slice(end - c.length, end) for end, c in zip(ends, chunks, strict=True) if c.length > 1]
        self.offsets = self.positions % cache.page_tokens
        self.tables: dict[Kind, _Table] = {kind: _table(cache, chunks, kind, device) for kind in set(cache.kinds)}

    def attend(
        self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], angles: Angles, sinks: Tensor, window: int | None
    ) -> Tensor:
        """Store the keys and values of the step's tokens, and attend to all that each token may see.

        Args:
            qkv: (N, H, D), (N, K, D), (N, K, D), as projected. angles: by which queries and keys are rotated.
            sinks: (H,). window: of the layer; None for a full one.
        Returns: (N, H, D).
        """
        q, k, v = rotate(qkv[0], angles), rotate(qkv[1], angles), qkv[2]
        table = self.tables[self.cache.kinds[layer]]
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[table.page, :, self.offsets] = k
        values[table.page, :, self.offsets] = v
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if len(self.single_rows):
            pair = _gathered(keys, table.single), _gathered(values, table.single)  # (B, K, S, D)
            out[self.single_rows] = cached_attention(q[self.single_rows], *pair, sinks, table.single_seen)
        for rows, (pages, first) in zip(self.several_rows, table.several, strict=True):
            pair = _gathered(keys, pages[None])[0], _gathered(values, pages[None])[0]  # (K, S, D)
            out[rows] = chunk_attention(q[rows], *pair, sinks, first, window)
        return out


def held_of(sequence: Sequence, kind: Kind, page_tokens: int) -> tuple[list[int], int]:
    """Return the pages of a sequence in the layers of a kind, and how many tokens come before them."""
    return (sequence.full, 0) if kind == "full" else (sequence.window, sequence.window_first * page_tokens)


def _table(cache: PagedCache, chunks: ListOf[Chunk], kind: Kind, device: torch.device) -> _Table:
    size, window = cache.page_tokens, cache.window if kind == "window" else None
    pages: list[int] = []
    single: list[tuple[list[int], int]] = []  # pages, and which token in them is the new one
    several: list[tuple[Tensor, int]] = []
    for sequence, first, length in chunks:
        held, before = held_of(sequence, kind, size)
        pages += [held[(position - before) // size] for position in range(first, first + length)]
        if length == 1:
            single.append((held, first - before))
        else:
            several.append((torch.tensor(held, device=device), first - before))
    longest = max((len(held) for held, _ in single), default=0)
    padded = torch.tensor([held + [0] * (longest - len(held)) for held, _ in single], dtype=torch.int64)
    new = torch.tensor([at for _, at in single], dtype=torch.int64)
    distance = new.unsqueeze(1) - torch.arange(longest * size)  # (B, S)
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    padded = padded.view(len(single), longest)
    return _Table(torch.tensor(pages, device=device), padded.to(device), seen.to(device), several)


def _gathered(pool: Tensor, pages: Tensor) -> Tensor:
    """(pages, K, T, D), int64 (B, P) -> (B, K, P T, D)."""
    return pool[pages].transpose(1, 2).flatten(2, 3)
