"""Results of a suite for one checkpoint, as files that say everything needed to compute them again.

OUT/NAME/evaluation.json        numbers, intervals, protocol, checkpoint, recipe, commit, data, command, versions
OUT/NAME/outcomes.safetensors   what came of every picture: for paired comparisons
OUT/NAME/gallery.json           pictures for the page (examples.py)
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.base import Evaluator, Measured
from openvision.evaluation.metrics.bootstrap import Outcomes
from openvision.files import atomic_write_bytes, atomic_write_text

FORMAT = "openvision-evaluation/1"
EVALUATION, OUTCOMES, GALLERY = "evaluation.json", "outcomes.safetensors", "gallery.json"


@dataclass
class Result:
    """One checkpoint, measured."""

    folder: Path
    content: dict[str, Any]
    tensors: dict[str, NDArray]

    @property
    def name(self) -> str:
        """What tables call the checkpoint."""
        return self.content["checkpoint"]["name"]

    @property
    def sha256(self) -> str:
        """Of the weights."""
        return self.content["checkpoint"]["sha256"]

    @property
    def measured(self) -> dict[str, dict[str, Any]]:
        """Entries of the evaluators, by their titles."""
        return {entry["name"]: entry for entry in self.content["results"]}

    def outcomes(self, evaluator: str, metric: str) -> Outcomes | None:
        """Per picture; None for a metric that is no mean over pictures."""
        values = self.tensors.get(f"{evaluator}/{metric}/values")
        units = self.tensors.get(f"{evaluator}/{metric}/units")
        return Outcomes.of(values, units) if values is not None and units is not None else None

    def gallery(self) -> dict[str, Any]:
        """Content of gallery.json; empty without one."""
        path = self.folder / GALLERY
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def distinct(results: list[Result]) -> list[Result]:
    """The same results; those of one name are called by the folder above theirs, too."""
    names = [result.name for result in results]
    for number, result in enumerate(results):
        if names.count(names[number]) > 1:
            result.content["checkpoint"]["name"] = f"{result.folder.resolve().parent.name}/{names[number]}"
    if len({result.name for result in results}) < len(results):
        raise OpenVisionError(f"{results[0].folder} and {results[-1].folder} are the same result")
    return results


def entry(evaluator: Evaluator, measured: Measured) -> dict[str, Any]:
    """What evaluation.json says about one evaluator."""
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
    }


def tensors(evaluator: Evaluator, measured: Measured) -> dict[str, NDArray]:
    """Outcomes and answers of one evaluator by name, as small as they can be kept exactly."""
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
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise OpenVisionError(
                f"{file} is not a result of a suite; measure it with `openvision eval CHECKPOINT --suite quick`"
            )
        arrays = load_file(folder / OUTCOMES)
    except (OSError, ValueError, SafetensorError) as error:
        raise OpenVisionError(f"{folder} cannot be read: {error}; measure again with `openvision eval`") from error
    return Result(folder, content, arrays)
