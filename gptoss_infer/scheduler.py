"""Which tokens the next step computes: continuous batching over paged memory. Pure bookkeeping, no tensors.

A step computes some tokens of some sequences: one for each that is generating, and as much of the waiting prompts as
the rest of the budget allows. Keys and values live in pages of two pools: full layers keep a page for every 64 tokens
of a sequence, window layers only the pages that a query still sees.

- **Shared prefixes.** Where a chunk of a prompt ends on a page border, its pages are kept by the digest of all tokens
  before, and of the window layers' pages those that the next token sees. A later prompt with the same beginning starts
  from there: the n samples of a prompt, and prompts with a beginning in common, of which one is computed while the
  others wait for it. Pages are counted by reference and never written again once full.
- **Preemption.** When no page is free, kept prefixes go, the least recently used first; then the youngest sequence
  loses its pages, waits at the front, and is computed again from its tokens.
- **Determinism.** With `deterministic`, the cuts between chunks depend on the sequence alone: multiples of
  `step_tokens` in the prompt, then one token at a time, also when a sequence is computed again. (The engine then runs
  every chunk on its own.)

Used by `gptoss_infer.engine`. Prior art: vLLM (Kwon et al., arXiv 2309.06180), nano-vllm.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import NamedTuple


class Pool:
    """Numbers of pages, counted by reference."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.references = [0] * size
        self._free = list(range(size - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """Return a page that nobody held. Raises: IndexError if there is none."""
        page = self._free.pop()
        self.references[page] = 1
        return page

    def share(self, pages: Tokens[int]) -> list[int]:
        """Hold pages once more."""
        for page in pages:
            self.references[page] += 1
        return list(pages)

    def release(self, pages: Tokens[int]) -> None:
        """Let go of pages."""
        for page in pages:
            self.references[page] -= 1
            assert self.references[page] >= 0, f"page {page} was released more often than held"
            if self.references[page] == 0:
                self._free.append(page)


@dataclass(eq=False)
class Sequence:
    """Tokens of a prompt and what was generated after it, and the pages of those that are computed."""

    tokens: list[int]
    num_prompt: int
    max_tokens: int  # of prompt and generated together
    salt: bytes = b""  # what keys and values depend on beside tokens: pages are shared where it is the same
    computed: int = 0  # tokens whose keys and values are in pages
    full: list[int] = field(default_factory=list)  # pages of the full layers, from token 0 on
    window: list[int] = field(default_factory=list)  # pages of the window layers, from page `window_first` on
    window_first: int = 0
    digests: list[bytes] = field(default_factory=list)  # of the prompt up to the end of each page
    marks: set[int] = field(default_factory=set)  # where, on page borders of the prompt, others can start from

    @property
    def missing(self) -> int:
        """How many known tokens are not computed."""
        return len(self.tokens) - self.computed


class Chunk(NamedTuple):
    """Tokens first .. first + length - 1 of a sequence, all in one step."""

    sequence: Sequence
    first: int
    length: int

    @property
    def reaches_end(self) -> bool:
        """Whether the step yields what follows the sequence."""
        return self.first + self.length == len(self.sequence.tokens)


@dataclass(frozen=True)
class Limits:
    """What a step may take."""

    max_batch: int  # sequences with pages
    step_tokens: int  # tokens of a step
    page_tokens: int
    window: int  # tokens that a query of a window layer sees, its own included
    deterministic: bool = False

    def __post_init__(self) -> None:
        """Refuse what could not work."""
        if self.step_tokens % self.page_tokens or self.step_tokens < self.max_batch:
            raise ValueError(
                f"step_tokens is {self.step_tokens}; expected a multiple of a page, {self.page_tokens}, and at least "
                f"max_batch, {self.max_batch}"
            )

    @property
    def budget(self) -> int:
        """How many tokens a step computes, at most. Chunks that must not be cut fit in beside all that generate."""
        return self.step_tokens + (self.max_batch if self.deterministic else 0)

    @property
    def window_pages(self) -> int:
        """How many pages of the window layers a token can see, at most."""
        return (self.window + self.page_tokens - 2) // self.page_tokens + 1


class _Prefix(NamedTuple):
    tokens: int
    full: list[int]
    window: list[int]
    window_first: int


class Scheduler:
    """Decides step by step; see the module docstring. `plan`, compute, `advance`, append a token or `remove`; again."""

    def __init__(self, limits: Limits, full: Pool, window: Pool) -> None:
        self.limits, self.full, self.window = limits, full, window
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preempted = 0
        self.num_reused = 0  # tokens that were not computed, since a prefix was kept
        self._kept: OrderedDict[bytes, _Prefix] = OrderedDict()  # by digest, least recently used first

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue.

        Raises: ValueError if it could grow beyond all pages there are.
        """
        most = self.full.size * self.limits.page_tokens
        if sequence.max_tokens > most:
            raise ValueError(f"a sequence of up to {sequence.max_tokens} tokens; the cache holds {most}")
        sequence.digests = _digests(sequence.tokens[: sequence.num_prompt], self.limits.page_tokens, sequence.salt)
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever it was doing, and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def forget_prefixes(self) -> None:
        """Free all pages that no sequence holds."""
        while self._kept:
            self._evict()

    def plan(self) -> list[Chunk]:
        """Return the chunks of the next step, with pages for all of them; empty only if there is nothing to do."""
        chunks: dict[int, Chunk] = {}  # by id of the sequence
        budget = self.limits.budget
        preempted = self.num_preempted
        # What generates goes first: it costs little, and someone is reading it.
        for sequence in sorted(self.running, key=lambda s: s.missing > 1):
            count = min(self._wanted(sequence), budget) if sequence in self.running else 0
            while count and not self._reserve(sequence, count):
                victim = self.running[-1]
                self._preempt(victim)
                dropped = chunks.pop(id(victim), None)
                budget += dropped.length if dropped else 0
                if victim is sequence:
                    count = 0
            if count:
                chunks[id(sequence)] = Chunk(sequence, sequence.computed, count)
                budget -= count
        if self.num_preempted == preempted:
            self._admit(chunks, budget)
        assert chunks or not (self.running or self.waiting), "sequences wait, and nothing can run"
        return list(chunks.values())

    def advance(self, chunks: list[Chunk]) -> None:
        """Account for chunks that were computed: keep prefixes, and free the pages that no window sees any more."""
        size = self.limits.page_tokens
        for sequence, first, length in chunks:
            sequence.computed = first + length
            for border in sorted(sequence.marks):
                if first < border <= sequence.computed:
                    self._keep(sequence, border)
            seen = max(0, sequence.computed - self.limits.window + 1) // size
            gone = seen - sequence.window_first
            if gone > 0:
                self.window.release(sequence.window[:gone])
                del sequence.window[:gone]
                sequence.window_first = seen

    def _wanted(self, sequence: Sequence) -> int:
        """Return how many tokens of a sequence its next chunk is to have, as far as the budget goes."""
        start, size = sequence.computed, self.limits.page_tokens
        if self.limits.deterministic:
            if start >= sequence.num_prompt:
                return min(1, sequence.missing)
            return min(sequence.num_prompt - start, self.limits.step_tokens - start % self.limits.step_tokens)
        # A chunk stops where others can start from, other than at the end of the prompt: what is left there, less than
        # a page, is not worth a step.
        stops = [mark for mark in sequence.marks if mark > start and mark + size < sequence.num_prompt]
        return min([sequence.missing, *(mark - start for mark in stops)])

    def _admit(self, chunks: dict[int, Chunk], budget: int) -> None:
        """Start waiting sequences, in order; those wait on whose beginning is being computed already."""
        for sequence in list(self.waiting):
            if budget == 0 or len(self.running) == self.limits.max_batch:
                return
            if self._is_being_computed(sequence):
                continue
            self._start_from_prefix(sequence)
            self._mark(sequence)
            count = self._wanted(sequence)
            if count > budget:
                if self.limits.deterministic:
                    self._release(sequence)
                    return
                count = budget // self.limits.page_tokens * self.limits.page_tokens or budget
            if not self._reserve(sequence, count):
                self._release(sequence)
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self.num_reused += sequence.computed
            chunks[id(sequence)] = Chunk(sequence, sequence.computed, count)
            budget -= count

    def _mark(self, sequence: Sequence) -> None:
        """Note where others can start from: the end of the prompt, and of what it has in common with the next one."""
        size = self.limits.page_tokens
        borders = {(sequence.num_prompt - 1) // size * size}
        following = next((other for other in self.waiting if other is not sequence), None)
        if following is not None:
            pairs = zip(sequence.digests, following.digests, strict=False)
            borders.add(sum(1 for ours, theirs in pairs if ours == theirs) * size)
        step = self.limits.step_tokens if self.limits.deterministic else size
        sequence.marks = {border // step * step for border in borders} - {0}

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """Whether a running sequence will soon leave more of this one's beginning than is kept now."""
        kept = self._longest_prefix(sequence)
        for other in self.running:
            for mark in other.marks:
                page = mark // self.limits.page_tokens
                usable = kept < mark < sequence.num_prompt and other.computed < mark
                if usable and sequence.digests[page - 1] == other.digests[page - 1]:
                    return True
        return False

    def _longest_prefix(self, sequence: Sequence) -> int:
        """Return how many tokens of a prompt are kept; at least its last one is not."""
        for page in range((sequence.num_prompt - 1) // self.limits.page_tokens, 0, -1):
            if sequence.digests[page - 1] in self._kept:
                return page * self.limits.page_tokens
        return 0

    def _start_from_prefix(self, sequence: Sequence) -> None:
        tokens = self._longest_prefix(sequence)
        if tokens == 0:
            return
        digest = sequence.digests[tokens // self.limits.page_tokens - 1]
        self._kept.move_to_end(digest)
        prefix = self._kept[digest]
        sequence.full, sequence.window = self.full.share(prefix.full), self.window.share(prefix.window)
        sequence.window_first, sequence.computed = prefix.window_first, tokens

    def _keep(self, sequence: Sequence, border: int) -> None:
        """Hold the pages before a border for others."""
        size = self.limits.page_tokens
        digest = sequence.digests[border // size - 1]
        if digest in self._kept:
            return
        seen = max(0, border - self.limits.window + 1) // size
        assert seen >= sequence.window_first, "the window's pages at this border are gone"
        window = sequence.window[seen - sequence.window_first : border // size - sequence.window_first]
        full = sequence.full[: border // size]
        self._kept[digest] = _Prefix(border, self.full.share(full), self.window.share(window), seen)

    def _evict(self) -> None:
        _, prefix = self._kept.popitem(last=False)
        self.full.release(prefix.full)
        self.window.release(prefix.window)

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        """Give a sequence the pages for its next `count` tokens, all or none; kept prefixes make room.

        Of the full layers, for all its tokens: a prompt that is begun can be finished.
        """
        size = self.limits.page_tokens
        more_full = -(-len(sequence.tokens) // size) - len(sequence.full)
        more_window = -(-(sequence.computed + count) // size) - sequence.window_first - len(sequence.window)
        while self.full.num_free < more_full or self.window.num_free < more_window:
            if not self._kept:
                return False
            self._evict()
        sequence.full += [self.full.take() for _ in range(more_full)]
        sequence.window += [self.window.take() for _ in range(more_window)]
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.num_preempted += 1

    def _release(self, sequence: Sequence) -> None:
        self.full.release(sequence.full)
        self.window.release(sequence.window)
        sequence.full, sequence.window, sequence.window_first, sequence.computed = [], [], 0, 0


def _digests(tokens: list[int], page_tokens: int, salt: bytes) -> list[bytes]:
    """Return the digest of all tokens up to the end of each whole page."""
    running, found = hashlib.blake2b(salt, digest_size=16), []
    for end in range(page_tokens, len(tokens) + 1, page_tokens):
        running.update(array("q", tokens[end - page_tokens : end]).tobytes())
        found.append(running.copy().digest())
    return found
