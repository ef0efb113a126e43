"""Evaluators: what can be measured, named in a recipe or a suite as tables `[[evaluate]]`.

    [[evaluate]]
    kind = "zero_shot"             # which evaluator
    name = "validation"            # under which its numbers stand: "validation/top1"
    data = "validation"            # folder relative to the data folder, a URL of shards, or "hf:NAME"
    every = 500                    # in training: steps between measurements; run.evaluate_every by default

An evaluator is a frozen pydantic model whose fields are its options, so a misspelt one is an error that names it. Other
packages add kinds through the entry point group `openvision.evaluators` (name = kind, value = the class); nothing is
imported that a recipe or suite names by path.

Every process of a run calls the same evaluators; each works on its slice of the images (`processes`).
"""

import difflib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import ClassVar

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from pydantic_core import ErrorDetails

from openvision.errors import OpenVisionError, describe_value
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.metrics.bootstrap import Outcomes, interval
from openvision.files import JsonObject

GROUP = "openvision.evaluators"
_BUILT_IN = {
    "zero_shot": "openvision.evaluation.evaluators.zero_shot:ZeroShot",
    "retrieval": "openvision.evaluation.evaluators.retrieval:Retrieval",
    "knn": "openvision.evaluation.evaluators.probes:Knn",
    "linear_probe": "openvision.evaluation.evaluators.probes:LinearProbe",
    "few_shot": "openvision.evaluation.evaluators.probes:FewShot",
    "patch_probe": "openvision.evaluation.evaluators.patch_probe:PatchProbe",
    "text_patches": "openvision.evaluation.evaluators.patch_matches:TextPatches",
    "correspondence": "openvision.evaluation.evaluators.patch_matches:Correspondence",
    "caption_loss": "openvision.evaluation.evaluators.caption_loss:CaptionLoss",
    "reconstruction": "openvision.evaluation.evaluators.reconstruction:Reconstruction",
    "baselines": "openvision.evaluation.evaluators.baselines:Baselines",
    "attribute_probe": "openvision.evaluation.evaluators.attributes:AttributeProbe",
}


@dataclass
class Measured:
    """What an evaluator found."""

    values: dict[str, float] = field(default_factory=dict)
    """Name of the metric -> value; shares are 0 to 1."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % intervals of those that have one."""
    outcomes: dict[str, Outcomes] = field(default_factory=dict)
    """Per image, for comparing models in pairs."""
    facts: dict[str, str | int | float] = field(default_factory=dict)
    """Protocol and counts: what a reader needs to measure the same again."""
    details: JsonObject = field(default_factory=dict)
    """Per class, curves, confusions: JSON."""
    arrays: dict[str, NDArray] = field(default_factory=dict)
    """Answers per image, for the gallery."""
    data: dict[str, str] = field(default_factory=dict)
    """Data set -> its identity (SHA-256)."""

    def add(self, metric: str, outcomes: Outcomes) -> None:
        """A metric that is the mean of outcomes, with its bootstrap interval."""
        self.values[metric] = outcomes.mean
        self.intervals[metric] = interval(outcomes)
        self.outcomes[metric] = outcomes


class Evaluator(BaseModel, ABC):
    """One measurement; subclasses are the kinds."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    needs_text: ClassVar[bool] = True
    """Whether it can only be measured on a model with a text tower."""
    needs_decoder: ClassVar[bool] = False
    """Whether it can only be measured on a model with a caption decoder."""
    needs_one_grid: ClassVar[bool] = False
    """Whether it compares patches of images of one grid, which native shapes are not."""

    kind: str
    name: str = ""
    """Name in results and logs; the kind by default."""
    data: str
    """Folder relative to the data folder, URL of shards, or "hf:NAME" of a Hugging Face dataset."""
    every: PositiveInt | None = None
    """In training: steps between measurements; `run.evaluate_every` by default."""
    limit: PositiveInt | None = None
    """Measure on about so many images, evenly spread; all by default."""
    optional: bool = False
    """In a suite: leave it out, with a note, where its data are missing."""
    reported: dict[str, str] = {}
    """Metric -> name of the published number it reproduces (reported.toml)."""
    open_clip: dict[str, str] = {}
    """Metric -> column of open_clip's tables of results."""

    @property
    def title(self) -> str:
        """Name, or the kind of an evaluator without one."""
        return self.name or self.kind

    @abstractmethod
    def measure(self, model: EvaluatedModel, root: str | Path) -> Measured:
        """Measure `model` on data below `root`; raises OpenVisionError for data that cannot be measured on."""

    def missing(self, root: str | Path) -> str | None:
        """The local folder or file that it needs and that does not exist."""
        return absent(self.data, root)


