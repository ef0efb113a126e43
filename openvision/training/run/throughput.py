"""How fast a run goes: images, operations, waiting for data and memory since the last line of the log."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from openvision.hardware import DEVICES

GIB = 2**30


class Meter:
    """Counts the time of steps from when it is made; what happens while it is paused is not counted."""

    def __init__(self, device: torch.device, peak: float | None) -> None:
        """`peak` is the bfloat16 operations a second of all devices together, None when unknown."""
        self.device = device
        self.peak = peak
        self._mark = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self.images, self.flops, self.seconds, self.waiting = 0, 0.0, 0.0, 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training: measuring, saving."""
        if self.device.type == "cuda":
            # Steps that are still queued would run in time that is not counted.
            torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        yield
        self._mark += time.perf_counter() - begin

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Waiting for the data of a step."""
        begin = time.perf_counter()
        yield
        self.waiting += time.perf_counter() - begin

    def step(self, images: int, flops: float) -> float:
        """A step of so many images and operations is done; returns the seconds since the one before."""
        now = time.perf_counter()
        passed = now - self._mark
        self._mark = now
        self.images += images
        self.flops += flops
        self.seconds += passed
        return passed

    def read(self) -> dict[str, float]:
        """What the steps since the last reading were like; starts a new count."""
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


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 operations a second of a known accelerator, by its name; None for any other device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((known.peak_flops for key, known in DEVICES.items() if key in name), None)


def peak_memory(device: torch.device) -> int:
    """Greatest memory so far, bytes: allocated on an accelerator, resident in a process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
