"""Where the keys of a step's sequences are, as tensors for a GPU, and the plain PyTorch attention over them.

The kernels that read these tables are `kernels.paged_attention`; `attend` is their reference. A table is built on the
host once per step and kind of layer.

The keys of a sequence that decodes are cut into parts, at multiples of `split_tokens` of its own length. So what it
yields does not depend on the others. Parts at the beginning that several sequences hold in the same pages (the n
samples of a prompt, or prompts with a beginning in common) are read once for all of them.

Legend: N rows of a step, H query heads, K key/value heads, D head size, T tokens of a page; B sequences of P pages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as ListOf
from typing import NamedTuple

import torch
from torch import Tensor

from gptoss_infer.attention import chunk_attention

MAX_SPLITS = 32
SPLIT_TOKENS = 128  # of the shortest sequences; doubled until there are no more than MAX_SPLITS parts


class Held(NamedTuple):
    """A sequence that has new tokens in a step."""

    pages: ListOf[int]  # in order; in layers with a window, those that are still seen
    own: int  # which token of these pages is the first new one
    row: int  # which row of the step that is; the others follow it
    length: int = 1  # new tokens


class Sequences(NamedTuple):
    """Such sequences as int32 tensors."""

    pages: Tensor  # (B, P); what is behind those in use is not read
    own: Tensor  # (B,); -1 for a slot without a sequence
    rows: Tensor  # (B,)
    lengths: Tensor  # (B,)


class Shared(NamedTuple):
    """Groups of decoding sequences that begin alike, as int32 tensors."""

    pages: Tensor  # (groups, P): one member's
    tokens: Tensor  # (groups,): how many are shared: a multiple of the members' `split_tokens`, which are equal
    members: Tensor  # (groups, M): numbers of sequences, -1 behind the last
    done: Tensor  # (B,): of each decoding sequence, how many of its tokens are shared


class Batch(NamedTuple):
    """All sequences of a step. The limits are on the host: they size the launches."""

    decode: Sequences | None  # with one new token each
    prefill: Sequences | None  # with more
    max_keys: int  # that a decoding sequence has
    max_new: int  # tokens of a sequence in prefill
    shared: Shared | None = None


def split_tokens(length: int) -> int:
    """Return into parts of how many tokens the keys of a sequence are cut: a power of two times SPLIT_TOKENS."""
    size = SPLIT_TOKENS
    while size * MAX_SPLITS < length:
        size *= 2
    return size


def batch_of(held: ListOf[Held], device: torch.device | str, *, page_tokens: int = 0) -> Batch:
    """Return the tables of a step.

    Args:
        page_tokens: look for beginnings that are shared, in pages of so many tokens; 0 to leave that out, as in layers
            with a window.
    """
    decode = [one for one in held if one.length == 1]
    prefill = [one for one in held if one.length > 1]
    shared = None
    if page_tokens:
        groups = shared_beginnings([one.pages for one in decode], [one.own for one in decode], page_tokens)
        shared = _shared(groups, decode, device) if groups else None
    return Batch(
        _sequences(decode, device) if decode else None,
        _sequences(prefill, device) if prefill else None,
        max((one.own + 1 for one in decode), default=0),
        max((one.length for one in prefill), default=0),
        shared,
    )


def shared_beginnings(pages: ListOf[ListOf[int]], own: ListOf[int], page_tokens: int) -> list[tuple[list[int], int]]:
    """Return groups of two or more sequences, and how many tokens at their beginning each group has in common.

    Those are whole parts of all members, and none holds a member's new token. A sequence is in at most one group; of
    the ways to group, one is taken that saves the most reading.
    """
    by_size: dict[int, list[int]] = defaultdict(list)
    for number, position in enumerate(own):
        by_size[split_tokens(position + 1)].append(number)
    found = []
    for size, numbers in by_size.items():
        parts = {n: _Parts(pages[n], size // page_tokens, own[n] // size) for n in numbers}
        found += [(members, depth * size) for members, depth in _group(numbers, parts, 0)[1]]
    return found


class _Parts(NamedTuple):
    """The whole parts of a sequence that come before its new token."""

    pages: ListOf[int]
    size: int  # in pages
    number: int

    def part(self, n: int) -> tuple[int, ...]:
        """Return the pages of part n."""
        return tuple(self.pages[n * self.size : (n + 1) * self.size])


def _group(numbers: list[int], parts: dict[int, _Parts], depth: int) -> tuple[int, list[tuple[list[int], int]]]:
    """Return how many parts need not be read, and the groups, of sequences that agree in their first `depth` parts.

    What nobody shares is not looked into further: this runs in every step.
    """
    here = (len(numbers) - 1) * depth, [(numbers, depth)] if depth and len(numbers) > 1 else []
    branches: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number in numbers:
        if parts[number].number > depth:
            branches[parts[number].part(depth)].append(number)
    deeper = [_group(members, parts, depth + 1) for members in branches.values() if len(members) > 1]
    saved = sum(branch[0] for branch in deeper)
    return (saved, [group for branch in deeper for group in branch[1]]) if saved >= here[0] and deeper else here


def _sequences(held: list[Held], device: torch.device | str) -> Sequences:
    columns = ([one.own for one in held], [one.row for one in held], [one.length for one in held])
    return Sequences(
        _padded([one.pages for one in held], 0, device),
        *(torch.tensor(column, dtype=torch.int32, device=device) for column in columns),
    )


def _shared(groups: list[tuple[list[int], int]], decode: list[Held], device: torch.device | str) -> Shared:
    done = [0] * len(decode)
    for members, tokens in groups:
        for member in members:
            done[member] = tokens
    return Shared(
        _padded([decode[members[0]].pages for members, _ in groups], 0, device),
        torch.tensor([tokens for _, tokens in groups], dtype=torch.int32, device=device),
        _padded([members for members, _ in groups], -1, device),
        torch.tensor(done, dtype=torch.int32, device=device),
    )


def _padded(rows: ListOf[ListOf[int]], fill: int, device: torch.device | str) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], dtype=torch.int32, device=device)


def attend(q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, batch: Batch, *, window: int | None) -> Tensor:
    """Attend from the new tokens of a step to their sequences' keys, their own included; in plain PyTorch.

    Args:
        q: (N, H, D). keys, values: (pages, K, T, D). sinks: (H,).
        window: how many keys a token sees, its own included; None for all before it.
    Returns: (N, H, D); rows that belong to no sequence hold anything.
    """
    out = torch.empty_like(q)
    for sequences in (batch.decode, batch.prefill):
        if sequences is None:
            continue
        for pages, *numbers in zip(*sequences, strict=True):
            own, row, length = (int(number) for number in numbers)
            if own < 0:
                out[row] = 0
                continue
            used = pages[: -(-(own + length) // keys.shape[2])].long()
            k, v = (x[used].transpose(0, 1).flatten(1, 2) for x in (keys, values))  # (K, S, D)
            out[row : row + length] = chunk_attention(q[row : row + length], k, v, sinks, own, window)
    return out
