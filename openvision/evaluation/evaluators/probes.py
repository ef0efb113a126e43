"""Probes as evaluators: k nearest neighbours, linear probe, few-shot. They need no text tower."""

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import Labelled
from openvision.evaluation.data.options import LabelOptions, open_labelled
from openvision.evaluation.evaluators.base import Measured, TrainedEvaluator
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.evaluators.zero_shot import per_class
from openvision.evaluation.metrics.bootstrap import Outcomes, class_mean_interval
from openvision.evaluation.metrics.probes import NEIGHBOURS, few_shot, linear_probe, nearest_neighbours

FeaturesAndLabels = tuple[NDArray[np.float32], NDArray[np.int64]]


class Probe(TrainedEvaluator, LabelOptions):
    """What probes share: images to learn from and images to be asked about, with the same classes."""

    needs_text: ClassVar[bool] = False
    train_split: str = "train"
    """Split of a Hugging Face dataset to learn from."""
    train_limit: PositiveInt | None = None
    """Learn from about so many images, evenly spread."""

    def _known(self, model: EvaluatedModel, root: str | Path, result: Measured) -> tuple[FeaturesAndLabels, list[str]]:
        options = self.model_copy(update={"split": self.train_split})
        data = open_labelled(self.train, root, options, self.train_limit)
        return _encode(model, data, result), data.classes

    def _asked(
        self, model: EvaluatedModel, root: str | Path, result: Measured, classes: list[str]
    ) -> FeaturesAndLabels:
        data = open_labelled(self.data, root, self, self.limit)
        features, labels = _encode(model, data, result)
        result.arrays["rows"] = model.encode(data.images).rows
        return features, _renumbered(labels, data.classes, classes, self.train)

    def _finish(self, result: Measured, predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> Measured:
        hits = predicted == labels
        result.add("top1", Outcomes.of(hits, result.arrays["rows"]))
        result.values["mean_per_class"] = float(np.mean([hits[labels == one].mean() for one in np.unique(labels)]))
        result.intervals["mean_per_class"] = class_mean_interval(hits, labels)
        result.arrays |= {"label": labels, "predicted": predicted}
        return result


def _encode(model: EvaluatedModel, data: Labelled, result: Measured) -> FeaturesAndLabels:
    encoded = model.encode(data.images)
    result.data[data.images.name] = data.images.identity
    return encoded.pooled, data.labels[encoded.rows]


def _renumbered(labels: NDArray[np.int64], own: list[str], known: list[str], train: str) -> NDArray[np.int64]:
    """Class numbers of the asked set in the numbering of the known one."""
    position = {name: index for index, name in enumerate(known)}
    strange = [name for name in own if name not in position]
    if strange:
        raise OpenVisionError(f"the class {strange[0]!r} is not among those of {train}: a probe cannot have learnt it")
    return np.array([position[name] for name in own], dtype=np.int64)[labels]


class Knn(Probe):
    """`top1`, `mean_per_class` by the nearest training images."""

    kind: Literal["knn"] = "knn"
    k: PositiveInt = NEIGHBOURS

    def measure(self, model: EvaluatedModel, root: str | Path) -> Measured:
        """Each process answers for its slice of the images."""
        result = Measured()
        (bank, known), classes = self._known(model, root, result)
        queries, labels = self._asked(model, root, result, classes)
        mine = np.array(model.processes.rows(len(labels)), dtype=np.int64)
        own = nearest_neighbours(bank, known, queries[mine], self.k) if len(mine) else mine
        predicted = model.processes.gather_rows(own, len(labels))
        result.facts = {"images": len(labels), "train": len(known), "classes": len(classes), "k": self.k}
        result.details |= per_class(np.where(predicted == labels, 0, 1), predicted, labels, classes)
        return self._finish(result, predicted, labels)


class LinearProbe(Probe):
    """`top1`, `mean_per_class` of a logistic regression on the frozen pooled features."""

    kind: Literal["linear_probe"] = "linear_probe"
    validation: str | None = None
    """Data to choose the strength on; by default a tenth of the training images."""

    def measure(self, model: EvaluatedModel, root: str | Path) -> Measured:
        """Sweep shared among processes, one final fit."""
        result = Measured()
        train, classes = self._known(model, root, result)
        check = None
        if self.validation is not None:
            held = open_labelled(self.validation, root, self)
            features, labels = _encode(model, held, result)
            check = features, _renumbered(labels, held.classes, classes, self.train)
        queries, labels = self._asked(model, root, result, classes)
        found = linear_probe(train, check, queries, model.processes)
        result.facts = {"images": len(labels), "train": len(train[1]), "classes": len(classes), "C": found.strength}
        result.details["sweep"] = [[strength, accuracy] for strength, accuracy in found.validation.items()]
        result.details |= per_class(np.where(found.predicted == labels, 0, 1), found.predicted, labels, classes)
        return self._finish(result, found.predicted, labels)


class FewShot(Probe):
    """`top1_1shot`, `top1_5shot`, ...: mean over several draws of the shots."""

    kind: Literal["few_shot"] = "few_shot"
    shots: tuple[PositiveInt, ...] = (1, 5, 10)
    draws: PositiveInt = 3

    def measure(self, model: EvaluatedModel, root: str | Path) -> Measured:
        """An image's outcome is the share of draws that named it rightly."""
        result = Measured()
        train, classes = self._known(model, root, result)
        queries, labels = self._asked(model, root, result, classes)
        for shots in self.shots:
            hits = [few_shot(train, queries, shots, seed) == labels for seed in range(self.draws)]
            result.add(f"top1_{shots}shot", Outcomes.of(np.mean(hits, axis=0), result.arrays["rows"]))
        result.facts = {"images": len(labels), "train": len(train[1]), "classes": len(classes), "draws": self.draws}
        return result
