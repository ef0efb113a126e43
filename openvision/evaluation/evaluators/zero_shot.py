"""Zero-shot classification: accuracy, accuracy per class, confusions, calibration.

The protocol decides how class names become texts (`prompts`), the checkpoint's preprocessing how images become
pixels: together they are spec section 7, or open_clip's.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from openvision.evaluation.data.images import Labelled
from openvision.evaluation.data.options import LabelOptions, open_labelled
from openvision.evaluation.data.prompts import Protocol, classifier, first_alike, protocol
from openvision.evaluation.evaluators.base import Evaluator, Measured, absent
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.metrics.bootstrap import Outcomes, class_mean_interval
from openvision.evaluation.metrics.calibration import calibration, confidences
from openvision.evaluation.metrics.ranks import similarity
from openvision.files import JsonObject

CONFUSIONS = 20
_BLOCK = 4096


def candidates_of(labels: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Sorted distinct labels, and for every sample the position of its own."""
    candidates = sorted(set(labels))
    position = {label: index for index, label in enumerate(candidates)}
    return candidates, np.array([position[label] for label in labels], dtype=np.int64)


@dataclass(frozen=True)
class Answers:
    """The answers of a model for n images."""

    data: Labelled
    protocol: Protocol
    rows: NDArray[np.int64]
    """(n,), the images' numbers in the set; the arrays below are in the same order."""
    labels: NDArray[np.int64]
    ranks: NDArray[np.int64]
    """Rank of the right class, from 0."""
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    """Probability of the most probable class."""

    def confusions(self) -> list[tuple[int, int, int]]:
        """Pairs of a class and the wrong answer with their number, most frequent first."""
        return count_confusions(self.labels, self.predicted)


class ZeroShot(Evaluator, LabelOptions):
    """`top1`, `top5`, `mean_per_class`, `ece` (expected calibration error)."""

    kind: Literal["zero_shot"] = "zero_shot"
    prompts: str | tuple[str, ...] = "plain"
    """`plain`, `short`, `openvision`, `open_clip`, a file of templates, or a list of templates."""
    words: bool = False
    """Read hyphens, underscores and ampersands of a class name as blanks: "people-body" is "people body"."""
    candidates: str | None = None
    """Other data, given as `data` is, whose classes are candidates too."""
    groups: str | None = None
    """Label, given as `label` is, by whose values top-1 is listed as well."""

    def missing(self, root: str | Path) -> str | None:
        """The folder to measure on or the one of further candidates."""
        return super().missing(root) or (absent(self.candidates, root) if self.candidates is not None else None)

    def open(self, root: str | Path) -> Labelled:
        """The images with their classes among all candidates."""
        data = open_labelled(self.data, root, self, self.limit)
        if self.candidates is None:
            return data
        others = open_labelled(self.candidates, root, self)
        classes, place = candidates_of([*data.classes, *others.classes])
        return replace(data, labels=place[data.labels], classes=classes)

    def open_groups(self, root: str | Path) -> Labelled | None:
        """The images with their groups; None without the option."""
        if self.groups is None:
            return None
        return open_labelled(self.data, root, LabelOptions(label=self.groups, split=self.split), self.limit)

    def answer(self, model: EvaluatedModel, root: str | Path) -> "Answers":
        """The model's answer for every image that can be decoded; ties count against it, see `answers`."""
        data = self.open(root)
        how = protocol(self.prompts, None if "://" in str(root) else Path(root))
        # Texts come first: an error in them should not cost the encoding of a million images.
        names = self.class_texts(data.classes)
        classes = classifier(model.texts, names, how)
        encoded, images = model.embeds(data.images)
        labels = data.labels[encoded.rows]
        mine = np.array(model.processes.rows(len(labels)), dtype=np.int64)
        ranks, predicted = answers(images[mine], classes, labels[mine], first_alike(names, how))
        confidence = confidences(images[mine], classes, model.scale) if len(mine) else np.empty(0)
        gathered = (model.processes.gather_rows(array, len(labels)) for array in (ranks, predicted, confidence))
        return Answers(data, how, encoded.rows, labels, *gathered)

    def measure(self, model: EvaluatedModel, root: str | Path) -> Measured:
        """Measure on every image that can be decoded."""
        found = self.answer(model, root)
        result = summarize(found.ranks, found.labels, found.rows, top5=len(found.data.classes) > 5)
        result.facts = {
            "images": len(found.labels),
            "classes": len(found.data.classes),
            "rejected": len(found.data) - len(found.labels),
            "prompts": found.protocol.name,
            "templates": len(found.protocol.templates),
            "resolution": model.pixels,
            "preprocessing": model.preprocessing,
        }
        if found.data.naming:
            result.facts["class_names"] = found.data.naming
        result.details |= per_class(found.ranks, found.predicted, found.labels, found.data.classes)
        if (groups := self.open_groups(root)) is not None:
            own = groups.labels[found.rows]
            result.details["top1_by_group"] = {
                name: float((found.ranks[own == number] == 0).mean())
                for number, name in enumerate(groups.classes)
                if (own == number).any()
            }
        add_calibration(result, found.confidence, found.ranks == 0)
        result.arrays |= {"rows": found.rows, "label": found.labels, "predicted": found.predicted}
        result.data[found.data.images.name] = found.data.images.identity
        return result

    def class_texts(self, names: Sequence[str]) -> list[str]:
        """Class names as the prompts hold them."""
        return [readable(name) for name in names] if self.words else list(names)


