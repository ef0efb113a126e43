"""Guards of a step: nothing that is not finite enters the parameters, and a loss that jumps is noticed.

A jump is a loss far above the median of the newest ones, measured in their median absolute deviation: neither moves
much by the jump itself. What counts is the loss of the global batch, so every process decides alike.
"""

import statistics
from dataclasses import dataclass

from torch import Tensor

from openvision.errors import OpenVisionError
from openvision.recipe.schema import Guards
from openvision.runtime import SINGLE_PROCESS, Processes
from openvision.training.checkpoint.folders import Progress
from openvision.training.losses import Losses

# The median absolute deviation of a normal distribution is its standard deviation divided by this.
_NORMAL = 1.4826
# Deviations are not believed to be smaller than this share of the loss: a flat stretch makes no jump of a ripple.
_FLOOR = 0.01
# Losses needed before anything is called a jump.
_ENOUGH = 20
# More skipped updates in a row are no accident of the data.
_MOST_SKIPPED = 10


@dataclass(frozen=True)
class Jump:
    """A loss far above those before it."""

    loss: float
    limit: float
    skipped: bool

    def describe(self) -> str:
        """One line for a person."""
        done = "the update was skipped" if self.skipped else "the update was made"
        return f"the loss jumped to {self.loss:.4g}, above {self.limit:.4g}; {done}"


def watch_loss(loss: float, progress: Progress, guards: Guards) -> Jump | None:
    """Compare the global loss of a step with those before it and remember it in `progress`.

    Raises OpenVisionError when too many updates in a row would be skipped.
    """
    if guards.spikes == "off":
        return None
    limit = _limit(progress.recent_losses, guards.spike_deviations)
    skips = guards.spikes == "skip"
    if limit is None or loss <= limit:
        progress.skipped_in_a_row = 0
        progress.recent_losses = [*progress.recent_losses, loss][-guards.spike_window :]
        return None
    if skips:
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row > _MOST_SKIPPED:
            raise OpenVisionError(
                f"the loss has been above {limit:.4g} for {progress.skipped_in_a_row} steps in a row: this is no jump. "
                'Look at the data and the learning rate, or go on with guards.spikes="log" and --force'
            )
    else:
        progress.recent_losses = [*progress.recent_losses, loss][-guards.spike_window :]
    return Jump(loss, limit, skips)


def _limit(losses: list[float], deviations: float) -> float | None:
    if len(losses) < _ENOUGH:
        return None
    median = statistics.median(losses)
    spread = _NORMAL * statistics.median(abs(loss - median) for loss in losses)
    return median + deviations * max(spread, _FLOOR * abs(median))


def refuse_together(reason: str, processes: Processes) -> None:
    """Raise OpenVisionError in every process when any of them has a reason not to make the update.

    All processes must call it once one of them is known to have one.
    """
    reasons = processes.all_gather(reason)
    told = [f"{why} (process {rank})" if len(reasons) > 1 else why for rank, why in enumerate(reasons) if why]
    if told:
        raise OpenVisionError(f"{told[0]}; nothing was updated. Lower the learning rate or look at the batch")


def refuse_broken(losses: Losses, gradient_norm: Tensor) -> bool:
    """Raise OpenVisionError when a loss or the gradient of this process is not finite; else the update may be made."""
    refuse_together(why_broken(losses, gradient_norm), SINGLE_PROCESS)
    return True


def why_broken(losses: Losses, gradient_norm: Tensor) -> str:
    """What of a step is not finite; "" when all is well. This waits for the device."""
    names = losses.broken()
    if not names and not bool(gradient_norm.isfinite()):
        names = ["the gradient"]
    return f"{', '.join(names)} is not finite" if names else ""
