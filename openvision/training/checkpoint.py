"""Training state on disk: everything an exact continuation needs, as tensors and plain JSON.

    RUN/checkpoints/step-00001200/state.safetensors   parameters and both Adam moments
    RUN/checkpoints/step-00001200/progress.json       step, sample position, clock

Parameters, moments and position are all there is: data order and augmentation are functions of (seed, position).
A checkpoint appears under its name only when complete; the last two are kept.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from openvision.errors import OpenVisionError
from openvision.files import atomic_folder
from openvision.training.optimizer import Adam

KEPT = 2
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """Finished updates over all stages."""
    stage: int = 0
    stage_step: int = 0
    """Finished updates of the current stage; the optimizer counts these."""
    position: int = 0
    """Samples consumed over all stages."""
    seconds: float = 0.0
    """Time spent training, evaluation not counted."""
    tflops: float = 0.0
    """Compute spent training, in 10^12 operations."""


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Adam, progress: Progress) -> None:
    """Write the state after `progress.step` updates and remove all but the newest checkpoints."""
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for moment in _MOMENTS:
            if moment in optimizer.state.get(parameter, {}):
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    with atomic_folder(folder / f"step-{progress.step:08d}") as temporary:
        save_file(tensors, temporary / "state.safetensors")
        (temporary / "progress.json").write_text(json.dumps(asdict(progress)) + "\n")
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "progress.json").is_file())


def load_checkpoint(path: Path, model: nn.Module, optimizer: Adam) -> Progress:
    """Restore `model` and `optimizer` in place; `optimizer` must be fresh."""
    try:
        progress = Progress(**json.loads((path / "progress.json").read_text()))
        with safe_open(path / "state.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    except Exception as error:
        raise OpenVisionError(
            f"checkpoint {path} cannot be read ({error}); remove it to go on from the one before"
        ) from error
    for name, parameter in model.named_parameters():
        if f"exp_avg.{name}" in tensors:
            moments: dict[str, torch.Tensor | int] = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
            optimizer.state[parameter] = {"step": progress.stage_step, **moments}
    return progress