def readable(name: str) -> str:
    """The words of an identifier: "people-body" -> "people body"."""
    return " ".join(name.replace("-", " ").replace("_", " ").replace("&", " ").split())


def answers(
    images: NDArray[np.floating],
    classes: NDArray[np.floating],
    labels: NDArray[np.integer],
    alike: NDArray[np.integer] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rank of each image's own class, from 0, and the class nearest to it; images (n, E), classes (c, E).

    Of equally near classes a wrong one ranks before the right one. But of classes of the same texts, which no model can
    tell apart, the first wins, as by argmax in the original: `alike` (c,), from `first_alike`, is the first
    class with the texts of each. A block of images is computed at a time.
    """
    group = np.arange(len(classes)) if alike is None else alike
    # How many classes of the same texts come after each: they tie with it and rank behind.
    behind = np.array([(group[number + 1 :] == group[number]).sum() for number in range(len(group))], dtype=np.int64)
    ranks = np.empty(len(images), dtype=np.int64)
    predicted = np.empty(len(images), dtype=np.int64)
    for start in range(0, len(images), _BLOCK):
        rows = slice(start, start + _BLOCK)
        scores = similarity(images[rows], classes)
        own = labels[rows]
        place = np.arange(len(own))
        ranks[rows] = (scores >= scores[place, own][:, None]).sum(axis=1) - 1 - behind[own]
        # The right class is looked at last: the answer agrees with the rank.
        others = scores.copy()
        others[place, own] = -np.inf
        predicted[rows] = np.where(ranks[rows] == 0, own, others.argmax(axis=1))
    return ranks, predicted


def summarize(
    ranks: NDArray[np.integer], labels: NDArray[np.integer], units: NDArray[np.integer], top5: bool = True
) -> Measured:
    """Accuracies with their intervals from ranks (n,); `units` number the images in their set."""
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
) -> JsonObject:
    """Accuracy of every class and the pairs that are confused most, most frequent first."""
    right = np.bincount(labels[ranks < 1], minlength=len(names))
    total = np.bincount(labels, minlength=len(names))
    return {
        "classes": list(names),
        "per_class": [[int(hit), int(count)] for hit, count in zip(right, total, strict=True)],
        "confusions": [list(one) for one in count_confusions(labels, predicted)[:CONFUSIONS]],
    }


def count_confusions(labels: NDArray[np.integer], predicted: NDArray[np.integer]) -> list[tuple[int, int, int]]:
    """Pairs of a class and the wrong answer with their number, most frequent first."""
    wrong = Counter(
        (int(label), int(answer)) for label, answer in zip(labels, predicted, strict=True) if label != answer
    )
    return [(*pair, count) for pair, count in sorted(wrong.items(), key=lambda item: (-item[1], item[0]))]


def add_calibration(result: Measured, confidence: NDArray[np.floating], hits: NDArray[np.bool_]) -> None:
    """Add the calibration error, its interval and its curve."""
    found = calibration(confidence, hits)
    result.values["ece"] = found.error
    result.intervals["ece"] = found.interval
    result.details["reliability"] = {
        "confidence": found.confidence,
        "accuracy": found.accuracy,
        "count": found.count,
    }
    result.arrays["confidence"] = confidence
