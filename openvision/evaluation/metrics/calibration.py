"""Whether a model is right as often as it is sure: expected calibration error and the reliability curve."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openvision.evaluation.metrics.ranks import similarity

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Reliability in bins of equal width; empty bins are left out."""

    error: float
    """Expected calibration error: |accuracy - confidence| averaged over images (Guo et al. 2017), 0 to 1."""
    interval: tuple[float, float]
    """95 %, bootstrap over images."""
    confidence: list[float]
    accuracy: list[float]
    count: list[int]


def confidences(images: NDArray[np.floating], classes: NDArray[np.floating], scale: float) -> NDArray[np.float64]:
    """Probability of each image's most probable class, (n,): softmax of the scaled cosines, in blocks."""
    result = np.empty(len(images))
    for start in range(0, len(images), 4096):
        rows = slice(start, start + 4096)
        logits = scale * similarity(images[rows], classes).astype(np.float64)
        result[rows] = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    return result


def calibration(confidence: NDArray[np.floating], hits: NDArray[np.bool_], draws: int = 1000) -> Calibration:
    """Calibration of n answers: how sure (0 to 1) and whether right."""
    place = np.minimum((np.asarray(confidence) * BINS).astype(int), BINS - 1)
    error = _error(place, confidence, hits, np.ones(len(place)))
    generator = np.random.default_rng(0)
    share = np.full(len(place), 1 / len(place))
    drawn = [_error(place, confidence, hits, generator.multinomial(len(place), share)) for _ in range(draws)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    count = np.bincount(place, minlength=BINS)
    kept = count > 0
    mean = np.bincount(place, weights=confidence, minlength=BINS)[kept] / count[kept]
    right = np.bincount(place, weights=hits, minlength=BINS)[kept] / count[kept]
    return Calibration(error, (float(low), float(high)), mean.tolist(), right.tolist(), count[kept].tolist())


def _error(
    place: NDArray[np.integer], confidence: NDArray[np.floating], hits: NDArray[np.bool_], weight: NDArray
) -> float:
    """|sum of (hit - confidence)| of every bin over the number of images."""
    gap = np.bincount(place, weights=weight * (hits - confidence), minlength=BINS)
    return float(np.abs(gap).sum() / weight.sum())
