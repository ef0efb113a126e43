"""What every benchmark is made of: questions about pictures, a mark for an answer, numbers from marks."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvision.errors import OpenVisionError

SINGLE_WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".webp", "")


@dataclass(frozen=True)
class Question:
    """One question about one picture."""

    id: str
    image: Path
    prompt: str
    """What the model is asked, instruction included."""
    truth: tuple[str, ...]
    """Right answers, or the answers of the annotators."""
    group: str = ""
    """Category the benchmark reports on."""
    cluster: str = ""
    """Questions that are resampled together for intervals: those about one picture."""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Marks:
    """Marks of n answers: columns float64 (n,), their groups, and the number of their cluster int64 (n,)."""

    columns: Mapping[str, NDArray[np.float64]]
    groups: NDArray[np.str_]
    clusters: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.groups)


Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: how its files are read, how an answer is marked, what is reported."""

    name: str
    title: str
    layout: str
    """Files that the data folder must hold, as officially distributed."""
    read: Callable[[Path], list[Question]]
    mark: Callable[[Question, str], Mapping[str, float]]
    metrics: Callable[[Marks, NDArray[np.float64]], Metrics]
    """Numbers from marks and a weight for each, float64 (n,)."""
    max_new_tokens: int
    headline: tuple[str, ...]
    """Metrics shown first."""
    top: Mapping[str, float] = field(default_factory=dict)
    """Highest value of a metric where it is not 100."""
    export: Callable[[Sequence[Question], Mapping[str, str]], Mapping[str, str]] | None = None
    """Answers in the form of an external judge, where the metric needs one."""


def mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Weighted mean in percent; NaN where nothing has weight."""
    total = weights.sum()
    return float(100 * (values * weights).sum() / total) if total else float("nan")


def group_means(marks: Marks, column: str, weights: NDArray[np.float64]) -> dict[str, float]:
    """`mean` of a column for every group, in order of name."""
    values = marks.columns[column]
    return {
        str(name): mean(values[marks.groups == name], weights[marks.groups == name]) for name in np.unique(marks.groups)
    }


def accuracy(marks: Marks, weights: NDArray[np.float64]) -> dict[str, float]:
    """The mean mark, and that of every group."""
    means = group_means(marks, "right", weights)
    groups = {f"accuracy/{name}": value for name, value in means.items()} if len(means) > 1 else {}
    return {"accuracy": mean(marks.columns["right"], weights), **groups}


def read_json(path: Path, layout: str) -> Any:
    """Content of a JSON file of a benchmark; raises OpenVisionError that says what the folder must hold."""
    return _parsed(path, layout, json.loads)


def read_lines(path: Path, layout: str) -> list[Any]:
    """Content of a file of JSON lines of a benchmark."""
    return _parsed(path, layout, lambda text: [json.loads(line) for line in text.splitlines() if line.strip()])


def _parsed(path: Path, layout: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OpenVisionError(f"{path} cannot be read: {error.strerror}; the folder must hold {layout}") from error
    except ValueError as error:
        raise OpenVisionError(f"{path} is not valid JSON: {error}; fetch it again") from error


def picture(folder: Path, name: str) -> Path:
    """The file of a picture in `folder`, its ending added where the benchmark's files leave it out."""
    for ending in ("", *PICTURE_ENDINGS[:-1]):
        if (folder / f"{name}{ending}").is_file():
            return folder / f"{name}{ending}"
    raise OpenVisionError(f"picture {name} is not in {folder}; fetch the benchmark's pictures completely")


def first_folder(data: Path, names: Iterable[str], layout: str) -> Path:
    """The first of the named folders that exists in `data`."""
    for name in names:
        if (data / name).is_dir():
            return data / name
    raise OpenVisionError(f"{data} does not hold {' or '.join(names)}; it must hold {layout}")


def lettered(choices: Sequence[str]) -> str:
    """Choices a line each: "A. first"."""
    return "\n".join(f"{chr(ord('A') + number)}. {choice}" for number, choice in enumerate(choices))
