"""Probes as evaluators: k nearest neighbours, linear probe, few-shot. They need no text tower."""

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import Labelled
from openvision.evaluation.data.options import LabelOptions, open_labelled
from openvision.evaluation.evaluators.base import Evaluator, Measured
from openvision.evaluation.evaluators.model import Subject
from openvision.evaluation.evaluators.zero_shot import per_class
from openvision.evaluation.metrics.bootstrap import Outcomes, class_mean_interval
from openvision.evaluation.metrics.probes import NEIGHBOURS, few_shot, linear_probe, nearest_neighbours

Split = tuple[NDArray[np.float32], NDArray[np.int64]]


class Probe(Evaluator, LabelOptions):
    """What probes share: pictures to learn from and pictures to be asked about, with the same classes."""

    needs_text: ClassVar[bool] = False
    train: str
    """Data to learn from, given as `data` is."""
    train_split: str = "train"
    """Of a Hugging Face dataset."""
    train_limit: PositiveInt | None = None
    """Learn from about so many pictures, evenly spread."""

    def missing(self, root: str | Path) -> str | None:
        """The folder to be asked about or the one to learn from."""
        return super().missing(root) or self.model_copy(update={"data": self.train})._own_missing(root)

    def _own_missing(self, root: str | Path) -> str | None:
        return Evaluator.missing(self, root)

    def _known(self, subject: Subject, root: str | Path, result: Measured) -> tuple[Split, list[str]]:
        options = self.model_copy(update={"split": self.train_split})
        data = open_labelled(self.train, root, options, self.train_limit)
        return _encode(subject, data, result), data.classes

    def _asked(self, subject: Subject, root: str | Path, result: Measured, classes: list[str]) -> Split:
        data = open_labelled(self.data, root, self, self.limit)
        features, labels = _encode(subject, data, result)
        result.arrays["rows"] = subject.encode(data.pictures).rows
        return features, _renumbered(labels, data.classes, classes, self.train)

    def _finish(self, result: Measured, predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> Measured:
        hits = predicted == labels
        result.add("top1", Outcomes.of(hits, result.arrays["rows"]))
        result.values["mean_per_class"] = float(np.mean([hits[labels == one].mean() for one in np.unique(labels)]))
        result.intervals["mean_per_class"] = class_mean_interval(hits, labels)
        result.arrays |= {"label": labels, "predicted": predicted}
        return result


def _encode(subject: Subject, data: Labelled, result: Measured) -> Split:
    encoded = subject.encode(data.pictures)
    result.data[data.pictures.name] = data.pictures.identity
    return encoded.pooled, data.labels[encoded.rows]


def _renumbered(labels: NDArray[np.int64], own: list[str], known: list[str], train: str) -> NDArray[np.int64]:
    """Class numbers of the asked set in the numbering of the known one."""
    position = {name: index for index, name in enumerate(known)}
    strange = [name for name in own if name not in position]
    if strange:
        raise OpenVisionError(f"the class {strange[0]!r} is not among those of {train}: a probe cannot have learnt it")
    return np.array([position[name] for name in own], dtype=np.int64)[labels]


class Knn(Probe):
    """`top1`, `mean_per_class` by the nearest training pictures."""

    kind: Literal["knn"] = "knn"
    k: PositiveInt = NEIGHBOURS

    def measure(self, subject: Subject, root: str | Path) -> Measured:
        """Each process answers for its slice of the pictures."""
        result = Measured()
        (bank, known), classes = self._known(subject, root, result)
        queries, labels = self._asked(subject, root, result, classes)
        mine = np.array(subject.processes.rows(len(labels)), dtype=np.int64)
        own = nearest_neighbours(bank, known, queries[mine], self.k) if len(mine) else mine
        predicted = subject.processes.gather_rows(own, len(labels))
        result.facts = {"pictures": len(labels), "train": len(known), "classes": len(classes), "k": self.k}
        result.details |= per_class(np.where(predicted == labels, 0, 1), predicted, labels, classes)
        return self._finish(result, predicted, labels)


class LinearProbe(Probe):
    """`top1`, `mean_per_class` of a logistic regression on the frozen pooled features."""

    kind: Literal["linear_probe"] = "linear_probe"
    validation: str | None = None
    """Data to choose the strength on; by default a tenth of the training pictures."""

    def measure(self, subject: Subject, root: str | Path) -> Measured:
        """Sweep shared among processes, one final fit."""
        result = Measured()
        train, classes = self._known(subject, root, result)
        check = None
        if self.validation is not None:
            held = open_labelled(self.validation, root, self)
            features, labels = _encode(subject, held, result)
            check = features, _renumbered(labels, held.classes, classes, self.train)
        queries, labels = self._asked(subject, root, result, classes)
        found = linear_probe(train, check, queries, subject.processes)
        result.facts = {"pictures": len(labels), "train": len(train[1]), "classes": len(classes), "C": found.strength}
        result.details["sweep"] = [[strength, accuracy] for strength, accuracy in found.validation.items()]
        result.details |= per_class(np.where(found.predicted == labels, 0, 1), found.predicted, labels, classes)
        return self._finish(result, found.predicted, labels)


class FewShot(Probe):
    """`top1_1shot`, `top1_5shot`, ...: mean over several draws of the shots."""

    kind: Literal["few_shot"] = "few_shot"
    shots: tuple[PositiveInt, ...] = (1, 5, 10)
    draws: PositiveInt = 3

    def measure(self, subject: Subject, root: str | Path) -> Measured:
        """A picture's outcome is the share of draws that named it rightly."""
        result = Measured()
        train, classes = self._known(subject, root, result)
        queries, labels = self._asked(subject, root, result, classes)
        for shots in self.shots:
            hits = [few_shot(train, queries, shots, seed) == labels for seed in range(self.draws)]
            result.add(f"top1_{shots}shot", Outcomes.of(np.mean(hits, axis=0), result.arrays["rows"]))
        result.facts = {"pictures": len(labels), "train": len(train[1]), "classes": len(classes), "draws": self.draws}
        return result
