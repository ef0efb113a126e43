"""What a run says about itself: where it is, how long it will take, what it left out."""

from typing import Any

import torch

from openvision.data.loader import Loader
from openvision.models.flops import training_flops
from openvision.recipe.schema import Recipe, Stage
from openvision.training.checkpoint.folders import Progress
from openvision.training.run.throughput import peak_flops
from openvision.training.setup.parallel import Spread


class NoLog:
    """Stands for `RunLog` in all processes but the main one."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_: Any) -> None:
        return

    def say(self, message: str) -> None:
        """Nothing."""

    def step(self, step: int, description: str) -> None:
        """Nothing."""

    def train(self, where: dict[str, Any], numbers: dict[str, float], seconds_left: float) -> None:
        """Nothing."""

    def evaluation(self, where: dict[str, Any], numbers: dict[str, float]) -> None:
        """Nothing."""

    def event(self, where: dict[str, Any], message: str) -> None:
        """Nothing."""


def where(progress: Progress, stage: Stage) -> dict[str, Any]:
    """What every line of the log begins with."""
    return {
        "step": progress.step,
        "stage": progress.stage,
        "resolution": stage.resolution,
        "samples": progress.position,
        "seconds": round(progress.seconds, 3),
        "tflops": round(progress.tflops, 3),
    }


def sample_flops(recipe: Recipe, stage: Stage, caption_tokens: float) -> float:
    """Operations of one sample whose caption has so many target tokens."""
    return training_flops(recipe.model, stage.resolution, len(recipe.loss.texts), caption_tokens)


def seconds_left(recipe: Recipe, progress: Progress, caption_tokens: float) -> float:
    """Compute left over the rate of compute so far: later stages cost more a step."""
    left = 0.0
    for index, stage in enumerate(recipe.stages[progress.stage :]):
        steps = stage.steps - (0 if index else progress.stage_step)
        left += steps * stage.batch_size * sample_flops(recipe, stage, caption_tokens)
    return left / 1e12 * progress.seconds / progress.tflops


def peak_of(recipe: Recipe, device: torch.device, processes: int) -> float | None:
    """Dense bfloat16 operations a second of all devices together; None when unknown."""
    given = recipe.run.peak_tflops
    peak = given * 1e12 if given is not None else peak_flops(device)
    return None if peak is None else peak * processes


def announcement(recipe: Recipe, progress: Progress, spread: Spread, samples: int, precision: torch.dtype) -> str:
    """The first line of a run."""
    sizes = {name: parameter.numel() for name, parameter in spread.module.named_parameters()}
    total, vision = sum(sizes.values()), sum(size for name, size in sizes.items() if name.startswith("vision."))
    verb = f"going on from step {progress.step} of" if progress.step else "training"
    many = f"{spread.processes.size} processes ({spread.mode}), " if spread.processes.size > 1 else ""
    return (
        f"{verb} {recipe.name}: {samples} samples, {total / 1e6:.1f}M parameters ({vision / 1e6:.1f}M in the vision "
        f"encoder), {len(recipe.stages)} stages, {recipe.steps} steps, {many}"
        f"{str(precision).removeprefix('torch.')} on {torch.get_num_threads()} threads"
    )


def left_out(loader: Loader, recipe: Recipe) -> list[str]:
    """Lines about samples and texts of a stage that could not be used as they are, those of this process."""
    lines = [f"rejected samples, {reason}: {count}" for reason, count in sorted(loader.rejected.items())]
    if loader.captions_missing and recipe.reads_synthetic:
        lines.append(f"samples without a synthetic caption, alt-text taken: {loader.captions_missing}")
    if loader.texts_cut and recipe.context_length is not None:
        lines.append(f"texts longer than {recipe.context_length} ids, cut: {loader.texts_cut}")
    return lines
