"""Zero-shot classification: accuracy, accuracy per class, confusions, calibration.

The protocol decides how class names become texts (`prompts`), the checkpoint's preprocessing how images become
pixels: together they are spec section 7, or open_clip's.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from openvision.evaluation.data.options import LabelOptions, open_labelled
from openvision.evaluation.data.prompts import classifier, protocol
from openvision.evaluation.evaluators.base import Evaluator, Measured
from openvision.evaluation.evaluators.model import Subject
from openvision.evaluation.metrics.bootstrap import Outcomes, class_mean_interval
from openvision.evaluation.metrics.calibration import calibration, confidences
from openvision.evaluation.metrics.ranks import similarity, target_ranks, with_interval, within, within_by_group


def candidates_of(labels: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Sorted distinct labels, and for every sample the position of its own."""
    candidates = sorted(set(labels))
    position = {label: index for index, label in enumerate(candidates)}
    return candidates, np.array([position[label] for label in labels], dtype=np.int64)


def classification_ranks(
    images: NDArray[np.floating], classes: NDArray[np.floating], targets: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Rank from 0 of each image's own class; images (n, E), classes (c, E), targets (n,)."""
    return target_ranks(similarity(images, classes), targets)


def classification(
    ranks: NDArray[np.integer], groups: Sequence[str] | None = None
) -> dict[str, float | list[float] | dict[str, float]]:
    """Top-1 and top-5 with intervals from ranks, and top-1 for every group."""
    result: dict[str, float | list[float] | dict[str, float]] = {
        **with_interval("top1", within(ranks, 1)),
        **with_interval("top5", within(ranks, 5)),
    }
    if groups is not None:
        by_group = within_by_group(ranks, groups, 1)
        result["top1_by_category"] = {str(group): by_group[group].value for group in sorted(by_group, key=str)}
    return result


CONFUSIONS = 20
_BLOCK = 4096


class ZeroShot(Evaluator, LabelOptions):
    """`top1`, `top5`, `mean_per_class`, `ece` (expected calibration error)."""

    kind: Literal["zero_shot"] = "zero_shot"
    prompts: str = "plain"
    """`plain`, `short`, `openvision`, `open_clip`, or a file of templates."""
    words: bool = False
    """Read hyphens, underscores and ampersands of a class name as blanks: "people-body" is "people body"."""

    def measure(self, subject: Subject, root: str | Path) -> Measured:
        """Measure on every picture; ties count against the model."""
        data = open_labelled(self.data, root, self, self.limit)
        how = protocol(self.prompts, None if "://" in str(root) else Path(root))
        # An error of the texts is told before a million pictures are encoded.
        names = [_words(name) for name in data.classes] if self.words else data.classes
        classes = classifier(subject.texts, names, how)
        encoded, images = subject.embeds(data.pictures)
        labels = data.labels[encoded.rows]
        mine = np.array(subject.processes.rows(len(labels)), dtype=np.int64)
        gather = subject.processes.gather_rows
        ranks, predicted = answers(images[mine], classes, labels[mine])
        sure = confidences(images[mine], classes, subject.scale) if len(mine) else np.empty(0)
        ranks, predicted = gather(ranks, len(labels)), gather(predicted, len(labels))
        result = summarize(ranks, labels, encoded.rows, top5=len(classes) > 5)
        result.facts = {
            "pictures": len(labels),
            "classes": len(classes),
            "rejected": encoded.rejected,
            "prompts": how.name,
            "templates": len(how.templates),
            "resolution": subject.pixels,
            "preprocessing": subject.preprocessing,
        }
        result.details |= per_class(ranks, predicted, labels, data.classes)
        add_calibration(result, gather(sure, len(labels)), ranks == 0)
        result.arrays |= {"rows": encoded.rows, "label": labels, "predicted": predicted}
        result.data[data.pictures.name] = data.pictures.identity
        return result


def _words(name: str) -> str:
    return " ".join(name.replace("-", " ").replace("_", " ").replace("&", " ").split())


def answers(
    images: NDArray[np.floating], classes: NDArray[np.floating], labels: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rank of each picture's own class, from 0, and the class nearest to it; images (n, E), classes (c, E).

    Of equally near classes a wrong one stands before the right one; a block of pictures is held at a time.
    """
    ranks = np.empty(len(images), dtype=np.int64)
    predicted = np.empty(len(images), dtype=np.int64)
    for start in range(0, len(images), _BLOCK):
        rows = slice(start, start + _BLOCK)
        scores = similarity(images[rows], classes)
        own = labels[rows]
        place = np.arange(len(own))
        ranks[rows] = (scores >= scores[place, own][:, None]).sum(axis=1) - 1
        # The right class is looked at last: the answer agrees with the rank.
        others = scores.copy()
        others[place, own] = -np.inf
        predicted[rows] = np.where(ranks[rows] == 0, own, others.argmax(axis=1))
    return ranks, predicted


def summarize(
    ranks: NDArray[np.integer], labels: NDArray[np.integer], units: NDArray[np.integer], top5: bool = True
) -> Measured:
    """Accuracies with their intervals from ranks (n,); `units` number the pictures in their set."""
    result = Measured()
    result.add("top1", Outcomes.of(ranks < 1, units))
    if top5:
        result.add("top5", Outcomes.of(ranks < 5, units))
    hits = ranks < 1
    present = np.unique(labels)
    result.values["mean_per_class"] = float(np.mean([hits[labels == index].mean() for index in present]))
    result.intervals["mean_per_class"] = class_mean_interval(hits, labels)
    return result


def per_class(
    ranks: NDArray[np.integer], predicted: NDArray[np.integer], labels: NDArray[np.integer], names: list[str]
) -> dict[str, Any]:
    """Accuracy of every class and the pairs that are confused most, most frequent first."""
    right = np.bincount(labels[ranks < 1], minlength=len(names))
    total = np.bincount(labels, minlength=len(names))
    wrong = Counter(
        (int(label), int(answer)) for label, answer in zip(labels, predicted, strict=True) if label != answer
    )
    ordered = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))
    return {
        "classes": list(names),
        "per_class": [[int(hit), int(count)] for hit, count in zip(right, total, strict=True)],
        "confusions": [[*pair, count] for pair, count in ordered[:CONFUSIONS]],
    }


def add_calibration(result: Measured, sure: NDArray[np.floating], hits: NDArray[np.bool_]) -> None:
    """Add the calibration error, its interval and its curve."""
    found = calibration(sure, hits)
    result.values["ece"] = found.error
    result.intervals["ece"] = found.interval
    result.details["reliability"] = {
        "confidence": found.confidence,
        "accuracy": found.accuracy,
        "count": found.count,
    }
    result.arrays["confidence"] = sure
