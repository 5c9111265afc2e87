"""Keys and values in pages, and attention over them: the memory that `gptoss_infer.scheduler` deals out.

Layers are of two kinds, full and window, with a pool of pages each; a page number stands for a page in every layer of
its kind. A page holds `page_tokens` tokens of one sequence: (K, page_tokens, D) of keys, and as many of values.

`Step` is what the model sees as its cache for one step: a flat batch of N tokens, some of each of several sequences.
It stores their keys and values and attends: a sequence with one new token goes with all others like it, padded to the
longest; one with more is worked through alone, by blocks of queries.

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

from gptoss_infer.attention import cached_attention, chunk_attention
from gptoss_infer.config import ModelConfig
from gptoss_infer.scheduler import Chunk

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


class Step:
    """One step over the cache: what `GptOss.hidden` takes as its cache, and the tokens that go with it."""

    def __init__(self, cache: PagedCache, chunks: ListOf[Chunk], device: torch.device) -> None:
        self.cache = cache
        ids = [token for s, first, length in chunks for token in s.tokens[first : first + length]]
        positions = [position for _, first, length in chunks for position in range(first, first + length)]
        ends = list(accumulate(chunk.length for chunk in chunks))
        self.input_ids, self.positions = torch.tensor([ids, positions], device=device)  # int64 (N,) each
        self.last_rows = [end - 1 for end in ends]  # of each chunk
        single = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.length == 1]
        self.single_rows = torch.tensor(single, dtype=torch.int64, device=device)
        self.several_rows = [slice(end - c.length, end) for end, c in zip(ends, chunks, strict=True) if c.length > 1]
        self.offsets = self.positions % cache.page_tokens
        self.tables: dict[Kind, _Table] = {kind: _table(cache, chunks, kind, device) for kind in set(cache.kinds)}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None) -> Tensor:
        """Store the keys and values of the step's tokens, and attend to all that each token may see.

        Args:
            q: (N, H, D). k, v: (N, K, D). sinks: (H,). window: of the layer; None for a full one.
        Returns: (N, H, D).
        """
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


def _table(cache: PagedCache, chunks: ListOf[Chunk], kind: Kind, device: torch.device) -> _Table:
    size, window = cache.page_tokens, cache.window if kind == "window" else None
    pages: list[int] = []
    single: list[tuple[list[int], int]] = []  # pages, and which token in them is the new one
    several: list[tuple[Tensor, int]] = []
    for sequence, first, length in chunks:
        held, start = (sequence.full, 0) if kind == "full" else (sequence.window, sequence.window_first)
        pages += [held[position // size - start] for position in range(first, first + length)]
        if length == 1:
            single.append((held, first - start * size))
        else:
            several.append((torch.tensor(held, device=device), first - start * size))
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
