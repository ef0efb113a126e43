"""Guards of a step: nothing that is not finite enters the parameters, and a spike of the loss is noticed.

A spike is a loss far above the median of the newest ones, measured in their median absolute deviation: a spike itself
moves neither by much. What counts is the loss of the global batch, so every process decides alike.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from openvision.errors import OpenVisionError
from openvision.recipe.sections import Guards
from openvision.runtime import HostCopy, Processes
from openvision.training.checkpoint.folders import Progress
from openvision.training.objective import Losses
from openvision.training.optimizer.adam import Adam
from openvision.training.optimizer.update import global_norm

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

    def describe(self, step: int) -> str:
        """One line for a person; the device of a run may report a step a little later."""
        done = "the update was skipped" if self.skipped else "the update was made"
        return f"loss spike at step {step}: {self.loss:.4g}, above {self.limit:.4g}; {done}"


def find_spike(loss: float, progress: Progress, guards: Guards) -> Spike | None:
    """Compare the global loss of a step with those before it, and remember it in `progress`.

    Raises OpenVisionError when too many updates in a row would be skipped.
    """
    limit = _limit(progress.recent_losses, guards.spike_deviations)
    return judge_spike(loss, limit, progress.step + 1, progress, guards)


def judge_spike(loss: float, limit: float | None, step: int, progress: Progress, guards: Guards) -> Spike | None:
    """Hold the global loss of a step against a limit, and remember it in `progress`; errors as of `find_spike`."""
    if guards.spikes == "off":
        return None
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
                f"step {step}: the loss has been above {limit:.4g} for {progress.skipped_in_a_row} steps "
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
            raise _not_finite(broken, step, f" (process {rank})" if processes.size > 1 else "")
    raise ValueError("no process named a loss that is not finite")


def _not_finite(names: Sequence[str], step: int, where: str = "") -> OpenVisionError:
    return OpenVisionError(
        f"step {step}: {', '.join(names)} is not finite{where}; nothing was updated. Lower the learning rate "
        "or look at the batch"
    )


@dataclass(frozen=True)
class _Checked:
    """What the device found of a step, on its way to the host."""

    step: int
    names: tuple[str, ...]
    found: HostCopy
    """For each of `names` whether it is finite, then the global loss and the limit it was held against."""


class DeferredGuard:
    """The guard of an accelerator: it selects the update there, and the host learns what was found two steps later.

    Nothing broken enters parameters or moments, and the host never waits for work it has just queued. What a spike is
    held against are the losses that have arrived. Every process finds and learns the same at the same step.
    """

    LAG: int = 2

    def __init__(self, guards: Guards, progress: Progress, processes: Processes) -> None:
        self.guards, self.progress, self.processes = guards, progress, processes
        self._pending: deque[_Checked] = deque()
        self._left_out = 0

    def select(self, losses: Losses, gradient_norm: Tensor) -> Tensor:
        """Whether this step may update, bool () on the device: all is finite everywhere, and no spike to be skipped."""
        # A copy: summing over processes must not change the loss that is logged.
        loss = losses.total.detach().clone().float()
        finite = torch.cat([losses.finite(), gradient_norm.isfinite()[None]]).float()
        if self.processes.group is not None:
            dist.all_reduce(finite, dist.ReduceOp.MIN, group=self.processes.group)
            dist.all_reduce(loss, group=self.processes.group)
            loss = loss / self.processes.size
        limit = _limit(self.progress.recent_losses, self.guards.spike_deviations)
        held = self.guards.spikes != "off" and limit is not None
        bound = torch.full_like(loss, limit if held and limit is not None else math.inf)
        selected = finite.min() > 0
        if self.guards.spikes == "skip":
            selected = selected & (loss <= bound)
        names = (*losses.terms, "the gradient")
        found = HostCopy(torch.cat([finite, loss[None], bound[None]]))
        self._pending.append(_Checked(self.progress.step + 1, names, found))
        return selected

    def learn(self, everything: bool = False) -> list[tuple[int, Spike]]:
        """What was found `LAG` steps ago, or of all steps so far: spikes by their step.

        Raises OpenVisionError in every process for a step whose loss or gradient was not finite.
        """
        spikes = []
        while self._pending and (everything or len(self._pending) > self.LAG):
            checked = self._pending.popleft()
            *finite, loss, limit = checked.found.values()
            names = [name for name, ok in zip(checked.names, finite, strict=True) if not ok]
            if names:
                raise _not_finite(names, checked.step)
            spike = judge_spike(loss, limit if math.isfinite(limit) else None, checked.step, self.progress, self.guards)
            if spike is not None:
                self._left_out += spike.skipped
                spikes.append((checked.step, spike))
        return spikes

    def settle(self, optimizer: Adam) -> list[tuple[int, Spike]]:
        """Learn everything and bring the optimizer's counts up to date, before a checkpoint is written."""
        spikes = self.learn(everything=True)
        optimizer.settle(self._left_out)
        self._left_out = 0
        return spikes


def deferred_guard(guards: Guards, progress: Progress, processes: Processes) -> DeferredGuard | None:
    """The guard of an accelerator; None on a CPU, where every step is judged before its update."""
    return None if processes.device.type == "cpu" else DeferredGuard(guards, progress, processes)


def require_finite_parameters(optimizer: Adam) -> None:
    """Raise OpenVisionError when a parameter is NaN or infinite: such a state must not replace a good checkpoint."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not global_norm(parameters).isfinite():
        raise OpenVisionError(
            "the parameters are no longer finite and not saved; the last good checkpoint is kept. Lower the "
            "learning rate, or set optimizer.clip_norm, and start from there"
        )
