"""Log of a run: metrics.jsonl with one JSON object a line, the screen, and the trackers of the recipe.

On resume metrics.jsonl is cut back to the step of the checkpoint.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from openvision.files import JsonObject, PatientLines, atomic_write_text
from openvision.recipe.schema import Recipe
from openvision.renamed import read_metrics
from openvision.terminal import echo
from openvision.training.run.display import TrainingDisplay
from openvision.training.run.trackers import open_trackers

METRICS = "metrics.jsonl"


class MetricsLog:
    """Append-only metrics.jsonl; a full disk delays its lines and stops nothing."""

    def __init__(self, path: Path, resume_step: int, say: Callable[[str], None] = print) -> None:
        """Open `path`; drop lines after `resume_step`, whose steps will be trained again."""
        self._say = say
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if path.exists() else []
        atomic_write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = PatientLines(path)

    def write(self, kind: str, values: JsonObject) -> None:
        """Append one line."""
        if self._file.write([json.dumps({"kind": kind, **values}) + "\n"]):
            problem = self._file.problem
            again = f"{self._file.path} is written again, with all that was kept"
            self._say(f"{problem}; training continues, its lines are kept in memory" if problem else again)

    def close(self) -> None:
        """Try once more to write what was kept."""
        self._file.write([])
        if self._file.problem is not None:
            self._say(f"{self._file.problem}; its newest lines are lost")


class RunLog:
    """Writes metrics.jsonl, the screen and the trackers. `where` is the step, stage and samples of a line."""

    def __init__(self, recipe: Recipe, run_folder: Path, resume_step: int) -> None:
        """Open all outputs; raises OpenVisionError when the library of a tracker is not installed."""
        self._trackers = open_trackers(recipe, run_folder, resume_step)
        self._display = TrainingDisplay(recipe.steps)
        self._metrics = MetricsLog(run_folder / METRICS, resume_step, self.say)

    def __enter__(self) -> "RunLog":
        self._closing = ExitStack()
        self._closing.enter_context(self._display)
        self._closing.callback(self._close_trackers)
        self._closing.callback(self._metrics.close)
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

    def _close_trackers(self) -> None:
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                self.say(f"{type(tracker).__name__} cannot be closed ({error})")

    def _track(self, prefix: str, step: int, numbers: dict[str, float]) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.log(step, {f"{prefix}/{name}": value for name, value in numbers.items()})
            except Exception as error:
                # A full disk, or a server that does not answer: whatever it is, it must not end the training.
                self._trackers.remove(tracker)
                self.say(f"{type(tracker).__name__} fails ({error}); training continues without it")


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
