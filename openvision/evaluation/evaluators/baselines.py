"""Training-free baselines: chance, the most frequent answer, and the nearest training images by their pixels.

On drawings pixels are strong, so a number of a trained model means little without these beside it. The pixel baseline
sees the labels or texts of the training images only; a new image gets those of its neighbours, and a candidate is
scored by the words it shares with them.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from openvision.evaluation.data.images import Captioned, Labelled
from openvision.evaluation.data.options import LabelOptions, TextOptions, open_captioned, open_labelled
from openvision.evaluation.evaluators.base import Measured, TrainedEvaluator
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.evaluators.retrieval import RECALLS, recalls
from openvision.evaluation.evaluators.zero_shot import candidates_of
from openvision.evaluation.metrics.bootstrap import Outcomes, interval
from openvision.evaluation.metrics.ranks import similarity, target_ranks

Scores = NDArray[np.float32]


class Baselines(TrainedEvaluator):
    """Every metric of a zero-shot or retrieval evaluator without learning: `chance_top1`, `majority_top1`, ...

    With `label` the metrics are `top1` and `top5`, with `text` recall both ways, with both all of them. Prefixes are
    `chance`, `majority` (one answer for all) and `pixels1`, `pixels10` (nearest neighbours). Nothing depends on the
    model but the size its images are prepared at.
    """

    needs_text: ClassVar[bool] = False
    kind: Literal["baselines"] = "baselines"
    label: str | None = None
    """As in `zero_shot`."""
    text: str | None = None
    """As in `retrieval`."""
    captions: PositiveInt | None = None
    """As in `retrieval`."""
    train_limit: PositiveInt | None = None
    """Learn from about so many images, evenly spread; all by default."""
    match: Literal["words", "exact"] = "words"
    """How well a training label fits a candidate: by the share of common words, or only when they are equal. With
    "exact" the classes of the training images are candidates too."""

    def measure(self, model: EvaluatedModel, root: str | Path) -> Measured:
        """Learn from `train`, answer for every image of `data` that can be decoded."""
        result = Measured()
        if self.label is not None:
            options = LabelOptions(label=self.label)
            asked = open_labelled(self.data, root, options, self.limit)
            self._classify(result, model, open_labelled(self.train, root, options, self.train_limit), asked)
        if self.text is not None:
            texts = TextOptions(text=self.text, captions=self.captions)
            known = open_captioned(self.train, root, texts, self.train_limit)
            self._retrieve(result, model, known, open_captioned(self.data, root, texts, self.limit))
        return result

    def _classify(self, result: Measured, model: EvaluatedModel, known: Labelled, asked: Labelled) -> None:
        pixels = _Pixels(model, known, asked, result)
        labels = asked.labels[pixels.rows]
        own = [known.classes[label] for label in known.labels[pixels.known_rows]]
        classes, place = candidates_of(asked.classes if self.match == "words" else [*asked.classes, *known.classes])
        fits = word_overlap(own, classes) if self.match == "words" else one_hot(own, classes)
        for k in (1, 5):
            result.values[f"chance_top{k}"] = chance(k, len(classes))
        for name, scores in pixels.scores(fits).items():
            ranks = target_ranks(scores, place[labels])
            _add(result, name, {f"top{k}": Outcomes.of(ranks < k, pixels.rows) for k in (1, 5)})
        result.facts |= {"classes": len(classes)}

    def _retrieve(self, result: Measured, model: EvaluatedModel, known: Captioned, asked: Captioned) -> None:
        pixels = _Pixels(model, known, asked, result)
        kept = np.isin(asked.owner, pixels.rows)
        texts = [text for text, keep in zip(asked.texts, kept, strict=True) if keep]
        owner = np.searchsorted(pixels.rows, asked.owner[kept])
        fits = _best_of_each(word_overlap(known.texts, texts), known.owner)[pixels.known_rows]
        for name, share in _chance_recalls(owner, len(pixels.rows)).items():
            result.values[f"chance_{name}"] = share
        for name, scores in pixels.scores(fits).items():
            text_to_image = target_ranks(scores.T, owner)
            _add(result, name, recalls("t2i", text_to_image, pixels.rows[owner]))
            _add(result, name, recalls("i2t", best_ranks(scores, owner), pixels.rows))
        result.facts |= {"texts": len(texts)}


class _Pixels:
    """Images to be asked about beside the training images, as pixel vectors."""

    def __init__(
        self, model: EvaluatedModel, known: Labelled | Captioned, asked: Labelled | Captioned, result: Measured
    ) -> None:
        self.known_rows, known_pixels = model.thumbnails(known.images)
        self.rows, pixels = model.thumbnails(asked.images)
        self.known, self.queries = pixel_vectors(known_pixels), pixel_vectors(pixels)
        result.data |= {one.images.name: one.images.identity for one in (asked, known)}
        rejected = len(asked) - len(self.rows)
        result.facts |= {"images": len(self.rows), "train": len(self.known_rows), "rejected": rejected}

    def scores(self, fits: Scores) -> dict[str, Scores]:
        """Scores (n, c) of the candidates by baseline; `fits` (m, c) says how well each training label fits them."""
        return {
            "majority": constant_scores(fits, len(self.queries)),
            "pixels1": neighbour_scores(self.queries, self.known, fits, 1),
            "pixels10": neighbour_scores(self.queries, self.known, fits, 10),
        }


def _add(result: Measured, name: str, outcomes: dict[str, Outcomes]) -> None:
    """Add values with intervals, without outcomes: baselines are the same for every model and need no comparison."""
    for metric, found in outcomes.items():
        result.values[f"{name}_{metric}"] = found.mean
        result.intervals[f"{name}_{metric}"] = interval(found)


def pixel_vectors(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """RGB images (n, 3, H, W), already shrunk to a few pixels -> mean-free unit vectors (n, 3 * H * W).

    An image of one colour becomes the zero vector, similar to nothing.
    """
    flat = images.reshape(len(images), -1).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    return (flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def word_overlap(known: Sequence[str], candidates: Sequence[str]) -> Scores:
    """Weighted Jaccard similarity of word sets, (len(known), len(candidates)).

    Words weigh by rarity among `known` (1 + ln((1 + n) / (1 + names that hold the word))): sharing "scientist" tells
    more than sharing "woman".
    """
    known_words, candidate_words = [_words(name) for name in known], [_words(name) for name in candidates]
    counts = Counter(word for name in known_words for word in name)
    vocabulary = {word: i for i, word in enumerate(sorted({w for n in (*known_words, *candidate_words) for w in n}))}
    weights = np.array([1 + math.log((1 + len(known)) / (1 + counts[word])) for word in vocabulary])
    left, right = _indicator(known_words, vocabulary), _indicator(candidate_words, vocabulary)
    shared = (left * weights) @ right.T
    either = (left @ weights)[:, None] + (right @ weights)[None, :] - shared
    return np.divide(shared, either, out=np.zeros_like(shared), where=either > 0).astype(np.float32)


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def _indicator(names: Sequence[frozenset[str]], vocabulary: dict[str, int]) -> NDArray[np.float64]:
    matrix = np.zeros((len(names), len(vocabulary)))
    for row, name in enumerate(names):
        matrix[row, [vocabulary[word] for word in name]] = 1
    return matrix


def _best_of_each(scores: Scores, owner: NDArray[np.integer]) -> Scores:
    """Rows of texts (t, c) -> rows of their images (n, c): the best of each image's texts."""
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    return np.maximum.reduceat(scores, starts, axis=0)


