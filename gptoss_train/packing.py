"""Which samples share a pack of at most `pack_tokens` tokens, and which packs make an optimizer step.

Here: the plan of an epoch and the way from an optimizer step to its packs, out of the samples' lengths alone. Not here:
the packs' tensors and the mask that keeps their samples apart. Used by the training loop.

A plan depends on (lengths, pack_tokens, packs_per_step, seed, epoch) and nothing else: neither on the number of
processes nor on interruptions. Every process makes the whole plan and takes `packs[rank::world]` of each step, so that
all together see what one process would. The last step of an epoch may hold fewer packs than there are processes; one
that gets none still takes part in the step, with no gradient of its own.

How samples are packed. Best-fit-decreasing, the usual choice, fills packs best, and sorts them by length: its first
packs hold the longest samples of a window and its last ones the shortest, so that a step would train on either. Here
samples come in random order and each goes to the open pack that it fills best, which leaves the mix of lengths in a
pack close to that of the data; only the packs that stay under `MIN_FILL` are taken apart and packed again by
best-fit-decreasing, window by window. Then the packs of the epoch are shuffled.
Source: best fit and best fit decreasing, Johnson et al., SIAM J. Comput. 3(4), 1974.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence

import torch

MIN_FILL = 0.97  # packs below this share of the budget are packed a second time
MAX_OPEN_PACKS = 1024  # that a sample may go to in the first round; bounds its time to n log MAX_OPEN_PACKS
WINDOW_SAMPLES = 4096  # sorted together in the second round

Pack = list[int]  # indices of samples


def plan_epoch(
    lengths: Sequence[int], pack_tokens: int, packs_per_step: int, seed: int, epoch: int
) -> list[list[Pack]]:
    """Return the steps of an epoch, each a list of packs, each a list of sample indices; every sample occurs once.

    Every step has `packs_per_step` packs but the last, which takes what is left. The order is that of a
    `torch.Generator`, seeded as in `data.batch_indices`.

    Args:
        lengths: tokens of every sample, from 1 to `pack_tokens`.
        pack_tokens: most tokens of a pack.
    Raises: ValueError naming the sample whose length is out of that range, or a budget below 1.
    """
    _check(lengths, pack_tokens, packs_per_step)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    packs: list[Pack] = []
    again: list[int] = []
    for pack in _best_fit(order, lengths, pack_tokens, MAX_OPEN_PACKS):
        if sum(lengths[sample] for sample in pack) < MIN_FILL * pack_tokens:
            again += pack
        else:
            packs.append(pack)
    for start in range(0, len(again), WINDOW_SAMPLES):
        longest_first = sorted(again[start : start + WINDOW_SAMPLES], key=lambda sample: -lengths[sample])
        packs += _best_fit(longest_first, lengths, pack_tokens, WINDOW_SAMPLES)
    shuffled = [packs[n] for n in torch.randperm(len(packs), generator=generator).tolist()]
    return [shuffled[start : start + packs_per_step] for start in range(0, len(shuffled), packs_per_step)]


def _check(lengths: Sequence[int], pack_tokens: int, packs_per_step: int) -> None:
    if pack_tokens < 1 or packs_per_step < 1:
        raise ValueError(f"pack_tokens is {pack_tokens}, packs_per_step {packs_per_step}; expected at least 1 of each")
    for sample, length in enumerate(lengths):
        if not 1 <= length <= pack_tokens:
            raise ValueError(
                f"sample {sample} has {length} tokens, expected 1 to pack_tokens, {pack_tokens}; leave it out or "
                "raise the budget"
            )


def _best_fit(samples: Iterable[int], lengths: Sequence[int], pack_tokens: int, max_open: int) -> list[Pack]:
    """Put each sample in turn into the open pack with the least room that takes it, the oldest of equals.

    Without such a pack it opens a new one; with more than `max_open` open, the fullest is closed.
    """
    packs: list[Pack] = []
    rooms: list[tuple[int, int]] = []  # tokens left and index of the open packs, sorted
    for sample in samples:
        length = lengths[sample]
        place = bisect_left(rooms, (length, 0))
        if place < len(rooms):
            room, pack = rooms.pop(place)
        else:
            room, pack = pack_tokens, len(packs)
            packs.append([])
        packs[pack].append(sample)
        if room > length:
            insort(rooms, (room - length, pack))
        if len(rooms) > max_open:
            del rooms[0]
    return packs


def fill(steps: Iterable[Sequence[Pack]], lengths: Sequence[int], pack_tokens: int) -> float:
    """Return the share of the packs' budget that holds tokens, 0 to 1; 1 without packs, which waste nothing."""
    packs = [pack for step in steps for pack in step]
    budget = len(packs) * pack_tokens
    return sum(lengths[sample] for pack in packs for sample in pack) / budget if budget else 1.0


class Plan:
    """The packs of every optimizer step, epochs following each other without end.

    Epochs may differ by a few packs and so in their number of steps. Where an epoch starts is found by planning those
    before it, once (below a second for 100,000 samples); their step counts and the latest plan are kept.
    Raises: ValueError as `plan_epoch`, or without a sample.
    """

    def __init__(self, lengths: Sequence[int], pack_tokens: int, packs_per_step: int, seed: int) -> None:
        if not lengths:
            raise ValueError("lengths is empty, expected a sample to plan for")
        self.lengths, self.pack_tokens, self.packs_per_step, self.seed = lengths, pack_tokens, packs_per_step, seed
        self._starts = [0]  # first step of each epoch whose predecessors are planned
        self._epoch, self._steps = -1, list[list[Pack]]()

    def packs(self, step: int) -> list[Pack]:
        """Return the packs of optimizer step `step` (from 0), for all processes together; see the module."""
        epoch, index = self.position(step)
        return self.epoch(epoch)[index]

    def position(self, step: int) -> tuple[int, int]:
        """Return the epoch of optimizer step `step` and its index in it, both from 0."""
        assert step >= 0, f"step is {step}, expected at least 0"
        while self._starts[-1] <= step:
            self._extend()
        epoch = bisect_right(self._starts, step) - 1
        return epoch, step - self._starts[epoch]

    def total_steps(self, epochs: int) -> int:
        """Return the optimizer steps of the first `epochs` epochs."""
        while len(self._starts) <= epochs:
            self._extend()
        return self._starts[epochs]

    def epoch(self, epoch: int) -> list[list[Pack]]:
        """Return the steps of an epoch as `plan_epoch` does."""
        if epoch != self._epoch:
            self._steps = plan_epoch(self.lengths, self.pack_tokens, self.packs_per_step, self.seed, epoch)
            self._epoch = epoch
        return self._steps

    def _extend(self) -> None:
        """Plan the first epoch of unknown length."""
        self._starts.append(self._starts[-1] + len(self.epoch(len(self._starts) - 1)))
