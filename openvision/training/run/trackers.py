"""Experiment trackers: TensorBoard, Weights & Biases and trackio, beside metrics.jsonl.

Their libraries are optional and imported when a recipe asks for them. A resumed run continues in the same place.
"""

from pathlib import Path
from typing import Protocol

from openvision.errors import require
from openvision.files import JsonObject
from openvision.recipe.schema import Recipe


class Tracker(Protocol):
    """Receives the scalars of a step."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values`: name -> scalar."""
        ...

    def close(self) -> None:
        """Write pending values and close."""
        ...


class TensorBoard:
    """Event files in a folder, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        """Hide events after `resume_step`, whose steps will be trained again."""
        require("tensorboard", extra="tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values` and flush them, so that a running training can be watched."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbLike:
    """Weights & Biases, or trackio, which has the same API."""

    def __init__(self, library: str, project: str, name: str, config: JsonObject, options: dict[str, str]) -> None:
        self._library = require(library, extra=library)
        self._library.init(project=project, name=name, config=config, **options)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values`."""
        self._library.log(values, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._library.finish()


def open_trackers(recipe: Recipe, run_folder: Path, resume_step: int) -> list[Tracker]:
    """Open the trackers of a recipe; raises OpenVisionError that names the extra of a missing library."""
    trackers: list[Tracker] = []
    config, name = recipe.model_dump(mode="json"), run_folder.name
    if recipe.run.tensorboard:
        trackers.append(TensorBoard(run_folder / "tensorboard", resume_step))
    if recipe.run.wandb is not None:
        # The id is the name of the run, so that a resumed run continues on its own page.
        options = {"id": name, "resume": "allow", "dir": str(run_folder)}
        trackers.append(WandbLike("wandb", recipe.run.wandb, name, config, options))
    if recipe.run.trackio is not None:
        trackers.append(WandbLike("trackio", recipe.run.trackio, name, config, {"resume": "allow"}))
    return trackers
