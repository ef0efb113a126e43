"""Equal time: how many samples a variant gets in the seconds that it may train.

Every side's speed is measured first, stage after stage; from it follow the samples of each stage, and with these the
length of each learning-rate schedule. On a CPU, where a run has one thread, a second is one of processor time, and the
speeds are measured once, in turns (`claims.py speeds`): what else the machine does changes neither. On a GPU, whose
load is shared, runs that are compared train at the same time and measure together: they meet before every stage of the
measurement and before training begins. A row says what was planned and what it took.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch

from ablations.variants import MEASUREMENTS
from openvision.recipe.schema import Recipe
from openvision.runtime import SINGLE_PROCESS, resolve_device
from openvision.training.run.log import NoLog
from openvision.training.run.throughput import Meter
from openvision.training.setup.data import DeviceBatches, open_loader
from openvision.training.step import Step
from openvision.training.trainer import Trainer

_POLL = 0.05
ENDLESS = 2**40
"""Samples of a stage that is measured until its time is up."""


@dataclass(frozen=True)
class Speed:
    """What a stage costs under the load of the group."""

    startup: float
    """Seconds before the first step: the loader's workers start with every stage."""
    rate: float
    """Samples a second afterwards."""
    data_wait: float
    """Share of the time that was spent waiting for data."""


@dataclass(frozen=True)
class Meeting:
    """Where the runs of a group wait for each other: files in a folder."""

    folder: Path
    member: str
    members: tuple[str, ...]
    timeout: float = 600.0

    def wait(self, place: str) -> None:
        """Return when every member has come to `place` or is gone; raises TimeoutError after `timeout` seconds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{place}.{self.member}").touch()
        end = time.monotonic() + self.timeout
        while missing := [other for other in self.members if not self._is_at(place, other)]:
            if time.monotonic() > end:
                raise TimeoutError(f"{', '.join(missing)} did not come to {place} within {self.timeout:.0f} seconds")
            time.sleep(_POLL)

    def _is_at(self, place: str, member: str) -> bool:
        return (self.folder / f"{place}.{member}").exists() or (self.folder / f"gone.{member}").exists()

    def leave(self) -> None:
        """Nobody waits for this member from now on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"gone.{self.member}").touch()


def plan_samples(speeds: Sequence[Speed], shares: Sequence[float], seconds: float, batch_size: int) -> list[int]:
    """Samples of each stage, whole batches and at least one, such that the stages take their shares of `seconds`."""
    planned = []
    for speed, share in zip(speeds, shares, strict=True):
        batches = int((share * seconds - speed.startup) * speed.rate / batch_size)
        planned.append(max(1, batches) * batch_size)
    return planned


def clock(device: torch.device) -> float:
    """Seconds: of this process on a CPU, which its loader shares, and of the wall on an accelerator."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def fastest(measured: Sequence[Sequence[Speed]]) -> list[Speed]:
    """Of several measurements of the same stages the best of each: other work on the machine only slows."""
    return [
        Speed(min(each.startup for each in stage), max(each.rate for each in stage), min(e.data_wait for e in stage))
        for stage in zip(*measured, strict=True)
    ]


def spent(speeds: Sequence[Speed], samples: Sequence[int]) -> list[float]:
    """Seconds from the start of the training to the end of each stage, as these speeds have it."""
    stages = [speed.startup + count / speed.rate for speed, count in zip(speeds, samples, strict=True)]
    return [round(total, 1) for total in accumulate(stages)]


def synchronize(device: torch.device) -> None:
    """Wait for the work of an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_speeds(
    recipe: Recipe, data: Path, folder: Path, seconds: float, warm_batches: int, meeting: Meeting
) -> list[Speed]:
    """Speed of every stage of a recipe by the trainer's own step and loader; nothing of it is kept for the training.

    A recipe of one stage measures it as often as others measure theirs, and the last time counts.
    """
    processes = replace(SINGLE_PROCESS, device=resolve_device(recipe.run.device))
    trainer = Trainer(recipe, data, folder, processes)
    speeds = []
    for index in range(MEASUREMENTS):
        stage = recipe.stages[min(index, len(recipe.stages) - 1)]
        meeting.wait(f"measure{index}")
        trainer.parts.optimizer.state.clear()
        trainer.progress.stage_step = 0
        endless = stage.model_copy(update={"samples": ENDLESS, "warmup_samples": 0})
        begin = clock(processes.device)
        parts = trainer.parts
        with open_loader(recipe, stage, parts.dataset, parts.tokenizer, processes, 0, folder, parts.features) as loader:
            batches = DeviceBatches(iter(loader), processes.device)
            meter = Meter(processes.device, None)
            step = Step(trainer.parts, endless, batches, meter, NoLog(), trainer.watchdog, trainer.stop, trainer.guard)
            step()
            startup = clock(processes.device) - begin
            # What the workers prepared in the meantime says nothing about their speed.
            for _ in range(warm_batches):
                step()
            synchronize(processes.device)
            meter.read()
            begin, count = clock(processes.device), 0
            while clock(processes.device) - begin < seconds:
                step()
                count += stage.batch_size
            synchronize(processes.device)
            rate = count / (clock(processes.device) - begin)
            speeds.append(Speed(max(0.0, startup - stage.batch_size / rate), rate, meter.read()["data_wait"]))
    trainer.parts.checkpoints.close()
    return speeds[-len(recipe.stages) :]
