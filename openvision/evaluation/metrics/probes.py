"""Probes of a frozen encoder on plain arrays: linear probe, nearest neighbours, few-shot.

Features are the pooled vectors (`Encoded.pooled`), standardised by the training set's mean and deviation where a
classifier is fitted.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from openvision.errors import OpenVisionError, require
from openvision.evaluation.metrics.linear import Array, Scaling
from openvision.evaluation.metrics.ranks import similarity
from openvision.runtime import SINGLE_PROCESS, Processes

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]

Labels = NDArray[np.integer]

# Inverse strengths of L2 regularisation that are tried.
SWEEP = tuple(10.0**power for power in range(-4, 3))
ITERATIONS = 1000
NEIGHBOURS = 20
TEMPERATURE = 0.07


@dataclass(frozen=True)
class Probed:
    """Answers of a linear probe."""

    predicted: NDArray[np.int64]
    strength: float
    """The C of the sweep that did best on the validation rows."""
    validation: dict[float, float]
    """Accuracy there by C."""


def hold_out(labels: Labels, share: float = 0.1, seed: int = 0) -> NDArray[np.bool_]:
    """Validation rows (n,) drawn from every class, at least one of each that has two."""
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held[members[: max(round(share * len(members)), 1) if len(members) > 1 else 0]] = True
    return held


def linear_probe(
    train: tuple[Array, Labels],
    validation: tuple[Array, Labels] | None,
    test: Array,
    processes: Processes | None = None,
    sweep: Sequence[float] = SWEEP,
) -> Probed:
    """Multinomial logistic regression by full-batch L-BFGS, its strength chosen on the validation rows.

    Without `validation` a tenth of the training rows of every class is held out for it. The answers come from a fit on
    both together. Each process tries its share of the sweep.
    """
    processes = processes or SINGLE_PROCESS
    features, labels = train
    if validation is None:
        held = hold_out(labels)
        fit, check = (features[~held], labels[~held]), (features[held], labels[held])
    else:
        fit, check = train, validation
    if len(np.unique(fit[1])) < 2:
        raise OpenVisionError("a linear probe needs training images of at least two classes")
    mine = [_accuracy(fit, check, sweep[index]) for index in processes.rows(len(sweep))]
    scores = processes.broadcast(processes.gather_rows(np.array(mine, dtype=np.float64), len(sweep)))
    # argmax takes the first: ties break toward stronger regularisation.
    best = int(scores.argmax())
    both = (np.concatenate([fit[0], check[0]]), np.concatenate([fit[1], check[1]]))
    scaling = Scaling.of(both[0])
    model = fit_logistic_regression(scaling(both[0]), both[1], sweep[best])
    found = dict(zip(map(float, sweep), map(float, scores), strict=True))
    return Probed(np.asarray(model.predict(scaling(test))).astype(np.int64), float(sweep[best]), found)


def _accuracy(fit: tuple[Array, Labels], check: tuple[Array, Labels], strength: float) -> float:
    scaling = Scaling.of(fit[0])
    model = fit_logistic_regression(scaling(fit[0]), fit[1], strength)
    return float((np.asarray(model.predict(scaling(check[0]))) == check[1]).mean())


def fit_logistic_regression(features: Array, labels: Labels, strength: float) -> "LogisticRegression":
    """Fit by full-batch L-BFGS; `strength` is the inverse of the L2 penalty."""
    library = require("sklearn.linear_model", extra="probe")
    with warnings.catch_warnings():
        # A weak regularisation may not converge in time; the sweep then judges what it found.
        warnings.simplefilter("ignore")
        return library.LogisticRegression(C=strength, solver="lbfgs", max_iter=ITERATIONS).fit(features, labels)


def nearest_neighbours(
    bank: Array, labels: Labels, queries: Array, k: int = NEIGHBOURS, temperature: float = TEMPERATURE
) -> NDArray[np.int64]:
    """Class of each query (n, D) by its `k` nearest of the bank (m, D), votes weighing exp(cosine / temperature)."""
    known, asked = _unit(bank), _unit(queries)
    classes = int(labels.max()) + 1
    k = min(k, len(bank))
    result = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), 1024):
        rows = slice(start, start + 1024)
        scores = similarity(asked[rows], known)
        nearest = _nearest(scores, k)
        near = np.take_along_axis(scores, nearest, axis=1).astype(np.float64)
        # Relative to the nearest: a low temperature must not overflow.
        weights = np.exp((near - near[:, :1]) / temperature)
        votes = np.zeros((len(nearest), classes))
        np.add.at(votes, (np.arange(len(nearest))[:, None], labels[nearest]), weights)
        result[rows] = votes.argmax(axis=1)
    return result


def _nearest(scores: Array, k: int) -> NDArray[np.int64]:
    """Columns of the `k` highest scores of each row, (n, k), highest first.

    Of equally near images the earlier one, on every machine.
    """
    found = np.sort(np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1)
    chosen = np.take_along_axis(scores, found, axis=1)
    found = np.take_along_axis(found, np.argsort(-chosen, axis=1, kind="stable"), axis=1)
    # Only where others are as near as the last one does a full sort decide differently.
    tied = (scores >= chosen.min(axis=1, keepdims=True)).sum(axis=1) > k
    found[tied] = np.argsort(-scores[tied], axis=1, kind="stable")[:, :k]
    return found


def _unit(features: Array) -> Array:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def few_shot(train: tuple[Array, Labels], test: Array, shots: int, seed: int) -> NDArray[np.int64]:
    """Answers of a ridge regression on `shots` images a class, drawn by lot; classes that have fewer give all.

    Solved in closed form in the space of the few images; the penalty is the number of features, so that it weighs
    as much as one image whatever the width.
    """
    features, labels = train
    generator = np.random.default_rng(seed)
    drawn = [generator.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    rows = np.concatenate(drawn)
    scaling = Scaling.of(features[rows])
    known, asked = scaling(features[rows]), scaling(test)
    classes = np.unique(labels)
    target = np.where(labels[rows][:, None] == classes[None, :], 1.0, -1.0)
    kernel = known @ known.T + known.shape[1] * np.eye(len(rows))
    # With few classes a constant is most of the answer: it is taken out and put back.
    constant = target.mean(axis=0)
    scores = asked @ (known.T @ np.linalg.solve(kernel, target - constant)) + constant
    return classes[scores.argmax(axis=1)].astype(np.int64)
