"""Small recipes of each model, steps of the trainer on a device, and `openvision` as a process."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvision.files import JsonObject, read_json_lines
from openvision.recipe.schema import Recipe, dump_recipe, parse_recipe
from openvision.runtime import Processes, full_tensor
from openvision.training.guards import DeferredGuard
from openvision.training.run.log import NoLog
from openvision.training.run.signals import StopRequest
from openvision.training.run.throughput import Meter
from openvision.training.run.watchdog import Watchdog
from openvision.training.setup.data import DeviceBatches, open_loader
from openvision.training.setup.parts import set_up_run
from openvision.training.step import Step

ROOT = Path(__file__).parents[2]
KINDS = ("openvision", "clip", "openvision2")

TOWER = {"width": 64, "depth": 2, "mlp_dim": 128, "heads": 2}
# 144 patches: long enough for the fused attention of either device.
VISION = {**TOWER, "patch_size": 8, "image_size": 96}
TEXT = {**TOWER, "vocab_size": 128, "context_length": 16}
DECODER = {**TOWER, "vocab_size": 128, "caption_length": 24}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "openvision": ({"embed_dim": 32, "vision": VISION, "text": TEXT, "decoder": DECODER}, {}),
    "clip": ({"embed_dim": 32, "vision": VISION, "text": TEXT}, {"caption": 0, "texts": ["alt"]}),
    "openvision2": (
        {"kind": "openvision2", "vision": VISION, "decoder": DECODER},
        {"contrastive": 0, "texts": []},
    ),
}


def recipe_of(kind: str, micro_batches: int = 1, **run: Any) -> Recipe:
    """Twenty steps of 8 samples with stochastic depth; `run` are settings of `[run]`."""
    model, loss = MODELS[kind]
    stage = {
        "resolution": 96,
        "samples": 160,
        "batch_size": 8,
        "base_learning_rate": 0.03,
        "warmup_samples": 16,
        "micro_batches": micro_batches,
        "drop_path": 0.2,
    }
    table = {
        "name": kind,
        "model": model,
        "loss": loss,
        "data": {"train": "train", "validation": "validation", "vocab_size": 128},
        # With a larger eps rounding of gradients near zero is not blown up to whole steps.
        "optimizer": {"clip_norm": 1.0, "ema": 0.9, "eps": 1e-6},
        "guards": {"spikes": "skip"},
        "stages": [stage],
        "run": {"precision": "float32", "log_every": 1, "evaluate_every": 10, "checkpoint_every": 3} | run,
    }
    return parse_recipe(table, kind)


@dataclass
class Taken:
    """What steps left behind, on the CPU."""

    numbers: list[dict[str, float]] = field(default_factory=list)
    """Of each step, as they are logged."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the first step, clipped."""


class _Kept(NoLog):
    """Keeps the numbers of every step."""

    def __init__(self) -> None:
        self.numbers: list[dict[str, float]] = []

    def train(self, where: JsonObject, numbers: dict[str, float], seconds_left: float) -> None:
        self.numbers.append(numbers)


def take_steps(
    recipe: Recipe,
    data: Path,
    folder: Path,
    device: torch.device,
    steps: int,
    before: Callable[[int], object] = lambda number: None,
    processes: Processes | None = None,
) -> Taken:
    """The first steps of a run, fed by its loader; `before` is called with the number of each, from 0.

    `processes` are this one alone where they are not given.
    """
    parts = set_up_run(recipe, data, folder, processes or Processes(device=device))
    stage, log, taken = recipe.stages[0], _Kept(), Taken()
    guard = DeferredGuard(recipe.guards, parts.progress, parts.processes) if device.type != "cpu" else None
    with open_loader(recipe, stage, parts.dataset, parts.tokenizer, parts.processes, 0, folder) as loader:
        batches, watchdog = DeviceBatches(iter(loader), device), Watchdog(folder, 0, None, print)
        step = Step(parts, stage, batches, Meter(device, None), log, watchdog, StopRequest(), guard)
        for number in range(steps):
            before(number)
            step()
            if not number:
                gradients = {name: p.grad for name, p in parts.model.module.named_parameters() if p.grad is not None}
                taken.gradients = {name: full_tensor(gradient).cpu() for name, gradient in gradients.items()}
    parts.checkpoints.close()
    taken.numbers = log.numbers
    return taken


def train_command(recipe: Recipe, folder: Path, data: Path, device: torch.device) -> list[str]:
    """Arguments of `openvision` that train `recipe` into `folder`: without `--device` on a GPU, which needs none."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".toml")
    path.write_text(dump_recipe(recipe))
    chosen = [] if device.type == "cuda" else ["--device", str(device)]
    return ["train", str(path), "--data", str(data), "--run", str(folder), *chosen]


def start(arguments: list[str], launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start `openvision`, by `launcher` if given; its processes find each other without a network."""
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    environment = {**os.environ, **loopback, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "openvision.cli.main", *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What a process printed, once it has ended well."""
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, f"{printed}\n{errors}"
    return printed


def losses(run: Path) -> dict[int, float]:
    """Loss by step."""
    return {line["step"]: line["loss"] for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "train"}
