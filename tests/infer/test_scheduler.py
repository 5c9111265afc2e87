"""The scheduler under random arrivals, ends and cancellations: pages counted by hand, and every token computed once."""

from __future__ import annotations

import random

import pytest

from gptoss_infer.scheduler import Chunk, Limits, Pool, Scheduler, Sequence

PAGE = 4


class World:
    """A scheduler, and a ledger of its own of what was computed where."""

    def __init__(self, limits: Limits, full: int, window: int) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits, Pool(full), Pool(window))
        self.live: list[Sequence] = []
        self.pages: dict[tuple[str, int], dict[int, tuple[int, ...]]] = {}  # page -> offset -> tokens up to there

    def add(self, prompt: list[int], generate: int) -> Sequence:
        sequence = Sequence(list(prompt), len(prompt), len(prompt) + generate)
        self.scheduler.add(sequence)
        self.live.append(sequence)
        return sequence

    def step(self, token: int = 7) -> list[Chunk]:
        chunks = self.scheduler.plan()
        most = self.limits.step_tokens + (self.limits.max_batch if self.limits.deterministic else 0)
        assert sum(chunk.length for chunk in chunks) <= most
        assert len(self.scheduler.running) <= self.limits.max_batch
        for chunk in chunks:
            self.compute(chunk)
        self.scheduler.advance(chunks)
        for chunk in chunks:
            if chunk.reaches_end:
                chunk.sequence.tokens.append(token)
                if len(chunk.sequence.tokens) == chunk.sequence.max_tokens:
                    self.end(chunk.sequence)
        self.count()
        return chunks

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.live.remove(sequence)

    def compute(self, chunk: Chunk) -> None:
        """Write the chunk's tokens to its pages, having read all that attention would."""
        sequence, first, length = chunk
        for kind, held, start in (("full", sequence.full, 0), ("window", sequence.window, sequence.window_first)):
            pool = self.scheduler.full if kind == "full" else self.scheduler.window
            for position in range(first, first + length):
                page = held[position // PAGE - start]
                assert pool.references[page] == 1, "a page that others read is written"
                slots = self.pages.setdefault((kind, page), {})
                if position % PAGE == 0:
                    slots.clear()
                slots[position % PAGE] = tuple(sequence.tokens[: position + 1])
            for query in range(first, first + length):
                lowest = 0 if kind == "full" else max(0, query - self.limits.window + 1)
                for position in range(lowest, query + 1):
                    page = held[position // PAGE - start]
                    assert self.pages[kind, page][position % PAGE] == tuple(sequence.tokens[: position + 1])

    def count(self) -> None:
        """Compare every page's references with who holds it."""
        kept = self.scheduler._kept.values()
        for pool, name in ((self.scheduler.full, "full"), (self.scheduler.window, "window")):
            held = [0] * pool.size
            for owner in [*self.live, *kept]:
                for page in getattr(owner, name):
                    held[page] += 1
            assert pool.references == held
            assert pool.num_free == held.count(0)


def limits(**changes: object) -> Limits:
    return Limits(**{"max_batch": 4, "step_tokens": 16, "page_tokens": PAGE, "window": 6} | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("pages", [12, 20, 200])
@pytest.mark.parametrize("seed", range(8))
def test_pages_are_read_as_they_were_written_and_none_is_lost_whatever_comes_and_goes(
    seed: int, pages: int, deterministic: bool
) -> None:
    rng = random.Random(seed)
    world = World(limits(deterministic=deterministic), pages, 24)
    beginnings = [[rng.randrange(3) for _ in range(rng.randrange(1, 30))] for _ in range(3)]
    for _ in range(300):
        if rng.random() < 0.3 and len(world.live) < 12:
            prompt = [*rng.choice(beginnings), *[rng.randrange(3) for _ in range(rng.randrange(6))]][:40]
            for _ in range(rng.choice([1, 1, 4])):
                world.add(prompt, rng.randrange(1, 8))
        if world.live and rng.random() < 0.05:
            world.end(rng.choice(world.live))
            world.count()
        world.step(rng.randrange(3))
    while world.live:
        world.step()
    world.scheduler.forget_prefixes()
    world.count()
    assert world.scheduler.full.num_free == pages
    assert world.scheduler.window.num_free == 24
    if pages == 12:
        assert world.scheduler.num_preempted > 0, "so few pages would have to run out"
    if not deterministic:  # which shares whole steps only, longer than some of these prompts
        assert world.scheduler.num_reused > 0, "prompts that begin alike share nothing"


@pytest.mark.parametrize("length", [37, 38, 39, 40])  # up to whole pages exactly: a last token is always computed
def test_the_samples_of_a_prompt_compute_what_they_share_once(length: int) -> None:
    world = World(limits(max_batch=8, step_tokens=64), 100, 60)
    for _ in range(8):
        world.add(list(range(length)), 2)
    computed = 0
    while world.live:
        computed += sum(chunk.length for chunk in world.step())
    # 36 tokens are whole pages; the rest of the prompt and 1 generated token (the second is never fed back) remain.
    assert computed == 36 + 8 * (length - 36 + 1)


def test_prompts_that_begin_alike_share_that_much_however_they_go_on() -> None:
    world = World(limits(max_batch=8, step_tokens=64), 100, 60)
    for tail in range(5):
        world.add([*range(33), 100 + tail, 200 + tail], 1)
    computed = 0
    while world.live:
        computed += sum(chunk.length for chunk in world.step())
    assert computed == 32 + 5 * 3


def test_generating_sequences_go_on_while_a_long_prompt_is_read_in_chunks() -> None:
    world = World(limits(step_tokens=8), 100, 60)
    first = world.add([1], 20)
    world.step()
    world.add(list(range(40)), 1)
    before = len(first.tokens)
    lengths = [[chunk.length for chunk in world.step()] for _ in range(5)]
    assert len(first.tokens) == before + 5
    assert lengths[0] == [1, 4], "7 tokens are left; a chunk ends on a page border"


def test_with_determinism_the_cuts_depend_on_the_sequence_alone() -> None:
    alone = World(limits(deterministic=True), 100, 60)
    alone.add([9] * 37, 6)
    expected = []
    while alone.live:
        expected += [(chunk.first, chunk.length) for chunk in alone.step()]
    assert expected == [(0, 16), (16, 16), (32, 5), (37, 1), (38, 1), (39, 1), (40, 1), (41, 1)]
    crowd = World(limits(deterministic=True), 32, 60)  # too few pages: it will be preempted
    for n in range(3):
        crowd.add([n] * 20, 40)
    mine = crowd.add([9] * 37, 6)
    got: list[tuple[int, int]] = []
    while mine in crowd.live:
        for chunk in crowd.step():
            if chunk.sequence is mine:
                got = got if chunk.first else []  # computed again from the start
                got.append((chunk.first, chunk.length))
    assert crowd.scheduler.num_preempted > 0
    assert got == expected


def test_a_sequence_that_could_outgrow_all_pages_is_refused() -> None:
    world = World(limits(), 5, 24)
    with pytest.raises(ValueError, match="up to 21 tokens; the cache holds 20"):
        world.add([1] * 15, 6)


def test_budgets_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="a multiple of a page, 4, and at least max_batch, 4"):
        limits(step_tokens=6)
    with pytest.raises(ValueError, match="expected a multiple"):
        limits(max_batch=32)


def test_the_youngest_sequence_makes_room_and_is_the_next_to_return() -> None:
    world = World(limits(max_batch=3, step_tokens=12), 9, 40)
    old, middle, young = (world.add([n] * 8, 10) for n in range(3))
    while world.scheduler.num_preempted == 0:
        world.step()
    assert young not in world.scheduler.running
    assert world.scheduler.waiting[0] is young
    assert [old, middle] == world.scheduler.running
    while world.live:
        world.step()
    assert [len(one.tokens) for one in (old, middle, young)] == [18, 18, 18]
