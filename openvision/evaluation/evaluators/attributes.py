"""What frozen features tell of an image: one attribute of the samples, read by linear probes, beside its baselines.

The field of the samples decides what is asked. A word ("background": "blue") is one of several. A list ("objects":
["cat", "bus"]) is a set: which are present, as many answers as there are. An object ("places": {"cat": "left"}) is one
of several for each of its keys: where is the cat? Images without the field are left out.

The probes are ridge regressions on indicators, solved in closed form; to choose one of several names, linear
discriminants of what they fit. Their penalty is chosen on a tenth of the images they learn from. They read the pooled
vector, or the patch tokens averaged in 4 x 4 cells.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt

from openvision.data.shards.store import join_folder
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import ImageSet, ShardImages, spread, take
from openvision.evaluation.data.prompts import classifier, protocol
from openvision.evaluation.evaluators.base import Measured, TrainedEvaluator
from openvision.evaluation.evaluators.baselines import constant_scores, neighbour_scores, pixel_vectors
from openvision.evaluation.evaluators.model import EvaluatedModel, Features
from openvision.evaluation.metrics.bootstrap import Outcomes, interval
from openvision.evaluation.metrics.linear import LinearModel, choose, fit_discriminants, fit_ridge
from openvision.evaluation.metrics.ranks import similarity

Scores = NDArray[np.float32]
# Strongest regularisation first.
PENALTIES = (100.0, 10.0, 1.0, 0.1, 0.01)
NEIGHBOURS = 10
# What tells neighbours' equal votes apart: how frequent an answer is.
_FREQUENCY = 1e-3


class Attribute(ABC):
    """What is asked: which columns of scores there are, and which answers are right."""

    metric: ClassVar[str] = "top1"
    names: list[str]

    @abstractmethod
    def targets(self, values: Sequence[object]) -> Scores:
        """Indicators (n, K) of what is true of n images."""

    @abstractmethod
    def outcomes(self, scores: Scores, values: Sequence[object], units: NDArray[np.int64]) -> Outcomes:
        """How right the answers are that scores (n, K) give; `units` (n,) number the images."""

    @abstractmethod
    def chance(self, values: Sequence[object]) -> float:
        """What guesses reach on average."""

    def fit(
        self, features: Features, values: Sequence[object], penalties: Sequence[float], device: torch.device
    ) -> list[LinearModel]:
        """A probe of features (n, D) for each penalty."""
        return fit_ridge(features, self.targets(values), penalties, device)


class OneOf(Attribute):
    """One of several names."""

    def __init__(self, values: Sequence[object]) -> None:
        self.names = sorted({str(value) for value in values})
        self.number = {name: index for index, name in enumerate(self.names)}

    def targets(self, values: Sequence[object]) -> Scores:
        """Indicators (n, names)."""
        return np.eye(len(self.names), dtype=np.float32)[self.labels(values)]

    def labels(self, values: Sequence[object]) -> NDArray[np.int64]:
        """Class numbers (n,)."""
        return np.array([self.number[str(value)] for value in values], dtype=np.int64)

    def outcomes(self, scores: Scores, values: Sequence[object], units: NDArray[np.int64]) -> Outcomes:
        """Whether the name of the highest score is right."""
        return Outcomes.of(scores.argmax(axis=1) == self.labels(values), units)

    def chance(self, values: Sequence[object]) -> float:
        """One of the names."""
        return 1 / len(self.names)

    def fit(
        self, features: Features, values: Sequence[object], penalties: Sequence[float], device: torch.device
    ) -> list[LinearModel]:
        """Linear discriminants: a regression alone never answers a number between others."""
        return fit_discriminants(features, self.targets(values), penalties, device)


class AnyOf(Attribute):
    """A set of names; the answer for an image with k of them is the k names of the highest scores."""

    metric = "recall"

    def __init__(self, values: Sequence[object]) -> None:
        self.names = sorted({name for value in values for name in cast("list[str]", value)})
        self.number = {name: index for index, name in enumerate(self.names)}

    def targets(self, values: Sequence[object]) -> Scores:
        """Indicators (n, names)."""
        found = np.zeros((len(values), len(self.names)), dtype=np.float32)
        for row, value in enumerate(values):
            found[row, [self.number[name] for name in cast("list[str]", value)]] = 1
        return found

    def outcomes(self, scores: Scores, values: Sequence[object], units: NDArray[np.int64]) -> Outcomes:
        """The share of the true names among as many of the highest scores."""
        order = np.argsort(-scores, axis=1, kind="stable")
        truth = self.targets(values)
        shares = [own[best[: int(own.sum())]].mean() for own, best in zip(truth, order, strict=True)]
        return Outcomes.of(np.array(shares), units)

    def chance(self, values: Sequence[object]) -> float:
        """As many names as there are, by lot."""
        return float(self.targets(values).sum(axis=1).mean() / len(self.names))

    def any_first(self, scores: Scores, values: Sequence[object], units: NDArray[np.int64]) -> Outcomes:
        """Whether the name of the highest score is present."""
        return Outcomes.of(self.targets(values)[np.arange(len(scores)), scores.argmax(axis=1)], units)


class OneOfEach(Attribute):
    """One of several names for each key of an image: which, given the key.

    A score is that of the name with this key plus that of the name with any: how the image is divided is learnt from
    all keys.
    """

    def __init__(self, values: Sequence[object]) -> None:
        pairs = [pair for value in values for pair in cast("dict[str, str]", value).items()]
        self.keys, self.names = (sorted({pair[side] for pair in pairs}) for side in (0, 1))
        self.key_number = {key: index for index, key in enumerate(self.keys)}
        self.number = {name: index for index, name in enumerate(self.names)}

    def targets(self, values: Sequence[object]) -> Scores:
        """Indicators (n, keys * names + names): each key with its name, then the names of any key."""
        found = np.zeros((len(values), (len(self.keys) + 1) * len(self.names)), dtype=np.float32)
        for row, key, name in self._triples(values):
            found[row, key * len(self.names) + name] = 1
            found[row, len(self.keys) * len(self.names) + name] = 1
        return found

    def _triples(self, values: Sequence[object]) -> list[tuple[int, int, int]]:
        return [
            (row, self.key_number[key], self.number[name])
            for row, value in enumerate(values)
            for key, name in cast("dict[str, str]", value).items()
        ]

    def outcomes(self, scores: Scores, values: Sequence[object], units: NDArray[np.int64]) -> Outcomes:
        """Whether the name is right, for every key of every image."""
        folded = scores.reshape(len(scores), len(self.keys) + 1, len(self.names))
        rows, keys, names = np.array(self._triples(values)).T
        answers = (folded[rows, keys] + folded[rows, -1]).argmax(axis=1)
        return Outcomes.of(answers == names, units[rows])

    def chance(self, values: Sequence[object]) -> float:
        """One of the names."""
        return 1 / len(self.names)


@dataclass(frozen=True)
class Asked:
    """Images with their values of the attribute."""

    images: ImageSet
    values: list[object]
    """(n,), None for an image without one."""

    def of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.bool_], list[object], NDArray[np.int64]]:
        """Of the images that were decoded: which have a value (r,), these values, and the images' numbers."""
        having = np.array([self.values[row] is not None for row in rows], dtype=np.bool_)
        return having, [self.values[row] for row in rows[having]], rows[having]


