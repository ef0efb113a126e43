"""The order of samples: a function of seed and position alone, so a continued run sees what an unbroken one sees."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

# Batches whose samples are sorted together: enough to find samples of like length, few enough to stay shuffled.
_POOL = 50


class SampleOrder(Sampler[int]):
    """Exactly `steps` batches: epochs of shuffled samples, one behind the other.

    With `lengths`, samples of like length share a batch.
    """

    def __init__(self, size: int, batch_size: int, steps: int, seed: int, lengths: Sequence[int] | None = None) -> None:
        """`batch_size` is that of an optimizer step over all devices."""
        self.size = size
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self.lengths = lengths

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __iter__(self) -> Iterator[int]:
        stream = self._shuffled()
        left = self.steps
        while left > 0:
            batches = min(_POOL, left)
            yield from self._arranged([next(stream) for _ in range(batches * self.batch_size)], left)
            left -= batches

    def _shuffled(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(self.size, generator=generator).tolist()

    def _arranged(self, pool: list[int], left: int) -> list[int]:
        """The same samples, those of like length together, in batches of random order."""
        lengths = self.lengths
        if lengths is None:
            return pool
        pool = sorted(pool, key=lambda index: -lengths[index])
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + left)
        order = torch.randperm(len(pool) // self.batch_size, generator=generator).tolist()
        return [pool[batch * self.batch_size + at] for batch in order for at in range(self.batch_size)]
