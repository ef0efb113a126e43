"""One training step, read top to bottom: forward, losses, backward, agree, update.

The trainer's `_step` fetches the batch before it and logs after it: losses stay on the device until they are read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openvision.data.loader import Batch
from openvision.objectives.gather import all_sum
from openvision.runtime import autocast
from openvision.training.gradient_caching import accumulate_gradients
from openvision.training.guards import refuse_broken
from openvision.training.losses import Losses
from openvision.training.objective import Objective, total, vision_blocks
from openvision.training.optimizer import Adam
from openvision.training.randomness import Draws, stochastic_depth
from openvision.training.setup.parallel import Spread

Admit = Callable[[Losses, Tensor], bool]


@dataclass
class Step:
    """What every step of a stage has in common."""

    model: Any
    objective: Objective
    optimizer: Adam
    precision: torch.dtype = torch.float32
    parts: int = 1
    """Chunks a batch is run in; they change what fits into memory, not the result."""
    spread: Spread | None = None
    """How `model` is spread over the processes of the run; None for one process."""
    admit: Admit = refuse_broken
    """Given losses and norm of the gradient, says whether the update is made, or raises."""

    def __call__(self, batch: Batch, draws: Draws, learning_rate: float, measure: bool = False) -> Losses:
        """Update the model once; returns the losses that the update was computed from.

        `measure` leaves the norms of gradient, parameters and update to be read from `norms`. Raises OpenVisionError
        before the update when a loss or the gradient is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward_in_parts(batch, draws) if self.parts > 1 else self._backward(batch, draws)
        if self.spread is not None:
            self.spread.finish_gradients(through_forward=self.parts == 1)
        if self.admit(losses, self.optimizer.gradient_norm()):
            self.optimizer.update(learning_rate, measure)
        return losses

    def norms(self) -> dict[str, float]:
        """Norms of the newest update that was measured, by the names of the log; this waits for the device."""
        norms = self.optimizer.norms
        return {} if norms is None else {f"{name}_norm": norm.item() for name, norm in vars(norms).items()}

    def _count(self, batch: Batch) -> Tensor:
        """Target tokens a process: with it the mean over processes of their losses is that of the global batch."""
        own = batch.label_mask.sum()
        if self.spread is None or self.spread.group is None:
            return own
        return all_sum(own, self.spread.group) / self.spread.processes.size

    def _backward(self, batch: Batch, draws: Draws) -> Losses:
        # DDP averages gradients while they are made, if the forward pass goes through it.
        model = self.model if self.spread is None else self.spread.forward
        with stochastic_depth(vision_blocks(self.model), draws):
            with autocast(batch.images.device.type, self.precision):
                embeds, terms = self.objective.forward(model, batch, draws, self._count(batch))
                losses = total(self.objective, self.objective.coupled(model, embeds) | terms)
            losses.total.backward()
        return losses

    def _backward_in_parts(self, batch: Batch, draws: Draws) -> Losses:
        count = self._count(batch)
        return accumulate_gradients(self.objective, self.model, batch, draws, self.parts, self.precision, count)
