"""Intervals and significance by resampling images, with no assumption about how outcomes are distributed.

- A unit is an image with all its outcomes: the five captions of an image are drawn together or not at all, because
  they are right or wrong together.
- Resampling n units is drawing how often each occurs, one multinomial draw. Units with the same outcomes are
  interchangeable, so counts are drawn for the few distinct outcomes only: exactly the bootstrap, at a fraction of it.
- Two models measured on the same images are compared on the same draws (paired): what both find easy or hard
  cancels out.
- Seeds are fixed: the same outcomes give the same interval on every machine.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openvision.errors import OpenVisionError

DRAWS = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Outcomes:
    """The outcome of every query of a metric; its mean is the metric."""

    values: NDArray[np.float64]
    """(q,), usually 0 or 1."""
    units: NDArray[np.int64]
    """(q,), the image each belongs to."""

    def __post_init__(self) -> None:
        if len(self.values) == 0 or len(self.values) != len(self.units):
            raise OpenVisionError("outcomes need at least one value, and a unit for each")

    @staticmethod
    def of(values: NDArray, units: NDArray[np.integer] | None = None) -> "Outcomes":
        """Values with the units they belong to; without, each is its own."""
        own = np.arange(len(values)) if units is None else units
        return Outcomes(np.asarray(values, dtype=np.float64), np.asarray(own, dtype=np.int64))

    @property
    def mean(self) -> float:
        """The metric itself."""
        return float(self.values.mean())

    def by_unit(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Units, the sum of each one's values, and how many it has."""
        units, place = np.unique(self.units, return_inverse=True)
        sums = np.bincount(place, weights=self.values).astype(np.float64)
        return units, sums, np.bincount(place).astype(np.float64)


@dataclass(frozen=True)
class Difference:
    """How much better one model is than another on the same images."""

    value: float
    """Mean of the first minus mean of the second."""
    low: float
    high: float
    """95 % interval of the difference."""
    p: float
    """Two-sided: how often chance alone would give a difference as large."""
    images: int

    @property
    def significant(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def interval(outcomes: Outcomes, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval (percentiles) of the mean."""
    _, sums, counts = outcomes.by_unit()
    return _percentiles(_means(np.stack([sums, counts], axis=1), draws, seed))


def difference(first: Outcomes, second: Outcomes, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Paired bootstrap of `first` minus `second`; raises OpenVisionError unless both are about the same queries."""
    if not np.array_equal(first.units, second.units):
        raise OpenVisionError("the two were not measured on the same images: they cannot be compared in pairs")
    units, sums, counts = first.by_unit()
    _, others, _ = second.by_unit()
    drawn = _means(np.stack([sums - others, counts], axis=1), draws, seed)
    low, high = _percentiles(drawn)
    # One is added to both: a bootstrap of finite size never shows that something is impossible.
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return Difference(first.mean - second.mean, low, high, min(1.0, 2 * (tail + 1) / (draws + 1)), len(units))


def _means(rows: NDArray[np.float64], draws: int, seed: int) -> NDArray[np.float64]:
    """Means of resampled units: rows (n, 2) of sum and count -> (draws,)."""
    kinds, frequency = np.unique(rows, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(rows), frequency / len(rows), size=draws)
    return (drawn @ kinds[:, 0]) / (drawn @ kinds[:, 1])


def class_mean_interval(
    hits: NDArray[np.bool_], labels: NDArray[np.integer], draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean over classes of each class's share of hits; a class not drawn does not count."""
    classes = int(labels.max()) + 1
    right = np.bincount(labels[hits], minlength=classes)
    wrong = np.bincount(labels, minlength=classes) - right
    share = np.concatenate([right, wrong]) / len(labels)
    generator = np.random.default_rng(seed)
    result = np.empty(draws)
    for draw in range(draws):
        counts = generator.multinomial(len(labels), share).reshape(2, classes)
        total = counts.sum(axis=0)
        result[draw] = (counts[0][total > 0] / total[total > 0]).mean()
    return _percentiles(result)


def _percentiles(drawn: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
