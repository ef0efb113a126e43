"""Results of a suite for one checkpoint, as files that hold everything needed to compute them again.

NAME/evaluation.json        numbers, intervals, protocol, checkpoint, recipe, commit, data, command, versions
NAME/outcomes.safetensors   outcomes of every image: for paired comparisons
NAME/gallery.json           images for the pages (report/gallery.py)

NAME is a folder in the output folder, or the run's own folder for the suite `heldout`. Results written by earlier
versions are translated when they are read.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.base import Evaluator, Measured
from openvision.evaluation.metrics.bootstrap import Outcomes
from openvision.evaluation.suites.old_results import renamed, translate_held_out
from openvision.files import JsonObject, atomic_write_bytes, atomic_write_text, check_file, read_json

FORMAT = "openvision-evaluation/1"
EVALUATION, OUTCOMES = "evaluation.json", "outcomes.safetensors"


class CheckpointFacts(TypedDict):
    """What identifies a checkpoint."""

    name: str
    source: str
    sha256: str
    recipe: str | None
    recipe_sha256: str | None
    provenance: JsonObject
    parameters: int | None
    vision_parameters: int | None
    released: str | None


class SuiteFacts(TypedDict):
    """What identifies a suite."""

    name: str
    description: str
    sha256: str


class Entry(TypedDict):
    """The numbers of one evaluator."""

    name: str
    kind: str
    options: JsonObject
    reported: dict[str, str]
    open_clip: dict[str, str]
    values: dict[str, float]
    intervals: dict[str, list[float]]
    facts: dict[str, str | int | float]
    details: JsonObject
    data: dict[str, str]
    seconds: NotRequired[float]


class Content(TypedDict):
    """evaluation.json."""

    format: str
    complete: bool
    checkpoint: CheckpointFacts
    settings: dict[str, str | int]
    suite: SuiteFacts
    git: dict[str, str | None] | None
    command: list[str]
    libraries: dict[str, str]
    data_folder: str
    results: list[Entry]
    skipped: list[str]
    history: list[JsonObject]


@dataclass
class Result:
    """One checkpoint, measured."""

    folder: Path
    content: Content
    tensors: dict[str, NDArray]

    @property
    def name(self) -> str:
        """The checkpoint's name in tables."""
        return self.content["checkpoint"]["name"]

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights."""
        return self.content["checkpoint"]["sha256"]

    @property
    def measured(self) -> dict[str, Entry]:
        """Entries of the evaluators, by their titles."""
        return {entry["name"]: entry for entry in self.content["results"]}

    def outcomes(self, evaluator: str, metric: str) -> Outcomes | None:
        """Outcomes per image; None for a metric that is no mean over images."""
        values = self.tensors.get(f"{evaluator}/{metric}/values")
        units = self.tensors.get(f"{evaluator}/{metric}/units")
        return Outcomes.of(values, units) if values is not None and units is not None else None


def distinct(results: list[Result]) -> list[Result]:
    """The same results; those of one name get the folder above theirs as part of it."""
    names = [result.name for result in results]
    for number, result in enumerate(results):
        if names.count(names[number]) > 1:
            result.content["checkpoint"]["name"] = f"{result.folder.resolve().parent.name}/{names[number]}"
    if len({result.name for result in results}) < len(results):
        raise OpenVisionError(f"{results[0].folder} and {results[-1].folder} are the same result")
    return results


def entry(evaluator: Evaluator, measured: Measured, seconds: float) -> Entry:
    """The numbers of one evaluator as evaluation.json holds them."""
    return {
        "name": evaluator.title,
        "kind": evaluator.kind,
        "options": evaluator.model_dump(mode="json", exclude_defaults=True),
        "reported": dict(evaluator.reported),
        "open_clip": dict(evaluator.open_clip),
        "values": measured.values,
        "intervals": {metric: list(bounds) for metric, bounds in measured.intervals.items()},
        "facts": measured.facts,
        "details": measured.details,
        "data": measured.data,
        "seconds": round(seconds, 1),
    }


def tensors(evaluator: Evaluator, measured: Measured) -> dict[str, NDArray]:
    """Outcomes and answers of one evaluator by name, in the smallest dtype that holds them exactly."""
    found: dict[str, NDArray] = {}
    for metric, outcomes in measured.outcomes.items():
        whole = np.isin(outcomes.values, (0, 1)).all()
        found[f"{evaluator.title}/{metric}/values"] = outcomes.values.astype(np.uint8 if whole else np.float64)
        found[f"{evaluator.title}/{metric}/units"] = outcomes.units.astype(np.int32)
    for name, array in measured.arrays.items():
        small = np.float32 if array.dtype.kind == "f" else np.int32
        found[f"{evaluator.title}/arrays/{name}"] = array.astype(small)
    return found


def write_result(result: Result) -> None:
    """Write both files; outcomes first, so that an evaluation.json always has its own."""
    arrays = {name: np.ascontiguousarray(array) for name, array in result.tensors.items()}
    atomic_write_bytes(result.folder / OUTCOMES, save(arrays))
    atomic_write_text(result.folder / EVALUATION, json.dumps(result.content, indent=2) + "\n")


def read_result(path: Path) -> Result:
    """Read a result by its folder or its evaluation.json; raises OpenVisionError with the remedy."""
    folder = path.parent if path.name == EVALUATION else path
    file = folder / EVALUATION
    if not file.is_file():
        raise OpenVisionError(
            f"{path} holds no {EVALUATION}; measure first: openvision eval CHECKPOINT --suite quick -o {folder.parent}"
        )
    try:
        content = read_json(file)
        if {"artefact", "protocol", "sets"} <= content.keys():
            return Result(folder, cast("Content", translate_held_out(content, folder, FORMAT)), {})
        if content.get("format") != FORMAT:
            raise OpenVisionError(f"{file} is not a result of a suite; measure again with `openvision eval CHECKPOINT`")
        check_file(folder / OUTCOMES)
        arrays = load_file(folder / OUTCOMES)
        for one in content["results"]:
            one["facts"] = renamed(one["facts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise OpenVisionError(f"{folder} cannot be read: {error}; measure again with `openvision eval`") from error
    return Result(folder, cast("Content", content), arrays)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal; raises OpenVisionError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise OpenVisionError(f"{path} cannot be read: {error.strerror}; train a model first") from error
