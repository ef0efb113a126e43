"""Shuffles: the sample at a position of an endless stream, as pure functions. Nothing is stored, any position is O(1).

- `GlobalShuffle`: a new permutation of all samples every epoch. For local disks.
- `BlockShuffle`: shuffled blocks of neighbouring samples, shuffled again within windows of several blocks, so that
  consecutive reads are close to each other. For object stores.
- `Interleaved`: several sources by weight, each with its own order and epochs.

Every order visits each sample exactly once an epoch. An epoch may end inside a batch: the next one begins there, and
distinct.py sees to it that no image is in that batch twice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import grain
from grain.experimental import index_shuffle

from openvision.errors import OpenVisionError

_ROUNDS = 4


class Order(Protocol):
    """Position -> sample index."""

    def __getitem__(self, position: int) -> int: ...


class GlobalShuffle:
    """A new permutation of all `length` samples every epoch."""

    def __init__(self, length: int, seed: int) -> None:
        # Grain allows for datasets that leave elements out; these have every one.
        self._samples = cast(Order, grain.MapDataset.range(length).seed(seed).shuffle().repeat())

    def __getitem__(self, position: int) -> int:
        return int(self._samples[position])


@dataclass(frozen=True)
class BlockShuffle:
    """Shuffled blocks of `block` neighbours, shuffled again within windows of `window` samples."""

    length: int
    seed: int
    block: int = 64
    window: int = 4096

    def __post_init__(self) -> None:
        if self.block < 1 or self.window < 1:
            raise OpenVisionError(f"data.block {self.block} and data.window {self.window} must be at least 1")

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.length)
        number, offset = divmod(place, self.window)
        size = min(self.window, self.length - number * self.window)
        shuffled = number * self.window + _permuted(offset, size, self.seed, epoch, number + 1)
        return self._in_blocks(shuffled, epoch)

    def _in_blocks(self, place: int, epoch: int) -> int:
        """The sample at `place` of the epoch's shuffled blocks.

        The last block may be shorter than the others: it is inserted anywhere among them, and they are permuted.
        """
        full = (self.length - 1) // self.block
        short = self.length - full * self.block
        turn = _mix(self.seed, epoch, 0) % (full + 1)
        before = turn * self.block
        if before <= place < before + short:
            return full * self.block + place - before
        slot, offset = divmod(place if place < before else place - short, self.block)
        return _permuted(slot, full, self.seed, epoch, 0) * self.block + offset


def _permuted(index: int, size: int, seed: int, epoch: int, stream: int) -> int:
    """Image of `index` under a permutation of `size` numbers, a different one for every (seed, epoch, stream)."""
    return index_shuffle(index, size - 1, _mix(seed, epoch, stream), _ROUNDS) if size > 1 else 0


def _mix(*numbers: int) -> int:
    """Hash numbers into one 32-bit number (the finaliser of splitmix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state % 2**32


class Interleaved:
    """Position -> (source, position in that source); sources are spread evenly, in proportion to their weights.

    The mixing of `grain.MapDataset.mix`, with the counts that it computes on the way.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Raises OpenVisionError for weights that are negative or sum to zero."""
        if any(not math.isfinite(weight) or weight < 0 for weight in weights) or sum(weights) <= 0:
            raise OpenVisionError(f"weights of sources must be at least 0 and not all 0, not {list(weights)}")
        # Grain's rounding: the smallest weight becomes 100.
        scale = 100 / min(weight for weight in weights if weight > 0)
        self._shares = [int(weight * scale) for weight in weights]

    def __getitem__(self, position: int) -> tuple[int, int]:
        before, after = self.counts(position), self.counts(position + 1)
        source = next(number for number, count in enumerate(before) if after[number] != count)
        return source, before[source]

    def counts(self, position: int) -> list[int]:
        """How many of the first `position` samples come from each source."""
        counts, left, remaining = [], position, sum(self._shares)
        for share in self._shares:
            rest = left * (remaining - share) // remaining if remaining else 0
            counts.append(left - rest)
            left, remaining = rest, remaining - share
        return counts

    def most(self, length: int) -> list[int]:
        """The most samples that any `length` consecutive positions take from each source."""
        most, left, remaining = [], length, sum(self._shares)
        for share in self._shares:
            most.append(-(-left * share // remaining) if remaining else 0)
            left, remaining = (-(-left * (remaining - share) // remaining) if remaining else 0), remaining - share
        return most