class TrainedEvaluator(Evaluator):
    """A measurement that learns from other images than those it measures on."""

    train: str
    """Data to learn from, given as `data` is."""

    def missing(self, root: str | Path) -> str | None:
        """The folder to measure on or the one to learn from."""
        return super().missing(root) or absent(self.train, root)


def absent(data: str, root: str | Path) -> str | None:
    """The path of local data that does not exist."""
    if data.startswith("hf:") or "://" in data or "://" in str(root):
        return None
    path = Path(root) / data
    return None if path.exists() else str(path)


def kinds() -> list[str]:
    """Every kind that is known, built in or from an installed package."""
    return sorted({*_BUILT_IN, *(point.name for point in entry_points(group=GROUP))})


def evaluator_class(kind: str) -> type[Evaluator]:
    """The class of a kind; raises ValueError that names the nearest one."""
    if kind in _BUILT_IN:
        module, _, name = _BUILT_IN[kind].partition(":")
        return getattr(import_module(module), name)
    for point in entry_points(group=GROUP):
        if point.name == kind:
            found = point.load()
            if not (isinstance(found, type) and issubclass(found, Evaluator)):
                raise ValueError(f"the package that brings the kind {kind!r} gives no Evaluator")
            if inspect.isabstract(found):
                raise ValueError(f"the kind {kind!r} is not finished by its package: it measures nothing")
            return found
    near = difflib.get_close_matches(kind, kinds(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(kinds())}"
    raise ValueError(f"unknown kind of evaluator {kind!r}; {hint}")


def _parse(value: object) -> Evaluator:
    """A table of options -> the evaluator it describes; ValueError in words for a user."""
    if isinstance(value, Evaluator):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise ValueError(f"an evaluator needs a kind; there are {', '.join(kinds())}")
    chosen = evaluator_class(value["kind"])
    try:
        return chosen.model_validate(value)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(problem, chosen) for problem in error.errors())) from error


def _explain(problem: ErrorDetails, chosen: type[Evaluator]) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place, chosen.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(chosen.model_fields)}"
        return f"unknown key {place} ({hint})"
    if problem["type"] == "missing":
        return f"key {place} is missing"
    message = describe_value(problem["type"], problem["input"], problem.get("ctx", {}), problem["msg"])
    return f"{place}: {message}" if place else message


def parse_evaluators(tables: Sequence[object], source: str) -> list[Evaluator]:
    """Evaluators from tables; `source` names them in errors. Raises OpenVisionError, also when there are none."""
    if not tables:
        raise OpenVisionError(f"{source} names no evaluator: the suite is empty; add tables [[evaluate]]")
    found = []
    for number, table in enumerate(tables):
        try:
            found.append(_parse(table))
        except ValueError as error:
            raise OpenVisionError(f"{source}, evaluate.{number}: {error}") from error
    check_titles(found, source)
    return found


def check_titles(evaluators: Sequence[Evaluator], source: str) -> None:
    """Raise OpenVisionError when two evaluators have one name."""
    titles = [evaluator.title for evaluator in evaluators]
    for title in titles:
        if titles.count(title) > 1:
            raise OpenVisionError(f"{source} has two evaluators named {title!r}; give each its own name")
        if "/" in title:
            raise OpenVisionError(f"{source}: the name {title!r} must not hold a '/'")


def due(evaluators: Sequence[Evaluator], step: int, default_every: int, last: bool) -> list[Evaluator]:
    """Evaluators due after `step`: by their own period or the default one, all after the last step."""
    return [one for one in evaluators if last or step % (one.every or default_every) == 0]


def measure_all(
    evaluators: Sequence[Evaluator], model: EvaluatedModel, root: str | Path
) -> Iterator[tuple[Evaluator, Measured]]:
    """Measure one evaluator after the other; an error names the evaluator."""
    for evaluator in evaluators:
        try:
            measured = evaluator.measure(model, root)
        except OpenVisionError as error:
            raise OpenVisionError(f"evaluator {evaluator.title!r}: {error}") from error
        broken = [metric for metric, value in measured.values.items() if not math.isfinite(value)]
        if broken:
            raise OpenVisionError(f"evaluator {evaluator.title!r}: {broken[0]} is not a finite number")
        yield evaluator, measured


def metrics_line(results: Sequence[tuple[Evaluator, Measured]]) -> dict[str, float]:
    """Numbers for a line of the metrics stream: "name/metric" -> value."""
    return {
        f"{evaluator.title}/{metric}": value
        for evaluator, measured in results
        for metric, value in measured.values.items()
    }
