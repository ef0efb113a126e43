"""The randomness of a training step beside the data, a function of (seed, position of the sample) and nothing else.

A micro-batch draws what the batch would have drawn: gradient caching can replay it, and the result depends neither on
the number of micro-batches, nor on the number of processes, nor on how often the run was stopped.
"""

import math
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
# The same for where the noise on tokens begins, and for crops.
_NOISE = 2
_CROP = 3


@dataclass(frozen=True)
class SampleRandomness:
    """The randomness of B samples."""

    seed: int
    positions: NDArray[np.int64]
    """(B,): places of the samples in the stream of the run."""
    drop_path: float = 0.0
    """Probability of dropping the branches of the last block; it grows linearly from 0 at the first block."""
    share: float = 1.0
    """Fraction of the process's batch that these samples are: a mean over them, times it, adds up to that of the
    batch."""

    def rows(self, rows: "slice | NDArray[np.int64]") -> "SampleRandomness":
        """The randomness of some of the samples."""
        kept = self.positions[rows]
        return replace(self, positions=kept, share=self.share * len(kept) / len(self.positions))

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

    def token_noise(self, tokens: int, width: int, most: float, device: torch.device) -> Tensor:
        """Gaussian noise float32 (B, tokens, width) whose deviation is drawn for each sample from [0, `most`].

        It is drawn on `device` by hashing counters: a host that drew it would be waited for, and would have to send it.
        """
        keys = send(torch.from_numpy(_sample_keys(self.seed, self.positions)), device)
        random = _mix(keys[:, None] + torch.arange(1 + tokens * width, device=device))
        # Two uniform numbers of 32 bits each, none of them 0, make a normal one.
        first, second = ((half & (2**32 - 1)).float() * 2.0**-32 + 2.0**-33 for half in (random >> 32, random))
        normal = (-2 * first[:, 1:].log()).sqrt() * (2 * math.pi * second[:, 1:]).cos()
        return (most * first[:, :1] * normal).unflatten(1, (tokens, width))

    def crop_numbers(self) -> Tensor:
        """What chooses a crop of each sample: uniform numbers for area, column and row, float32 (B, 3), on the CPU."""
        drawn = [self._generator(position, _CROP).random(3) for position in self.positions.tolist()]
        return torch.from_numpy(np.stack(drawn).astype(np.float32))

    def _generator(self, position: int, stream: int = _STREAM) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, position], counter=[0, 0, 0, stream]))


def _signed(value: int) -> int:
    """A 64-bit constant as torch's int64 has it."""
    return value - 2**64 if value >= 2**63 else value


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64 tensors, whose products wrap: counters become unrelated numbers."""
    x = x * _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _sample_keys(seed: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the counters of each sample begin, int64 (B,), far apart from each other."""
    keys = [np.random.Philox(key=[seed, position], counter=[0, 0, 0, _NOISE]).random_raw() for position in positions]
    return np.array(keys, dtype=np.uint64).astype(np.int64)


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
