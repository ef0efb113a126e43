"""The record of a run: one JSON object a line, appended as the run goes, cut back to the checkpoint on resume.

The same numbers go to the screen and to the trackers that the recipe asks for.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from openvision.files import JsonObject, atomic_write_text, read_json_lines
from openvision.recipe.schema import Recipe
from openvision.training.run.display import TrainingDisplay
from openvision.training.run.trackers import open_trackers

# Numbers that earlier versions wrote under other names.
_RENAMED = {"temperature": "logit_scale"}


class MetricsLog:
    """Append-only `metrics.jsonl`."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Keep the lines of steps up to `resume_step`: later ones will be made again."""
        self.path = path
        kept = [line for line in read_json_lines(path) if line["step"] <= resume_step] if path.exists() else []
        kept = [{_RENAMED.get(name, name): value for name, value in line.items()} for line in kept]
        atomic_write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system at once."""
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RunLog:
    """Everything that is written about a run while it goes: metrics.jsonl, the screen, trackers."""

    def __init__(self, recipe: Recipe, run_folder: Path, resume_step: int) -> None:
        """Open what the recipe asks for; raises OpenVisionError when a tracker's library is missing."""
        self._trackers = open_trackers(recipe, run_folder, resume_step)
        self._metrics = MetricsLog(run_folder / "metrics.jsonl", resume_step)
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
        """One line on the screen."""
        self._display.say(message)

    def step(self, step: int, description: str) -> None:
        """So many steps are done."""
        self._display.step(step, description)

    def train(self, where: dict[str, Any], numbers: dict[str, float], seconds_left: float) -> None:
        """The numbers of a training step."""
        self._metrics.write("train", {**where, **numbers})
        self._display.log(where["step"], numbers, seconds_left)
        self._track("train", where["step"], numbers)

    def evaluation(self, where: dict[str, Any], numbers: dict[str, float]) -> None:
        """The numbers of a measurement."""
        self._metrics.write("eval", {**where, **numbers})
        self._track(where["split"], where["step"], numbers)

    def event(self, where: dict[str, Any], message: str) -> None:
        """Something out of the ordinary at a step."""
        self._metrics.write("event", {**where, "message": message})
        self.say(f"step {where['step']}: {message}")

    def _track(self, prefix: str, step: int, numbers: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, {f"{prefix}/{name}": value for name, value in numbers.items()})


class NoLog:
    """In the place of `RunLog` in all processes but the main one: messages are printed, numbers are dropped."""

    def say(self, message: str) -> None:
        """Print a line."""
        print(message, flush=True)

    def step(self, step: int, description: str) -> None:
        """Nothing."""

    def train(self, where: JsonObject, numbers: dict[str, float], seconds_left: float) -> None:
        """Nothing."""

    def evaluation(self, where: JsonObject, numbers: dict[str, float]) -> None:
        """Nothing."""

    def event(self, where: JsonObject, message: str) -> None:
        """Nothing."""
