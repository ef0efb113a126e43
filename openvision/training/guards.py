"""Guards of a step: nothing that is not finite enters the parameters, and a spike of the loss is noticed.

A spike is a loss far above the median of the newest ones, measured in their median absolute deviation: a spike itself
moves neither by much. What counts is the loss of the global batch, so every process decides alike.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from openvision.errors import OpenVisionError
from openvision.recipe.schema import Guards
from openvision.runtime import Processes
from openvision.training.checkpoint.folders import Progress
from openvision.training.optimizer import Adam
from openvision.training.update import global_norm

# The median absolute deviation of a normal distribution is its standard deviation divided by this.
_NORMAL = 1.4826
# A deviation counts as at least this share of the loss: on a flat stretch a ripple is no spike.
_FLOOR = 0.01
# Losses needed before anything is called a spike.
_ENOUGH = 20
# More skipped updates in a row are no accident of the data.
_MOST_SKIPPED = 10


@dataclass(frozen=True)
class Spike:
    """A loss far above those before it."""

    loss: float
    limit: float
    skipped: bool

    def describe(self) -> str:
        """One line for a person."""
        done = "the update was skipped" if self.skipped else "the update was made"
        return f"loss spike: {self.loss:.4g}, above {self.limit:.4g}; {done}"


def find_spike(loss: float, progress: Progress, guards: Guards) -> Spike | None:
    """Compare the global loss of a step with those before it, and remember it in `progress`.

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
                f"step {progress.step + 1}: the loss has been above {limit:.4g} for {progress.skipped_in_a_row} steps "
                "in a row: this is no spike. Look at the data and the learning rate, or resume with "
                'guards.spikes="log" and --force'
            )
    else:
        progress.recent_losses = [*progress.recent_losses, loss][-guards.spike_window :]
    return Spike(loss, limit, skips)


def _limit(losses: list[float], deviations: float) -> float | None:
    if len(losses) < _ENOUGH:
        return None
    median = statistics.median(losses)
    spread = _NORMAL * statistics.median(abs(loss - median) for loss in losses)
    return median + deviations * max(spread, _FLOOR * abs(median))


def raise_not_finite(names: Sequence[str], step: int, processes: Processes) -> NoReturn:
    """Raise OpenVisionError in every process: the losses `names` of some process are NaN or infinite at `step`.

    All processes must call it, those where everything is finite without names.
    """
    for rank, broken in enumerate(processes.all_gather(names)):
        if broken:
            where = f" (process {rank})" if processes.size > 1 else ""
            raise OpenVisionError(
                f"step {step}: {', '.join(broken)} is not finite{where}; nothing was updated. Lower the learning rate "
                "or look at the batch"
            )
    raise ValueError("no process named a loss that is not finite")


def require_finite_parameters(optimizer: Adam) -> None:
    """Raise OpenVisionError when a parameter is NaN or infinite: such a state must not replace a good checkpoint."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not global_norm(parameters).isfinite():
        raise OpenVisionError(
            "the parameters are no longer finite and not saved; the last good checkpoint is kept. Lower the "
            "learning rate, or set optimizer.clip_norm, and start from there"
        )
