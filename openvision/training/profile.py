"""Profile of a training step: a table by part of the step, one by operation, and a trace of both.

The step is the run's own, with its guard and its copies ahead. Methods of the towers, the objective and autograd are
wrapped while the profile lasts; the training code knows nothing of it. Each part counts its own time, without that of
the parts within. Clocks that wait for the device leave it idle, so how much a run does is found in steps without them.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from openvision.errors import OpenVisionError
from openvision.planning.remedy import step_memory
from openvision.recipe.schema import Recipe
from openvision.runtime import Processes, resolve_device
from openvision.training import step as step_module
from openvision.training.guards import deferred_guard
from openvision.training.objective import Objective
from openvision.training.run.log import NoLog
from openvision.training.run.signals import StopRequest
from openvision.training.run.throughput import Meter
from openvision.training.run.watchdog import Watchdog
from openvision.training.setup.data import DeviceBatches, open_loader
from openvision.training.setup.parts import set_up_run
from openvision.training.step import Step

P = ParamSpec("P")
T = TypeVar("T")
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
    """In one step."""
    share: float
    """Fraction of the step's time."""


@dataclass(frozen=True)
class Profile:
    """Where the time of a step goes."""

    parts: list[Row]
    operations: list[Row]
    images_per_second: float
    trace: Path
    """For chrome://tracing or ui.perfetto.dev."""
    idle: float | None
    """Share of time in which the device does nothing, in steps that no clock interrupts; None but on CUDA."""


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

    def wrap(self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        """`function`, counted as `name`."""

        @wraps(function)
        def counted(*arguments: P.args, **options: P.kwargs) -> T:
            with self.part(name):
                return function(*arguments, **options)

        return counted


def profile_recipe(
    recipe: Recipe, data: str, folder: Path, stage_number: int = 0, steps: int = 3, warmup: int = 1
) -> Profile:
    """Train `steps` steps of a stage after `warmup` ones, timed part by part, then trace one more.

    `folder` receives trace.json and the run folder that training needs; nothing trained is kept. Raises OpenVisionError
    for a stage that does not exist.
    """
    if not 0 <= stage_number < len(recipe.stages):
        raise OpenVisionError(
            f"the recipe has no stage {stage_number}: choose one from 0 to {len(recipe.stages) - 1} with --stage"
        )
    device, stage = resolve_device(recipe.run.device), recipe.stages[stage_number]
    run = set_up_run(recipe, data, folder / "run", Processes(device=device))
    phases = Phases(device)
    guard = deferred_guard(recipe.guards, run.progress, run.processes)
    watchdog = Watchdog(folder / "run", 0, recipe.run.hang_seconds, print)

    loader = open_loader(recipe, stage, run.dataset, run.tokenizer, run.processes, 0, run.folder, run.features)
    with loader, step_memory(recipe, stage_number, run.processes, run.precision):
        batches = DeviceBatches(iter(loader), device)
        step = Step(run, stage, batches, Meter(device, None), NoLog(), watchdog, StopRequest(), guard)

        def take_step() -> None:
            with phases.part(OTHER):
                step()

        with _timed(run.model.module, run.objective, phases):
            for _ in range(warmup):
                take_step()
            phases.seconds.clear()
            for _ in range(steps):
                take_step()
            seconds = dict(phases.seconds)
            trace = folder / "trace.json"
            operations = _trace(take_step, trace, device)
        idle = _idle_share_of(step, steps) if device.type == "cuda" else None
    total = sum(seconds.values())
    parts = [Row(name, 1e3 * value / steps, value / total) for name, value in seconds.items()]
    parts.sort(key=lambda row: (row.name == OTHER, -row.milliseconds))
    return Profile(parts, operations, stage.batch_size * steps / total, trace, idle)


@contextmanager
def _timed(model: nn.Module, objective: Objective, phases: Phases) -> Iterator[None]:
    """Count the towers, the objective's own work, the backward pass, data and update while the context lasts."""
    with ExitStack() as stack:

        def count(owner: object, method: str, name: str) -> None:
            stack.enter_context(_replaced(owner, method, phases.wrap(name, getattr(owner, method))))

        for attribute, (name, methods) in TOWERS.items():
            tower = getattr(model, attribute, None)
            for method in methods:
                if hasattr(tower, method):
                    count(tower, method, name)
        for method in ("embed", "forward", "coupled"):
            # A method of the class: instances are frozen.
            count(type(objective), method, "losses")
        count(torch.autograd, "backward", "backward")
        for method in ("__next__", "prefetch"):
            count(DeviceBatches, method, "data")
        for function in ("gradient_norm", "apply_update"):
            count(step_module, function, "optimizer")
        yield


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
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


def _idle_share_of(take_step: Callable[[], object], steps: int) -> float:
    """`idle_share` of CUDA in `steps` steps that follow each other; the host is watched by nothing."""
    with torch_profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            take_step()
    events = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    # Annotations last from their first operation to their last, pauses included.
    work = [event.time_range for event in events if not event.is_user_annotation]
    return idle_share((span.start, span.end) for span in work)


def idle_share(work: Iterable[tuple[float, float]]) -> float:
    """Share of the time from the first beginning to the last end that no (beginning, end) covers; 0 without any."""
    spans = sorted(work)
    if not spans:
        return 0.0
    first = until = spans[0][0]
    idle = 0.0
    for begin, end in spans:
        idle += max(0.0, begin - until)
        until = max(until, end)
    return idle / (until - first) if until > first else 0.0
