"""Latency of an exported folder: ONNX graphs in ONNX Runtime, folders of weights in torch."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from openvision.errors import OpenVisionError
from openvision.files import read_json
from openvision.inference.load import load_vision
from openvision.runtime import resolve_device
from openvision.untrusted import check_count
from openvision.weights.export.onnx import CONFIG_FILE, VISION_FILE, open_session

_WARM_UP = 3


@dataclass(frozen=True)
class Latency:
    """Time from prepared pixels to the embedding."""

    runtime: str
    batch: int
    pixels: int
    """Height and width."""
    p50: float
    """Seconds of a batch, median."""
    p95: float

    @property
    def images_per_second(self) -> float:
        """At the median."""
        return self.batch / self.p50


def measure_latency(
    folder: Path, batch: int = 1, runs: int = 30, threads: int | None = None, device: str = "cpu"
) -> Latency:
    """Time `runs` batches of noise; ONNX graphs run on the CPU, with `threads` or a thread a core.

    Raises OpenVisionError for a folder that is neither an ONNX export nor weights that `openvision.load_vision` reads.
    """
    if (folder / CONFIG_FILE).is_file():
        if device not in ("auto", "cpu"):
            raise OpenVisionError(f"{folder} has ONNX graphs, which are measured on the CPU; leave --device out")
        runtime, pixels, run = "ONNX Runtime, cpu", *_onnx(folder, batch, threads)
    else:
        where = resolve_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        pixels, run = _torch(folder, batch, where)
        runtime = f"torch, {where}"
    for _ in range(_WARM_UP):
        run()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return Latency(runtime, batch, pixels, float(np.percentile(seconds, 50)), float(np.percentile(seconds, 95)))


def _onnx(folder: Path, batch: int, threads: int | None) -> tuple[int, Callable[[], object]]:
    try:
        side = check_count("image_size", read_json(folder / CONFIG_FILE).get("image_size"), 1, 2**14)
    except ValueError as error:
        raise OpenVisionError(f"{folder / CONFIG_FILE} is broken: {error}; export again") from error
    session = open_session(folder / VISION_FILE, threads)
    images = np.random.default_rng(0).standard_normal((batch, 3, side, side), dtype=np.float32)
    return side, lambda: session.run(None, {"images": images})


def _torch(folder: Path, batch: int, device: torch.device) -> tuple[int, Callable[[], object]]:
    encoder = load_vision(folder, device=device)
    height, width = encoder.vision.config.image_size, encoder.vision.config.image_size
    images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)

    def run() -> object:
        with torch.inference_mode():
            # A copy to the host waits for the device.
            return encoder.vision.forward_features(images).pooled.float().cpu()

    return height, run
