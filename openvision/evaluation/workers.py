"""Processes that evaluate together: each takes a slice of the rows, all get the whole result.

Every process makes the same calls in the same order and works on an equal share, so none waits for one that does all
the work alone. Without torch.distributed there is one process and nothing is sent.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray


@dataclass(frozen=True)
class Workers:
    """Number of this process and how many there are."""

    rank: int = 0
    world: int = 1
    device: torch.device | None = None
    """Where tensors must lie to be sent (nccl sends from the GPU only); None for the CPU."""

    @staticmethod
    def current() -> "Workers":
        """The processes of the default group, or this one alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return Workers()
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
        return Workers(dist.get_rank(), dist.get_world_size(), device)

    def rows(self, total: int) -> range:
        """The rows of this process: every `world`-th."""
        return range(self.rank, total, self.world)

    def gather(self, mine: NDArray, total: int) -> NDArray:
        """Rows of all processes in order, (total, ...), from this process's, those of `rows(total)`."""
        if self.world == 1:
            return mine
        if mine.dtype == np.bool_:
            return self.gather(mine.astype(np.uint8), total).astype(np.bool_)
        longest = -(-total // self.world)
        sent = torch.zeros(longest, *mine.shape[1:], dtype=torch.from_numpy(mine[:0]).dtype, device=self.device)
        sent[: len(mine)] = torch.from_numpy(np.ascontiguousarray(mine)).to(self.device or "cpu")
        parts = [torch.empty_like(sent) for _ in range(self.world)]
        dist.all_gather(parts, sent)
        # Row r of process p is row r * world + p of the whole.
        return torch.stack(parts, dim=1).flatten(0, 1)[:total].cpu().numpy()

    def same(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The values of process 0, for a decision that rounding must not let differ."""
        if self.world == 1:
            return values
        sent = torch.from_numpy(np.ascontiguousarray(values)).to(self.device or "cpu")
        dist.broadcast(sent, 0)
        return sent.cpu().numpy()
