"""Latency of exported folders, side by side: each by the library that it was exported for.

onnx.json                                        ONNX Runtime, on the CPU
open_clip_config.json                            open_clip's image tower
config.json of timm, of a ViT of transformers    timm's model; transformers' model up to its last hidden state
everything else that `load_vision` reads         this project's tower
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openvision.errors import OpenVisionError, require
from openvision.files import read_json
from openvision.inference.load import load_vision
from openvision.runtime import resolve_device
from openvision.untrusted import check_count
from openvision.weights.export.onnx import CONFIG_FILE, VISION_FILE, open_session

_WARM_UP = 3
_STOCK_TYPES = ("vit", "beit", "siglip_vision_model")
_MOST_PIXELS = 2**14


@dataclass(frozen=True)
class Latency:
    """Time from prepared pixels to the embedding."""

    folder: Path
    runtime: str
    batch: int
    pixels: int
    """Height and width."""
    p50: float
    """Seconds of a batch, median."""
    p95: float
    speed: float
    """How many times as fast as the first folder: the median over rounds, in each of which both took a turn."""

    @property
    def images_per_second(self) -> float:
        """At the median."""
        return self.batch / self.p50


@dataclass(frozen=True)
class _Runner:
    runtime: str
    pixels: int
    run: Callable[[], object]
    """Embed the one batch of noise."""


def measure_latency(
    folders: Sequence[Path], batch: int = 1, runs: int = 30, threads: int | None = None, device: str = "cpu"
) -> list[Latency]:
    """Time `runs` rounds, in which every folder embeds a batch of noise; with `threads` or a thread a core.

    `device` as for `resolve_device`; "auto" is the CPU where a folder has ONNX graphs. Taking turns, all folders suffer
    alike from whatever slows the machine. Raises OpenVisionError for a folder that is
    none of the above, and where its library is not installed.
    """
    graphs = [folder for folder in folders if (folder / CONFIG_FILE).is_file()]
    if graphs and device not in ("auto", "cpu"):
        raise OpenVisionError(f"{graphs[0]} has ONNX graphs, which are measured on the CPU; leave --device out")
    # Folders are compared: beside one that is measured on the CPU all are.
    where = resolve_device("cpu" if graphs else device)
    runners = [_open(folder, batch, threads, where) for folder in folders]
    for runner in runners:
        for _ in range(_WARM_UP):
            runner.run()
    seconds = np.empty((runs, len(runners)))
    for turn in seconds:
        for number, runner in enumerate(runners):
            start = time.perf_counter()
            runner.run()
            turn[number] = time.perf_counter() - start
    return [
        Latency(
            *(folder, runner.runtime, batch, runner.pixels),
            *(float(np.percentile(own, share)) for share in (50, 95)),
            speed=float(np.median(seconds[:, 0] / own)),
        )
        for folder, runner, own in zip(folders, runners, seconds.T, strict=True)
    ]


def _open(folder: Path, batch: int, threads: int | None, where: torch.device) -> _Runner:
    if not folder.exists():
        raise OpenVisionError(f"{folder} does not exist; give folders that `openvision export` wrote")
    if (folder / CONFIG_FILE).is_file():
        return _onnx(folder, batch, threads)
    if threads is not None:
        torch.set_num_threads(threads)
    name, pixels, tower = _torch(folder)
    tower.to(where)
    images = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)).to(where)

    def run() -> object:
        with torch.inference_mode():
            found: Any = tower(images)
            # A copy to the host waits for the device.
            return getattr(found, "last_hidden_state", found).float().cpu()

    return _Runner(f"{name}, {where}", pixels, run)


def _onnx(folder: Path, batch: int, threads: int | None) -> _Runner:
    side = _side(folder / CONFIG_FILE, read_json(folder / CONFIG_FILE).get("image_size"))
    session = open_session(folder / VISION_FILE, threads)
    images = np.random.default_rng(0).standard_normal((batch, 3, side, side), dtype=np.float32)
    # The embedding alone: nothing asks for the patch tokens.
    (first, *_) = (output.name for output in session.get_outputs())
    return _Runner("ONNX Runtime, cpu", side, lambda: session.run([first], {"images": images}))


def _torch(folder: Path) -> tuple[str, int, torch.nn.Module]:
    """Library, pixels and the tower, images (B, 3, R, R) -> embedding or hidden states."""
    config = folder / "config.json"
    if (folder / "open_clip_config.json").is_file():
        config = folder / "open_clip_config.json"
        side = _side(config, _inside(read_json(config), "model_cfg", "vision_cfg", "image_size"))
        library: Any = require("open_clip", extra="open-clip")
        return "open_clip", side, library.create_model(_local(folder)).eval().visual
    content = read_json(config) if config.is_file() else {}
    if "architecture" in content and "pretrained_cfg" in content:
        side = _side(config, _inside(content, "model_args", "img_size"))
        library = require("timm", extra="timm")
        return "timm", side, library.create_model(_local(folder), pretrained=True).eval()
    if content.get("model_type") in _STOCK_TYPES:
        side = _side(config, content.get("image_size"))
        library = require("transformers", extra="transformers")
        require("transformers.utils.logging", extra="transformers").disable_progress_bar()
        # ViTModel's pooler is none of OpenVision's: no export has weights for it.
        settings = {"add_pooling_layer": False} if content["model_type"] == "vit" else {}
        tower = library.AutoModel.from_pretrained(folder, use_safetensors=True, **settings)
        return "transformers", side, tower.eval()
    vision = load_vision(folder).vision
    return "torch", vision.config.image_size, vision if vision.head is not None else _Pooled(vision)


class _Pooled(torch.nn.Module):
    """A tower without a head gives its pooled vector."""

    def __init__(self, vision: Any) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.vision.forward_features(images).pooled


def _local(folder: Path) -> str:
    """A local folder as timm and open_clip name it; both would also read pickles, which are refused."""
    if not any(folder.glob("*.safetensors")):
        raise OpenVisionError(f"{folder} has no .safetensors file; export the encoder again")
    return f"local-dir:{folder}"


def _inside(content: Any, *keys: str) -> object:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _side(file: Path, value: object) -> int:
    try:
        return check_count("image_size", value, 1, _MOST_PIXELS)
    except ValueError as error:
        raise OpenVisionError(f"{file} is broken: {error}; export again") from error
