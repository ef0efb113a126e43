"""The order of a contrastive run: no image is in a batch twice, and still every position is a pure function.

A batch that holds an image twice would call the image's own text a wrong answer. An order visits each sample once an
epoch, so an image can only repeat where an epoch ends inside a batch:

- A source with at least two batches of samples keeps its order. Only where the first samples of an epoch would repeat
  one of the last of the epoch before, in the same batch, they change places with samples of the next batch. An epoch
  still visits every sample once.
- Of a smaller source every batch takes a new draw: as many samples of a new permutation as it needs.
- A source with fewer samples than a batch takes is refused.

A bad sample is replaced by one that is not in the batch. Which rows of the batch are bad is known only to the process
that decodes them, so every row has replacements of its own: row i of n those whose number is i modulo n. Only a row
that has run out of them looks at the other rows (loader.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from openvision.data.order import Interleaved, Order
from openvision.errors import OpenVisionError


@dataclass(frozen=True)
class Grid:
    """Where the batches of a stage begin: every `batch_size` positions, one of them at `start`."""

    batch_size: int
    start: int = 0

    def number(self, position: int) -> int:
        """Number of the batch that holds `position`."""
        return (position - self.start % self.batch_size) // self.batch_size

    def batch(self, position: int) -> range:
        """Positions of the batch that holds `position`."""
        begin = position - (position - self.start) % self.batch_size
        return range(begin, begin + self.batch_size)


class DistinctOrder:
    """Position -> (source, sample index), with no sample twice in a batch of the grid."""

    def __init__(
        self,
        interleaved: Interleaved,
        orders: Sequence[Order],
        lengths: Sequence[int],
        names: Sequence[str],
        grid: Grid,
    ) -> None:
        """Raises OpenVisionError when a batch takes more samples of a source than it has."""
        self.grid = grid
        self.lengths = lengths
        self._interleaved = interleaved
        self._orders = orders
        # The samples of a batch are asked for again where an epoch ends or a sample is bad.
        self._read = [lru_cache(maxsize=4096)(order.__getitem__) for order in orders]
        self._most = interleaved.most(grid.batch_size)
        for name, length, most in zip(names, lengths, self._most, strict=True):
            if length < most:
                raise OpenVisionError(_too_few(name, length, most, grid.batch_size, len(lengths)))
        self._swaps = lru_cache(maxsize=64)(self._find_swaps)
        self._rows = lru_cache(maxsize=8)(self._find_rows)

    def __reduce__(self) -> tuple[type["DistinctOrder"], tuple[object, ...]]:
        names = [""] * len(self.lengths)
        return DistinctOrder, (self._interleaved, self._orders, self.lengths, names, self.grid)

    def __getitem__(self, position: int) -> tuple[int, int]:
        source, own = self._interleaved[position]
        return source, self._sample(source, own, position)

    def differs(self, begin: int, end: int) -> bool:
        """Whether this order differs from the plain one at any position from `begin` to `end`."""
        firsts, lasts = self._interleaved.counts(begin), self._interleaved.counts(end)
        for source, (first, last, length) in enumerate(zip(firsts, lasts, self.lengths, strict=True)):
            if first == last:
                continue
            if self._is_small(source):
                # A batch takes other samples as soon as an epoch does not begin with it.
                positions = range(begin, end)
                owns = (place for place in positions if self._interleaved[place][0] == source)
                if any(self[place][1] != self._plain(place) for place in owns):
                    return True
                continue
            for epoch in range(first // length, (last - 1) // length + 1):
                if any(first <= place < last for place in self._swaps(source, epoch)):
                    return True
        return False

    def rows(self, position: int) -> "Rows":
        """What the batch at `position` holds of the source there."""
        source, _ = self._interleaved[position]
        return self._rows(source, self.grid.batch(position))

    def _plain(self, position: int) -> int:
        source, own = self._interleaved[position]
        return self._read[source](own)

    def _is_small(self, source: int) -> bool:
        return self.lengths[source] < 2 * self._most[source]

    def _sample(self, source: int, own: int, position: int) -> int:
        """The sample at place `own` of a source, which is `position` of the run."""
        length, read = self.lengths[source], self._read[source]
        if self._is_small(source):
            first = self._interleaved.counts(self.grid.batch(position).start)[source]
            return read(self.grid.number(position) * length + own - first)
        epoch, place = divmod(own, length)
        if place >= self._most[source]:
            return read(own)
        return read(self._swaps(source, epoch).get(own, own))

    def _find_rows(self, source: int, batch: range) -> "Rows":
        found = (self._interleaved[position] for position in batch)
        owns = {position: own for position, (of, own) in zip(batch, found, strict=True) if of == source}
        samples = {position: self._sample(source, own, position) for position, own in owns.items()}
        return Rows(list(samples), samples, self.lengths[source])

    def _find_swaps(self, source: int, epoch: int) -> dict[int, int]:
        """Places of a source that an epoch begins with, where others are read -> the others' places."""
        first = epoch * self.lengths[source]
        batch = self.grid.batch(self._position(source, first))
        begin, end = (self._interleaved.counts(place)[source] for place in (batch.start, batch.stop))
        if begin >= first or not epoch:
            return {}
        read = self._read[source]
        # At least two batches of samples: the last places of the epoch before were not changed at its beginning.
        before = {read(place) for place in range(begin, first)}
        # As many samples as the batch takes hold enough that are not among `before`.
        places = range(first, first + end - begin)
        repeated = [place for place in places if place < end and read(place) in before]
        others = (place for place in places if place >= end and read(place) not in before)
        swaps: dict[int, int] = {}
        for place, other in zip(repeated, others, strict=False):
            swaps |= {place: other, other: place}
        return swaps

    def _position(self, source: int, own: int) -> int:
        """Position in the run of place `own` of a source, by bisection."""
        low, high = own, own + 1
        while self._interleaved.counts(high)[source] <= own:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self._interleaved.counts(middle)[source] <= own:
                low = middle
            else:
                high = middle
        return low


@dataclass(frozen=True)
class Rows:
    """The samples that a batch takes of one source."""

    positions: list[int]
    samples: dict[int, int]
    """Position -> sample index."""
    length: int
    """Samples of the source."""

    def replacements(self, position: int) -> Iterator[int]:
        """Samples that only the row at `position` may take in place of its own, near that one first."""
        step, row, used = len(self.positions), self.positions.index(position), set(self.samples.values())
        layers = -(-self.length // step)
        begin = self.samples[position] // step
        for offset in range(1, layers + 1):
            candidate = (begin + offset) % layers * step + row
            if candidate < self.length and candidate not in used:
                yield candidate

    def unused(self) -> list[int]:
        """Samples that are not in the batch."""
        used = set(self.samples.values())
        return [sample for sample in range(self.length) if sample not in used]


def _too_few(name: str, length: int, most: int, batch_size: int, sources: int) -> str:
    images = f"{length:,} image{'' if length == 1 else 's'}"
    if length == 1:
        return f"{name} holds {images}, and a contrastive loss tells at least two apart; add images"
    if sources == 1:
        return (
            f"{name} holds {images}, fewer than a batch of {batch_size:,}: each would meet itself as a wrong answer of "
            f"the contrastive loss; set batch_size to at most {length:,}, or add images"
        )
    return (
        f"{name} holds {images}, and a batch of {batch_size:,} takes up to {most:,} of them by its weight: each would "
        "meet itself as a wrong answer of the contrastive loss; lower its weight or batch_size, or add images"
    )
