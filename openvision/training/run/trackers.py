"""Where the numbers of a run go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio, as the recipe says.

Their libraries are optional and imported only when asked for. A continued run goes on in the same place.
"""

from pathlib import Path
from typing import Any, Protocol

from openvision.errors import require
from openvision.recipe.schema import Recipe


class Tracker(Protocol):
    """Takes the scalars of a step."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values` by name."""
        ...

    def close(self) -> None:
        """Write out what is pending."""
        ...


class TensorBoard:
    """Event files in a folder, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        """Lines of steps after `resume_step`, which will be made again, are hidden."""
        require("tensorboard", extra="tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values` and write them out, so that a run can be watched."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbLike:
    """Weights & Biases, or trackio, which speaks the same language."""

    def __init__(self, library: str, project: str, run_name: str, settings: dict[str, Any], options: Any) -> None:
        self._library = require(library, extra=library)
        self._run = self._library.init(project=project, name=run_name, config=settings, **options)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values`."""
        self._library.log(values, step=step)

    def close(self) -> None:
        """End the run."""
        self._library.finish()


def open_trackers(recipe: Recipe, run_folder: Path, resume_step: int) -> list[Tracker]:
    """The trackers that the recipe asks for; raises OpenVisionError that names the extra of a missing library."""
    trackers: list[Tracker] = []
    settings, name = recipe.model_dump(mode="json"), run_folder.name
    if recipe.run.tensorboard:
        trackers.append(TensorBoard(run_folder / "tensorboard", resume_step))
    if recipe.run.wandb is not None:
        # The id is the run's name, so that a continued run goes on in its own page.
        options = {"id": name, "resume": "allow", "dir": str(run_folder)}
        trackers.append(WandbLike("wandb", recipe.run.wandb, name, settings, options))
    if recipe.run.trackio is not None:
        trackers.append(WandbLike("trackio", recipe.run.trackio, name, settings, {"resume": "allow"}))
    return trackers
