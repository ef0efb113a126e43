"""Learn a WordPiece vocabulary by merging the most frequent pair of neighbouring pieces repeatedly (BPE merges).

The trainer of the `tokenizers` library breaks ties by the order of a randomly seeded hash map, so two runs over the
same texts give two vocabularies (tokenizers 0.23.3). Training must be reproducible, so this one breaks ties by name.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise

CONTINUATION = "##"
Pair = tuple[str, str]


def learn_pieces(words: Mapping[str, int], size: int) -> list[str]:
    """Learn at most `size` pieces from words with their counts: single characters first, then merged pieces.

    If `size` is smaller than the number of characters, the rarest characters are left out.
    """
    split = [[word[0], *(CONTINUATION + character for character in word[1:])] for word in words]
    counts = list(words.values())
    alphabet: Counter[str] = Counter()
    for pieces, count in zip(split, counts, strict=True):
        for piece in pieces:
            alphabet[piece] += count
    learned = sorted(sorted(alphabet), key=lambda piece: -alphabet[piece])[:size]
    learned.sort()
    pairs = _Pairs(split, counts)
    known = set(learned)
    while len(learned) < size and (best := pairs.most_frequent()) is not None:
        merged = pairs.merge(best)
        # Two different pairs can spell the same piece.
        if merged not in known:
            known.add(merged)
            learned.append(merged)
    return learned


class _Pairs:
    """Counts of neighbouring pieces, kept up to date while pairs are merged."""

    def __init__(self, split: list[list[str]], counts: list[int]) -> None:
        self.split, self.word_counts = split, counts
        self.counts: dict[Pair, int] = defaultdict(int)
        self.places: dict[Pair, set[int]] = defaultdict(set)
        for index, pieces in enumerate(split):
            self._add(index, pieces, 1)
        self.heap = [(-count, pair) for pair, count in self.counts.items()]
        heapify(self.heap)

    def most_frequent(self) -> Pair | None:
        """The most frequent pair, ties broken by name; None when every word is one piece."""
        while self.heap:
            negative, pair = heappop(self.heap)
            # Entries are not removed when a count changes: outdated ones are skipped.
            if self.counts[pair] == -negative > 0:
                return pair
        return None

    def merge(self, pair: Pair) -> str:
        """Join every occurrence of `pair` and return the new piece."""
        merged = pair[0] + pair[1].removeprefix(CONTINUATION)
        changed: set[Pair] = set()
        for index in sorted(self.places[pair]):
            pieces = self.split[index]
            changed |= self._add(index, pieces, -1)
            self.split[index] = _join(pieces, pair, merged)
            changed |= self._add(index, self.split[index], 1)
        for other in changed:
            if self.counts[other] > 0:
                heappush(self.heap, (-self.counts[other], other))
        return merged

    def _add(self, index: int, pieces: list[str], sign: int) -> set[Pair]:
        neighbours = list(pairwise(pieces))
        for pair in neighbours:
            self.counts[pair] += sign * self.word_counts[index]
            if sign > 0:
                self.places[pair].add(index)
            else:
                self.places[pair].discard(index)
        return set(neighbours)


def _join(pieces: list[str], pair: Pair, merged: str) -> list[str]:
    joined: list[str] = []
    position = 0
    while position < len(pieces):
        if tuple(pieces[position : position + 2]) == pair:
            joined.append(merged)
            position += 2
        else:
            joined.append(pieces[position])
            position += 1
    return joined