def neighbour_scores(
    queries: NDArray[np.floating], known: NDArray[np.floating], known_scores: NDArray[np.floating], k: int
) -> Scores:
    """Scores of candidates for each query: those of its `k` nearest known images, weighted by similarity.

    `queries` (n, P) and `known` (m, P) are unit vectors, `known_scores` (m, c) says how well each known image's label
    fits each candidate; result (n, c). Neighbours of negative similarity do not count. k = 1 takes the neighbour's row
    as it is.
    """
    k = min(k, len(known))
    similarities = similarity(queries, known)
    # Stable: of equally near images the earlier one, on every machine.
    nearest = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    if k == 1:
        return known_scores[nearest[:, 0]].astype(np.float32)
    weights = np.maximum(np.take_along_axis(similarities, nearest, axis=1), 0)
    return np.einsum("nk,nkc->nc", weights, known_scores[nearest]).astype(np.float32)


def constant_scores(known_scores: NDArray[np.floating], queries: int) -> Scores:
    """The same ranking for every query: how well a candidate fits the known labels on average; (queries, c)."""
    return np.tile(known_scores.mean(axis=0), (queries, 1)).astype(np.float32)


def one_hot(labels: Sequence[str], classes: Sequence[str]) -> Scores:
    """Rows of `classes` indicators, (len(labels), len(classes)); a label outside the classes is a row of zeros."""
    return (np.array(labels)[:, None] == np.array(classes)[None, :]).astype(np.float32)


def chance(k: int, candidates: int) -> float:
    """Expected top-k accuracy of a guess among `candidates`."""
    return min(1.0, k / candidates)


def _chance_recalls(owner: NDArray[np.integer], images: int) -> dict[str, float]:
    """Expected recall of guesses, where `owner` (m,) holds the image of every text."""
    own = Counter(owner.tolist()).values()

    def any_of_first(k: int, count: int) -> Fraction:
        """Probability that one of `count` texts is among the first k."""
        return 1 - Fraction(math.comb(len(owner) - count, k), math.comb(len(owner), k))

    found = {f"t2i_r{k}": chance(k, images) for k in RECALLS}
    for k in RECALLS:
        found[f"i2t_r{k}"] = float(sum(any_of_first(min(k, len(owner)), count) for count in own) / Fraction(images))
    return found


def best_ranks(scores: Scores, owner: NDArray[np.integer]) -> NDArray[np.int64]:
    """Rank, from 0, of each image's best own text among the texts of others; scores (n images, m texts)."""
    own = owner[None, :] == np.arange(len(scores))[:, None]
    best = np.where(own, scores, -np.inf).max(axis=1, keepdims=True)
    return (~own & (scores >= best)).sum(axis=1).astype(np.int64)
