"""A benchmark: questions about images, a mark for each answer, metrics from marks, and their 95 % intervals."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.untrusted import load_json, path_inside

SINGLE_WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
_SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".webp")
# Of the bootstrap.
_RESAMPLES = 1000
# Two-sided 95 % quantile of the normal distribution.
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Question:
    """One question about one image."""

    id: str
    image: Path
    prompt: str
    """Prompt of the model, instruction included."""
    truth: tuple[str, ...]
    """Correct answers, or the answers of the annotators."""
    group: str = ""
    """Category that the benchmark reports."""
    cluster: str = ""
    """Questions with one cluster are resampled together for intervals; by default those about one image."""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Marks:
    """Marks of n answers: columns float64 (n,), groups, and cluster numbers int64 (n,)."""

    columns: Mapping[str, NDArray[np.float64]]
    groups: NDArray[np.str_]
    clusters: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.groups)


Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark's files are read, an answer is marked and metrics are computed."""

    name: str
    title: str
    layout: str
    """Files that the data folder must hold, as officially distributed; for messages."""
    read: Callable[[Path], list[Question]]
    mark: Callable[[Question, str], Mapping[str, float]]
    metrics: Callable[[Marks, NDArray[np.float64]], Metrics]
    """Metrics from marks and their weights float64 (n,)."""
    max_new_tokens: int
    headline: tuple[str, ...]
    """Metrics that are shown first."""
    top: Mapping[str, float] = field(default_factory=dict)
    """Highest value of a metric, when it is not 100."""
    export: Callable[[Sequence[Question], Mapping[str, str]], Mapping[str, str]] | None = None
    """Converts answers to the input of an external judge, when the metric needs one."""


def mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Weighted mean in percent; NaN when all weights are zero."""
    total = weights.sum()
    return float(100 * (values * weights).sum() / total) if total else float("nan")


def group_means(marks: Marks, column: str, weights: NDArray[np.float64]) -> dict[str, float]:
    """`mean` of a column for every group, sorted by name."""
    values = marks.columns[column]
    return {
        str(name): mean(values[marks.groups == name], weights[marks.groups == name]) for name in np.unique(marks.groups)
    }


def accuracy(marks: Marks, weights: NDArray[np.float64]) -> dict[str, float]:
    """Accuracy in percent, of all questions and of every group."""
    means = group_means(marks, "right", weights)
    groups = {f"accuracy/{name}": value for name, value in means.items()} if len(means) > 1 else {}
    return {"accuracy": mean(marks.columns["right"], weights), **groups}


def read_json(path: Path, layout: str) -> JsonObject:
    """Object in a JSON file of a benchmark; raises OpenVisionError that names the files of `layout`."""
    return _parse(path, layout, load_json)


def read_json_list(path: Path, layout: str) -> list[JsonObject]:
    """List in a JSON file of a benchmark; raises OpenVisionError that names the files of `layout`."""
    return _parse(path, layout, load_json)


def read_lines(path: Path, layout: str) -> list[JsonObject]:
    """Objects in a JSON lines file of a benchmark; raises OpenVisionError that names the files of `layout`."""
    return _parse(path, layout, lambda text: [load_json(line) for line in text.splitlines() if line.strip()])


T = TypeVar("T")


def _parse(path: Path, layout: str, parse: Callable[[str], T]) -> T:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OpenVisionError(f"{path} cannot be read: {error.strerror}; the folder must hold {layout}") from error
    except ValueError as error:
        raise OpenVisionError(f"{path} is not valid JSON: {error}; download it again") from error


def find_image(folder: Path, name: str) -> Path:
    """The image file `name` in `folder`, with a suffix added when needed; raises OpenVisionError when it is missing."""
    for suffix in _SUFFIXES:
        if (path := path_inside(folder, f"{name}{suffix}")).is_file():
            return path
    raise OpenVisionError(f"image {name} is not in {folder}; download all images of the benchmark")


def first_folder(data: Path, names: Iterable[str], layout: str) -> Path:
    """The first folder of `names` that exists in `data`; raises OpenVisionError when none does."""
    for name in names:
        if (data / name).is_dir():
            return data / name
    raise OpenVisionError(f"{data} does not hold {' or '.join(names)}; it must hold {layout}")


def lettered(choices: Sequence[str]) -> str:
    """One choice a line: "A. first"."""
    return "\n".join(f"{chr(ord('A') + number)}. {choice}" for number, choice in enumerate(choices))


def tabulate(benchmark: Benchmark, questions: list[Question], answers: Mapping[str, str]) -> Marks:
    """Mark the answers, which are given by question id."""
    rows = [benchmark.mark(question, answers[question.id]) for question in questions]
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
    names = [question.cluster or str(question.image) for question in questions]
    clusters = np.unique(names, return_inverse=True)[1].astype(np.int64)
    return Marks(columns, np.array([question.group for question in questions]), clusters)


class Estimate(TypedDict):
    """A metric with its 95 % interval."""

    value: float
    low: float
    high: float


def with_intervals(benchmark: Benchmark, marks: Marks, seed: int = 0) -> dict[str, Estimate]:
    """Every metric with percentiles of a bootstrap over clusters.

    When all answers are wrong, or all correct, resampling has no spread, so the interval is Wilson's for as many
    clusters. Metrics without questions are left out.
    """
    values = benchmark.metrics(marks, np.ones(len(marks)))
    clusters = int(marks.clusters.max()) + 1
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=_RESAMPLES)
    samples = [benchmark.metrics(marks, draw[marks.clusters].astype(np.float64)) for draw in draws]
    result: dict[str, Estimate] = {}
    for name, value in values.items():
        read = np.array([sample[name] for sample in samples])
        read = read[~np.isnan(read)]
        top = benchmark.top.get(name, 100.0)
        if math.isnan(value) or not len(read):
            continue
        if value in (0, top):
            low, high = (top * bound for bound in wilson_interval(clusters if value else 0, clusters))
        else:
            low, high = np.percentile(read, (2.5, 97.5)).tolist()
        result[name] = {"value": value, "low": low, "high": high}
    return result


def wilson_interval(hits: int, total: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson's score interval of a binomial share, which is valid for small samples and shares near 0 or 1.

    Raises OpenVisionError unless 0 <= `hits` <= `total` and `total` > 0.
    """
    if not 0 <= hits <= total or total == 0:
        raise OpenVisionError(f"cannot give an interval for {hits} hits out of {total}: measure at least one sample")
    share = hits / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # Exact ends: rounding must not exclude 0 hits from their own interval.
    low = (centre - spread) / scale if hits else 0.0
    high = (centre + spread) / scale if hits < total else 1.0
    return low, high
