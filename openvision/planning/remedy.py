"""Out of memory in a training step: what happened, and which setting the planner expects to fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from openvision.errors import OpenVisionError
from openvision.planning.beside import Additions, additions_of
from openvision.planning.memory import Checkpointing, Setting, peak_bytes
from openvision.planning.parameters import count_parameters
from openvision.recipe.schema import Recipe
from openvision.runtime import Processes, describe_memory, device_memory, explain_out_of_memory

_FRUGAL: tuple[Checkpointing, ...] = ("selective", "full")


@contextmanager
def step_memory(recipe: Recipe, stage: int, processes: Processes, precision: torch.dtype) -> Iterator[None]:
    """Steps of stage number `stage`: running out of memory raises OpenVisionError that names the remedy."""

    def explain() -> str:
        device = processes.device
        where = MemoryPlan(recipe, stage, processes.size, device.type != "cpu", precision, device_memory(device))
        return f"out of memory on {describe_memory(device)} in {where.batch()}; {where.remedy()}"

    with explain_out_of_memory(explain):
        yield


@dataclass(frozen=True)
class MemoryPlan:
    """A stage of a recipe on devices of a known memory."""

    recipe: Recipe
    index: int
    """Number of the stage, from 0."""
    devices: int
    gpu: bool
    precision: torch.dtype
    memory: float
    """Of one device, bytes."""

    def batch(self) -> str:
        """Stage, batch and resolution."""
        stage = self.recipe.stages[self.index]
        each = f" ({self._local} on each of {self.devices} devices)" if self.devices > 1 else ""
        divided = f" in {stage.micro_batches} micro-batches" if stage.micro_batches > 1 else ""
        return f"stage {self.index + 1}, a batch of {stage.batch_size}{each} at {stage.resolution} px{divided}"

    def remedy(self) -> str:
        """What to set before the same command resumes the run."""
        now, key = self.recipe.stages[self.index].micro_batches, f"stages.{self.index}.micro_batches"
        resume = "the same command resumes the run"
        fitting = self.micro_batches(self.recipe.run.activation_checkpointing)
        if fitting is not None and fitting > now:
            return f"--set {key}={fitting} fits by the planner's estimate: {resume} with it"
        more = next((count for count in self._divisors() if count > now), None)
        if fitting is not None and more is not None:
            return (
                f"the planner expected {fitting} micro-batches to fit: end other programs on the device or "
                f"--set {key}={more}; {resume} with it"
            )
        for checkpointing in _FRUGAL:
            fitting = self.micro_batches(checkpointing)
            if fitting is not None and checkpointing != self.recipe.run.activation_checkpointing:
                return (
                    f"--set run.activation_checkpointing={checkpointing} --set {key}={max(fitting, now)} fits by the "
                    f"planner's estimate: {resume} with them"
                )
        return (
            "not even single samples fit by the planner's estimate: use devices with more memory, or several with "
            "--set parallel.mode=fsdp"
        )

    def micro_batches(self, checkpointing: Checkpointing) -> int | None:
        """The fewest micro-batches that surely fit by the planner's high estimate; None when none do."""
        recipe, stage = self.recipe, self.recipe.stages[self.index]
        setting = replace(self._setting(), checkpointing=checkpointing)
        additions, texts = _additions(recipe), len(recipe.loss.texts)
        parameters = count_parameters(recipe.model, additions.trained(), additions.frozen())
        beside = additions.memory(stage.resolution, texts, setting)
        for count in self._divisors():
            peak = peak_bytes(
                *(recipe.model, parameters, stage.resolution, texts, setting),
                *(self._local // count, self._local, beside),
            )
            if peak[1] <= self.memory:
                return count
        return None

    def _setting(self) -> Setting:
        recipe = self.recipe
        return Setting(
            sharding="sharded" if recipe.parallel.mode == "fsdp" and self.devices > 1 else "replicated",
            bf16=self.precision == torch.bfloat16,
            gpu=self.gpu,
            devices=self.devices,
            first_moment_bytes=2 if recipe.optimizer.first_moment == "bfloat16" else 4,
            average=recipe.optimizer.ema is not None,
            frozen=recipe.frozen_towers,
        )

    @property
    def _local(self) -> int:
        """Samples of a step on one device."""
        return max(1, self.recipe.stages[self.index].batch_size // self.devices)

    def _divisors(self) -> list[int]:
        return [count for count in range(1, self._local + 1) if self._local % count == 0]


def _additions(recipe: Recipe) -> Additions:
    """What the recipe adds to its model; a teacher that cannot be read now must not hide what has happened."""
    try:
        return additions_of(recipe)
    except OpenVisionError:
        return Additions(recipe.model, (), recipe.dense)
