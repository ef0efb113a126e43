"""Log of a run: metrics.jsonl with one JSON object a line, the screen, and the trackers of the recipe.

On resume metrics.jsonl is cut back to the step of the checkpoint.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from openvision.files import JsonObject, atomic_write_text
from openvision.recipe.schema import Recipe
from openvision.renamed import read_metrics
from openvision.terminal import echo
from openvision.training.run.display import TrainingDisplay
from openvision.training.run.trackers import open_trackers

METRICS = "metrics.jsonl"


class MetricsLog:
    """Append-only metrics.jsonl."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open `path`; drop lines after `resume_step`, whose steps will be trained again."""
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if path.exists() else []
        atomic_write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, kind: str, values: JsonObject) -> None:
        """Append one line and flush it to the operating system."""
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RunLog:
    """Writes metrics.jsonl, the screen and the trackers. `where` is the step, stage and samples of a line."""

    def __init__(self, recipe: Recipe, run_folder: Path, resume_step: int) -> None:
        """Open all outputs; raises OpenVisionError when the library of a tracker is not installed."""
        self._trackers = open_trackers(recipe, run_folder, resume_step)
        self._metrics = MetricsLog(run_folder / METRICS, resume_step)
        self._display = TrainingDisplay(recipe.steps)

    def __enter__(self) -> "RunLog":
        self._closing = ExitStack()
        for part in (self._metrics, *self._trackers):
            self._closing.callback(part.close)
        self._closing.enter_context(self._display)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.__exit__(kind, error, trace)

    def say(self, message: str) -> None:
        """Print one line."""
        self._display.say(message)

    def step(self, step: int, description: str) -> None:
        """Move the progress bar to `step` finished steps."""
        self._display.step(step, description)

    def train(self, where: JsonObject, numbers: dict[str, float], seconds_left: float) -> None:
        """Log the metrics of a training step."""
        self._metrics.write("train", {**where, **numbers})
        self._display.log(where["step"], numbers, seconds_left)
        self._track("train", where["step"], numbers)

    def evaluation(self, where: JsonObject, numbers: dict[str, float]) -> None:
        """Log the metrics of an evaluation; `where["split"]` names it."""
        self._metrics.write("eval", {**where, **numbers})
        self._track(where["split"], where["step"], numbers)

    def event(self, where: JsonObject, message: str) -> None:
        """Log and print an exceptional event, such as a loss spike."""
        self._metrics.write("event", {**where, "message": message})
        self.say(f"step {where['step']}: {message}")

    def _track(self, prefix: str, step: int, numbers: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, {f"{prefix}/{name}": value for name, value in numbers.items()})


class NoLog:
    """In the place of `RunLog` in all processes but the main one: messages are printed, numbers are dropped."""

    def say(self, message: str) -> None:
        """Print a line."""
        echo(message)

    def step(self, step: int, description: str) -> None:
        """Nothing."""

    def train(self, where: JsonObject, numbers: dict[str, float], seconds_left: float) -> None:
        """Nothing."""

    def evaluation(self, where: JsonObject, numbers: dict[str, float]) -> None:
        """Nothing."""

    def event(self, where: JsonObject, message: str) -> None:
        """Nothing."""
