"""The randomness of a training step beside the data, a function of (seed, position of the sample) and nothing else.

A micro-batch draws what the batch would have drawn: gradient caching can replay it, and the result depends neither on
the number of micro-batches, nor on the number of processes, nor on how often the run was stopped.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openvision.models.layers import Block
from openvision.runtime import send

# Word of the generator's counter that separates these numbers from the loader's, which have the same key.
_STREAM = 1


@dataclass(frozen=True)
class SampleRandomness:
    """The randomness of B samples."""

    seed: int
    positions: NDArray[np.int64]
    """(B,): places of the samples in the stream of the run."""
    drop_path: float = 0.0
    """Probability of dropping the branches of the last block; it grows linearly from 0 at the first block."""

    def rows(self, rows: "slice | NDArray[np.int64]") -> "SampleRandomness":
        """The randomness of some of the samples."""
        return replace(self, positions=self.positions[rows])

    def branch_scales(self, depth: int) -> Tensor | None:
        """Factors of the two branches of `depth` blocks, float32 (depth, 2, B): 0 or 1 / (1 - probability).

        None when nothing is dropped.
        """
        if not self.drop_path:
            return None
        uniform = np.stack([self._generator(position).random((depth, 2)) for position in self.positions.tolist()])
        probability = self.drop_path * np.arange(depth)[:, None] / max(depth - 1, 1)
        scales = (uniform >= probability) / (1 - probability)
        return torch.from_numpy(scales.astype(np.float32)).permute(1, 2, 0).contiguous()

    def _generator(self, position: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, position], counter=[0, 0, 0, _STREAM]))


@contextmanager
def stochastic_depth(blocks: Sequence[Block], randomness: SampleRandomness) -> Iterator[None]:
    """Scale the branches of `blocks` as drawn, forward and backward, while the context lasts."""
    scales = randomness.branch_scales(len(blocks))
    if scales is None:
        yield
        return
    device = next(blocks[0].parameters()).device
    try:
        for block, scale in zip(blocks, send(scales, device), strict=True):
            block.branch_scale = scale
        yield
    finally:
        for block in blocks:
            block.branch_scale = None
