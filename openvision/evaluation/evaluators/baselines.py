"""What no learning at all reaches: chance, the most frequent answer, and the nearest training picture by its pixels.

On drawings pixels are strong, so a number of a trained model means little without these beside it. The pixel
baseline knows the names and groups of the training pictures only; it names a new picture by the words its neighbours'
names share with the candidates.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvision.evaluation.data.split import Split
from openvision.evaluation.evaluators.retrieval import RECALLS, retrieval_from_scores
from openvision.evaluation.evaluators.zero_shot import candidates_of, classification
from openvision.evaluation.metrics.ranks import similarity, target_ranks, with_interval, within
from openvision.images.preprocess import resize

PIXELS = 16
NEIGHBOURS = 10

Result = dict[str, Any]
Scores = NDArray[np.float32]


def words(text: str) -> frozenset[str]:
    """The lower-case words of a name, punctuation dropped."""
    return frozenset(re.findall(r"\w+", text.lower()))


def pixel_vectors(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """RGB pictures (n, 3, H, W), already shrunk to a few pixels -> mean-free unit vectors (n, 3 * H * W).

    A picture of one colour becomes the zero vector, similar to nothing.
    """
    flat = images.reshape(len(images), -1).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    return (flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def word_overlap(known: Sequence[str], candidates: Sequence[str]) -> NDArray[np.float32]:
    """Weighted Jaccard similarity of word sets, (len(known), len(candidates)).

    Words weigh by rarity among `known` (1 + ln((1 + n) / (1 + names that hold the word))): sharing "scientist" tells
    more than sharing "woman".
    """
    known_words, candidate_words = [words(name) for name in known], [words(name) for name in candidates]
    counts = Counter(word for name in known_words for word in name)
    vocabulary = {word: i for i, word in enumerate(sorted({w for n in (*known_words, *candidate_words) for w in n}))}
    weights = np.array([1 + math.log((1 + len(known)) / (1 + counts[word])) for word in vocabulary])
    left, right = _indicator(known_words, vocabulary), _indicator(candidate_words, vocabulary)
    shared = (left * weights) @ right.T
    either = (left @ weights)[:, None] + (right @ weights)[None, :] - shared
    return np.divide(shared, either, out=np.zeros_like(shared), where=either > 0).astype(np.float32)


def _indicator(names: Sequence[frozenset[str]], vocabulary: dict[str, int]) -> NDArray[np.float64]:
    matrix = np.zeros((len(names), len(vocabulary)))
    for row, name in enumerate(names):
        matrix[row, [vocabulary[word] for word in name]] = 1
    return matrix


def neighbour_scores(
    queries: NDArray[np.floating], known: NDArray[np.floating], known_scores: NDArray[np.floating], k: int
) -> NDArray[np.float32]:
    """Scores of candidates for each query: those of its `k` nearest known pictures, weighted by similarity.

    `queries` (n, P) and `known` (m, P) are unit vectors, `known_scores` (m, c) says how well each known picture's
    label fits each candidate; result (n, c). Neighbours of negative similarity do not count. k = 1 takes the
    neighbour's row as it is.
    """
    k = min(k, len(known))
    similarities = similarity(queries, known)
    # Stable: of equally near pictures the earlier one, on every machine.
    nearest = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    if k == 1:
        return known_scores[nearest[:, 0]].astype(np.float32)
    weights = np.maximum(np.take_along_axis(similarities, nearest, axis=1), 0)
    return np.einsum("nk,nkc->nc", weights, known_scores[nearest]).astype(np.float32)


def constant_scores(known_scores: NDArray[np.floating], queries: int) -> NDArray[np.float32]:
    """The same ranking for every query: how well a candidate fits the known labels on average; (queries, c)."""
    return np.tile(known_scores.mean(axis=0), (queries, 1)).astype(np.float32)


def one_hot(labels: Sequence[str], classes: Sequence[str]) -> NDArray[np.float32]:
    """Rows of `classes` indicators, (len(labels), len(classes)); a label outside the classes is a row of zeros."""
    column = np.array(classes)
    return (np.array(labels)[:, None] == column[None, :]).astype(np.float32)


def chance(k: int, candidates: int) -> float:
    """Expected top-k accuracy of a guess among `candidates`."""
    return min(1.0, k / candidates)


@dataclass(frozen=True)
class Known:
    """What the baselines know: names, alt-texts and groups of the training pictures, and their pixels."""

    vectors: NDArray[np.float32]
    names: list[str]
    alts: list[str]
    categories: list[str] | None


def thumbnails(split: Split) -> NDArray[np.uint8]:
    """The pictures shrunk for the pixel baseline: uint8 (n, 3, 16, 16)."""
    small = [resize(image, PIXELS, PIXELS) for image in split.images.permute(0, 2, 3, 1).contiguous().numpy()]
    return np.stack(small).transpose(0, 3, 1, 2)


def known_pictures(split: Split) -> Known:
    """The baselines' knowledge from the training split."""
    return Known(pixel_vectors(thumbnails(split)), split.names, split.alts, split.categories)


def evaluate_baselines(split: Split, known: Known) -> dict[str, Result]:
    """Results of chance, the constant answer and the pixel neighbours, in the keys of `evaluate_split`."""
    queries = pixel_vectors(thumbnails(split))
    rows: dict[str, Result] = {"chance": _chance_row(split, known)}
    rows["majority"] = _baseline_row(split, known, lambda scores: constant_scores(scores, len(split)))
    for k in (1, NEIGHBOURS):
        rows[f"pixel neighbour, k = {k}"] = _baseline_row(
            split, known, lambda scores, k=k: neighbour_scores(queries, known.vectors, scores, k)
        )
    return rows


def _chance_row(split: Split, known: Known) -> Result:
    candidates, samples = len(set(split.names)), len(split)
    row: Result = {f"top{k}": chance(k, candidates) for k in (1, 5)}
    for prefix in ("", "alt_"):
        row |= {f"{prefix}{way}_r{k}": chance(k, samples) for way in ("t2i", "i2t") for k in RECALLS}
    if split.categories is not None:
        row["category_top1"] = chance(1, len(set(split.categories).union(known.categories or ())))
    return row


def _baseline_row(split: Split, known: Known, score: Callable[[Scores], Scores]) -> Result:
    """`score` maps how well training labels fit candidates (m, c) to how well pictures do (n, c)."""
    candidates, targets = candidates_of(split.names)
    by_name = score(word_overlap(known.names, candidates))
    row: Result = classification(target_ranks(by_name, targets), split.categories)
    row |= retrieval_from_scores(by_name[:, targets])
    row |= retrieval_from_scores(score(word_overlap(known.alts, split.alts)), prefix="alt_")
    if split.categories is not None and known.categories is not None:
        groups = sorted(set(split.categories).union(known.categories))
        right = np.array([groups.index(category) for category in split.categories])
        ranks = target_ranks(score(one_hot(known.categories, groups)), right)
        row |= with_interval("category_top1", within(ranks, 1))
    return row
