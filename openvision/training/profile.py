"""Where the time of a training step goes: a table by part of the step, one by operation, and a trace of both.

The parts are timed around the trainer's own step, which knows nothing of it: methods of the towers, the objective, the
optimizer and autograd are wrapped while the profile lasts. Each part counts its own time, without that of those within.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from openvision.errors import OpenVisionError
from openvision.recipe.schema import Recipe
from openvision.training.data import to_device
from openvision.training.optimizer import learning_rate
from openvision.training.randomness import Draws
from openvision.training.step import Step
from openvision.training.trainer import Trainer

OTHER = "other"
# Attributes of the model, and their methods by which it calls them.
TOWERS = {
    "vision": ("vision tower", ("forward_features", "patch_tokens", "forward")),
    "text": ("text tower", ("forward_features", "forward")),
    "decoder": ("caption decoder", ("forward",)),
}


@dataclass(frozen=True)
class Row:
    """A part of the step, or an operation."""

    name: str
    milliseconds: float
    """Of one step."""
    share: float
    """Of the step's time."""


@dataclass(frozen=True)
class Profile:
    """What was measured."""

    parts: list[Row]
    operations: list[Row]
    images_per_second: float
    trace: Path
    """For chrome://tracing or ui.perfetto.dev."""


class Phases:
    """Time by name, a nested part taken out of the one around it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._mark = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as `name`."""
        self._turn()
        self._open.append(name)
        try:
            with record_function(name):
                yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        """Give the time since the last turn to the innermost part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, counted as `name`."""

        @wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return counted


class _CountedObjective:
    """An objective whose own work, beside the towers it calls, is counted as losses."""

    def __init__(self, objective: Any, phases: Phases) -> None:
        self.weights = objective.weights
        self.embed = phases.wrap("losses", objective.embed)
        self.forward = phases.wrap("losses", objective.forward)
        self.coupled = phases.wrap("losses", objective.coupled)


def profile_recipe(
    recipe: Recipe, data: str, folder: Path, stage_number: int = 0, steps: int = 3, warmup: int = 1
) -> Profile:
    """Train `steps` steps of a stage after `warmup` ones, timed part by part, then trace one more.

    `folder` receives trace.json and the run folder that training needs; nothing trained is kept. Raises OpenVisionError
    for a stage that is not there.
    """
    if not 0 <= stage_number < len(recipe.stages):
        raise OpenVisionError(
            f"the recipe has no stage {stage_number}: choose one from 0 to {len(recipe.stages) - 1} with --stage"
        )
    trainer, stage = Trainer(recipe, data, folder / "run"), recipe.stages[stage_number]
    device = trainer.processes.device
    phases = Phases(device)
    objective: Any = _CountedObjective(trainer.objective, phases)
    step = Step(trainer.model.train(), objective, trainer.optimizer, trainer.precision, stage.micro_batches)

    with ExitStack() as stack:
        stack.enter_context(_watching(trainer.model, trainer.optimizer, phases))
        batches = stack.enter_context(trainer._loader(stage))

        def take_step() -> None:
            with phases.part(OTHER):
                with phases.part("data"):
                    batch = to_device(next(batches), device)
                step(batch, Draws(recipe.seed, batch.positions, stage.drop_path), learning_rate(stage, 1))

        for _ in range(warmup):
            take_step()
        phases.seconds.clear()
        for _ in range(steps):
            take_step()
        seconds = dict(phases.seconds)
        trace = folder / "trace.json"
        operations = _trace(take_step, trace, device)
    total = sum(seconds.values())
    parts = [Row(name, 1e3 * value / steps, value / total) for name, value in seconds.items()]
    parts.sort(key=lambda row: (row.name == OTHER, -row.milliseconds))
    return Profile(parts, operations, stage.batch_size * steps / total, trace)


@contextmanager
def _watching(model: Any, optimizer: Any, phases: Phases) -> Iterator[None]:
    """Count the parts of a step while the context lasts."""
    with ExitStack() as stack:
        for attribute, (name, methods) in TOWERS.items():
            tower = getattr(model, attribute, None)
            for method in methods if tower is not None else ():
                if hasattr(tower, method):
                    stack.enter_context(_replaced(tower, method, phases.wrap(name, getattr(tower, method))))
        for method in ("update", "gradient_norm"):
            counted = phases.wrap("optimizer", getattr(optimizer, method))
            stack.enter_context(_replaced(optimizer, method, counted))
        backward = phases.wrap("backward", torch.autograd.backward)
        stack.enter_context(_replaced(torch.autograd, "backward", backward))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


def _trace(take_step: Callable[[], None], path: Path, device: torch.device, most: int = 12) -> list[Row]:
    """Trace one step into `path`; the operations that took longest."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch_profile(activities=activities) as profiler:
        take_step()
    profiler.export_chrome_trace(str(path))
    on_device = device.type == "cuda"
    times = {
        event.key: (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e3
        for event in profiler.key_averages()
        if "::" in event.key or on_device
    }
    total = sum(times.values()) or 1.0
    slowest = sorted(times.items(), key=lambda item: -item[1])[:most]
    return [Row(name, milliseconds, milliseconds / total) for name, milliseconds in slowest]