class AttributeProbe(TrainedEvaluator):
    """`pooled_top1`, `patches_top1` by linear probes, and the same of `chance`, `majority`, `pixels10`, `untrained`.

    For sets the metric is `recall`: the share of an image's true names among as many answers. With `prompts` the text
    tower is asked too: `zero_shot_top1`; for sets `zero_shot_recall`, and `zero_shot_top1` says whether the first
    answer is present. `untrained` is the same tower with initial parameters, `pixels10` the nearest training images by
    pixels.
    """

    needs_text: ClassVar[bool] = False
    kind: Literal["attribute_probe"] = "attribute_probe"
    label: str
    """Json field of the samples."""
    train_limit: PositiveInt | None = None
    """Learn from about so many images, evenly spread."""
    prompts: str | tuple[str, ...] | None = None
    """As in `zero_shot`; not asked by default."""
    baselines: bool = True
    """Measure the baselines too."""

    def missing(self, root: str | Path) -> str | None:
        """A folder, or the field where no sample has it."""
        if (path := super().missing(root)) is not None:
            return path
        lacking = [data for data in (self.train, self.data) if not any(_values(data, root, self.label))]
        return f"the field {self.label!r} in the samples of {join_folder(root, lacking[0])}" if lacking else None

    def measure(self, model: EvaluatedModel, root: str | Path) -> Measured:
        """Learn from `train`, answer for every image of `data` that can be decoded and has the attribute."""
        known, asked = self._open(self.train, root, self.train_limit), self._open(self.data, root, self.limit)
        attribute = self._attribute(known, asked)
        result = Measured(data={one.images.name: one.images.identity for one in (asked, known)})
        for name in ("pooled", "patches"):
            self._probe(result, "", name, attribute, model, known, asked)
        if self.prompts is not None and model.has_text:
            self._ask_texts(result, attribute, model, asked, root)
        if self.baselines:
            for name in ("pooled", "patches"):
                self._probe(result, "untrained_", name, attribute, model.untrained(), known, asked)
            self._baselines(result, attribute, model, known, asked)
        return result

    def _open(self, data: str, root: str | Path, limit: int | None) -> Asked:
        values = _values(data, root, self.label)
        images = ShardImages(join_folder(root, data)).images()
        if limit is None or limit >= len(images):
            return Asked(images, values)
        rows = spread(len(images), limit)
        return Asked(take(images, rows), [values[row] for row in rows])

    def _attribute(self, known: Asked, asked: Asked) -> Attribute:
        """What the values ask; raises OpenVisionError for values that no probe can be asked about.

        A name that is only asked for is among the answers: a probe that never saw it is wrong.
        """
        values, others = ([value for value in one.values if value is not None] for one in (known, asked))
        if not values or not others:
            nowhere = known if not values else asked
            raise OpenVisionError(f"{nowhere.images.name}: no sample has the field {self.label!r}; name another label")
        kinds: dict[type, type[OneOf | AnyOf | OneOfEach]] = {str: OneOf, list: AnyOf, dict: OneOfEach}
        chosen = kinds.get(type(values[0]))
        strange = [value for value in (*values, *others) if chosen is None or type(value) is not type(values[0])]
        if chosen is None or strange:
            raise OpenVisionError(
                f"{known.images.name}: {self.label!r} is {strange[0]!r}; an attribute is a text, a list of texts, or "
                "an object of texts, the same in every sample"
            )
        if not set(chosen(others).names) & set(chosen(values).names):
            raise OpenVisionError(
                f"no value of {self.label!r} in {self.data} is one in {self.train}: a probe cannot have learnt it"
            )
        return chosen([*values, *others])

    def _probe(
        self,
        result: Measured,
        prefix: str,
        name: str,
        attribute: Attribute,
        model: EvaluatedModel,
        known: Asked,
        asked: Asked,
    ) -> None:
        """Fit on features of `train`, once for all sets that are measured, and answer."""
        key = ("attribute", name, self.label, known.images.identity, tuple(attribute.names))
        probe, penalty, learnt = model.keep(key, partial(self._fit, attribute, model, name, known))
        features, having, values, units = _features(model, name, asked)
        found = attribute.outcomes(probe.scores(features[having]), values, units)
        metric = f"{prefix}{name}_{attribute.metric}"
        if prefix:
            result.values[metric], result.intervals[metric] = found.mean, interval(found)
            return
        result.add(metric, found)
        result.facts |= {"images": len(units), "train": learnt, "classes": len(attribute.names)}
        result.facts |= {f"{name}_penalty": penalty, "rejected": len(asked.images) - len(features)}

    def _fit(
        self, attribute: Attribute, model: EvaluatedModel, name: str, known: Asked
    ) -> tuple[LinearModel, float, int]:
        features, having, values, units = _features(model, name, known)
        own = features[having]
        held = np.random.default_rng(0).permutation(len(own)) < max(len(own) // 10, 1)

        def some(rows: NDArray[np.bool_]) -> list[object]:
            return [values[row] for row in np.flatnonzero(rows)]

        chosen = choose(
            lambda rows, penalties: attribute.fit(own[rows], some(rows), penalties, model.device),
            lambda probe, rows: attribute.outcomes(probe.scores(own[rows]), some(rows), units[rows]).mean,
            held,
            PENALTIES,
        )
        return *chosen, len(own)

    def _ask_texts(
        self, result: Measured, attribute: Attribute, model: EvaluatedModel, asked: Asked, root: str | Path
    ) -> None:
        if isinstance(attribute, OneOfEach):
            raise OpenVisionError(f"{self.label!r} holds objects, which prompts cannot ask about; leave `prompts` out")
        how = protocol(self.prompts or "plain", None if "://" in str(root) else Path(root))
        texts = classifier(model.texts, attribute.names, how)
        encoded, images = model.embeds(asked.images)
        having, values, units = asked.of(encoded.rows)
        scores = similarity(images[having], texts)
        if isinstance(attribute, AnyOf):
            result.add("zero_shot_top1", attribute.any_first(scores, values, units))
        result.add(f"zero_shot_{attribute.metric}", attribute.outcomes(scores, values, units))
        result.facts |= {"prompts": how.name, "templates": len(how.templates)}

    def _baselines(
        self, result: Measured, attribute: Attribute, model: EvaluatedModel, known: Asked, asked: Asked
    ) -> None:
        known_rows, known_pixels = model.thumbnails(known.images)
        rows, pixels = model.thumbnails(asked.images)
        known_having, known_values, _ = known.of(known_rows)
        having, values, units = asked.of(rows)
        targets = attribute.targets(known_values)
        near = neighbour_scores(
            pixel_vectors(pixels)[having], pixel_vectors(known_pixels)[known_having], targets, NEIGHBOURS
        )
        majority = constant_scores(targets, len(values))
        result.values[f"chance_{attribute.metric}"] = attribute.chance(values)
        for name, scores in (
            ("majority", majority),
            (f"pixels{NEIGHBOURS}", (near + _FREQUENCY * majority).astype(np.float32)),
        ):
            found = attribute.outcomes(scores, values, units)
            metric = f"{name}_{attribute.metric}"
            result.values[metric], result.intervals[metric] = found.mean, interval(found)


def _values(data: str, root: str | Path, label: str) -> list[object]:
    """The attribute of every sample, None where it is empty or absent."""
    return [value or None for value in ShardImages(join_folder(root, data)).values(label)]


def _features(
    model: EvaluatedModel, name: str, asked: Asked
) -> tuple[Features, NDArray[np.bool_], list[object], NDArray[np.int64]]:
    """Features of the decoded images (r, D), which of them have the attribute, their values and numbers."""
    encoded = model.encode(asked.images, cells=True)
    having, values, units = asked.of(encoded.rows)
    cells = encoded.cells if encoded.cells is not None else encoded.pooled
    return encoded.pooled if name == "pooled" else cells, having, values, units
