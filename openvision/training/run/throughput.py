"""Throughput of a run since the last line of the log: images, FLOP/s, MFU, waiting for data, memory; and time left."""

import resource
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

from openvision.hardware import DEVICES
from openvision.models.flops import training_flops
from openvision.models.openvision2 import ModelConfig
from openvision.recipe.sections import Stage
from openvision.training.checkpoint.folders import Progress

GIB = 2**30


class Meter:
    """Counts the time of steps from when it is made, but not while it is paused."""

    def __init__(self, device: torch.device, peak: float | None) -> None:
        """`peak` is the dense bfloat16 FLOP/s of all devices together, None when unknown."""
        self.device = device
        self.peak = peak
        self._mark = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self.images, self.flops, self.seconds, self.waiting = 0, 0.0, 0.0, 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training: evaluating, saving."""
        if self.device.type == "cuda":
            # Steps that are still queued would run in time that is not counted.
            torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        yield
        self._mark += time.perf_counter() - begin

    def step(self, images: int, flops: float, waited: float) -> float:
        """Count a step of so many images and floating-point operations, which waited so many seconds for its batch.

        Returns the seconds since the step before.
        """
        now = time.perf_counter()
        passed = now - self._mark
        self._mark = now
        self.images += images
        self.flops += flops
        self.seconds += passed
        self.waiting += waited
        return passed

    def read(self) -> dict[str, float]:
        """The numbers of the log for the steps since the last call."""
        seconds = max(self.seconds, 1e-9)
        flops = self.flops / seconds
        values = {
            "images_per_second": round(self.images / seconds, 1),
            "tflops_per_second": flops / 1e12,
            "data_wait": min(self.waiting / seconds, 1.0),
            "memory_gib": round(peak_memory(self.device) / GIB, 3),
        }
        if self.peak is not None:
            values["mfu"] = flops / self.peak
        self._reset()
        return values


def seconds_left(
    config: ModelConfig,
    texts: int,
    stages: Sequence[Stage],
    progress: Progress,
    caption_tokens: float,
    text_tokens: float | None = None,
    frozen: Collection[str] = (),
) -> float:
    """Compute that is left over the rate of compute so far: later stages cost more a step.

    `texts`, `caption_tokens`, `text_tokens` and `frozen` as in `training_flops`.
    """
    left = 0.0
    for index, stage in enumerate(stages[progress.stage :]):
        steps = stage.steps - (0 if index else progress.stage_step)
        flops = training_flops(config, stage.resolution, texts, caption_tokens, text_tokens, frozen)
        left += steps * stage.batch_size * flops
    return left / 1e12 * progress.seconds / progress.tflops


def total_peak_flops(device: torch.device, processes: int, peak_tflops: float | None) -> float | None:
    """Dense bfloat16 FLOP/s of all devices together, `peak_tflops` TFLOP/s each where given; None when unknown."""
    peak = peak_flops(device) if peak_tflops is None else peak_tflops * 1e12
    return None if peak is None else peak * processes


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a known accelerator, by its name; None for any other device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((known.peak_flops for key, known in DEVICES.items() if key in name), None)


def peak_memory(device: torch.device) -> int:
    """Peak memory so far, bytes: allocated on an accelerator, resident in a process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
