"""Linear models on frozen features, fitted with torch on any device: logistic and ridge regression, discriminants.

Features are standardised by the training set's mean and deviation. The problems are convex: whatever the device, the
answer is the same to rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.floating]
ITERATIONS = 300
# The gradient of the mean loss at which a fit has converged, and the change of the loss that is none.
_GRADIENT, _CHANGE = 1e-5, 1e-8
_HISTORY = 20
# Directions in which fits vary less than by this share of the most are none: indicators sum to one.
_RANK = 1e-5


@dataclass(frozen=True)
class Scaling:
    """Mean and deviation of the training features."""

    mean: Array
    deviation: Array

    @staticmethod
    def of(features: Array) -> "Scaling":
        """From features (n, D); a feature that never varies is left as it is."""
        deviation = features.std(axis=0)
        return Scaling(features.mean(axis=0), np.where(deviation > 0, deviation, 1.0))

    def __call__(self, features: Array) -> NDArray[np.float64]:
        """Standardised features, float64."""
        return ((features - self.mean) / self.deviation).astype(np.float64)


@dataclass(frozen=True)
class LinearModel:
    """Scores of classes or labels, linear in standardised features."""

    scaling: Scaling
    weight: Tensor
    """(D, K), float32."""
    bias: Tensor
    """(K,)."""

    def scores(self, features: Array) -> NDArray[np.float32]:
        """Features (n, D) -> scores (n, K)."""
        scaled = _tensor(self.scaling(features), self.weight.device)
        return (scaled @ self.weight + self.bias).cpu().numpy()


def _tensor(values: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(device)


def fit_logistic(
    features: Array,
    labels: NDArray[np.integer],
    strengths: Sequence[float],
    device: torch.device | str = "cpu",
    classes: int | None = None,
) -> list[LinearModel]:
    """Multinomial logistic regressions of features (n, D) on labels (n,) in 0 .. `classes` - 1, one for each strength.

    `strength` is C as in scikit-learn: the inverse of the L2 penalty, beside the sum of the losses; for two classes,
    which share one vector there, it is halved. Full-batch L-BFGS; each fit starts from the one before, so ascending
    strengths are fast.
    """
    place = torch.device(device)
    scaling = Scaling.of(features)
    known, target = _tensor(scaling(features), place), torch.from_numpy(labels.astype(np.int64)).to(place)
    count = int(labels.max()) + 1 if classes is None else classes
    weight = torch.zeros(known.shape[1], count, device=place, requires_grad=True)
    bias = torch.zeros(count, device=place, requires_grad=True)
    found = []
    for strength in strengths:
        penalty = 1 / (2 * len(labels) * (strength / 2 if count == 2 else strength))
        _descend(known, target, weight, bias, penalty)
        found.append(LinearModel(scaling, weight.detach().clone(), bias.detach().clone()))
    return found


def _descend(known: Tensor, target: Tensor, weight: Tensor, bias: Tensor, penalty: float) -> None:
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        max_eval=2 * ITERATIONS,
        tolerance_grad=_GRADIENT,
        tolerance_change=_CHANGE,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(known @ weight + bias, target) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def fit_ridge(
    features: Array, targets: Array, penalties: Sequence[float], device: torch.device | str = "cpu"
) -> list[LinearModel]:
    """Ridge regressions of features (n, D) on targets (n, K), one for each penalty, in closed form.

    A penalty is relative to the mean square of a standardised feature, 1, whatever n and D.
    """
    place = torch.device(device)
    scaling = Scaling.of(features)
    known = _tensor(scaling(features), place)
    constant = targets.mean(axis=0)
    wanted = _tensor(targets - constant, place)
    n, width = known.shape
    # The smaller of the two equivalent systems: among features, or among images.
    primal = width <= n
    gram = (known.T @ known if primal else known @ known.T) / n
    right = known.T @ wanted / n if primal else wanted / n
    found = []
    for penalty in penalties:
        factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), device=place))
        solved = torch.cholesky_solve(right, factor)
        found.append(LinearModel(scaling, solved if primal else known.T @ solved, _tensor(constant, place)))
    return found


def fit_discriminants(
    features: Array, targets: Array, penalties: Sequence[float], device: torch.device | str = "cpu"
) -> list[LinearModel]:
    """Linear discriminants of classes, indicators (n, K), on what a ridge regression fits; one for each penalty.

    Regression alone never answers a class that lies between others, such as two between one and three; this is
    penalised discriminant analysis (Hastie, Buja and Tibshirani, 1995), still linear in the features.
    """
    found = []
    for ridge in fit_ridge(features, targets, penalties, device):
        fitted = ridge.scores(features).astype(np.float64)
        counts = targets.sum(axis=0)
        centres = targets.T @ fitted / np.maximum(counts, 1)[:, None]
        within = fitted - targets @ centres
        inverse = np.linalg.pinv(within.T @ within / len(fitted), rcond=_RANK, hermitian=True)
        # A class without a training image is no answer.
        with np.errstate(divide="ignore"):
            prior = np.log(counts / len(fitted))
        turn, shift = inverse @ centres.T, prior - 0.5 * np.einsum("kj,jl,kl->k", centres, inverse, centres)
        place = ridge.weight.device
        turned = ridge.bias @ _tensor(turn, place) + _tensor(shift, place)
        found.append(LinearModel(ridge.scaling, ridge.weight @ _tensor(turn, place), turned))
    return found


def choose(
    fit: Callable[[NDArray[np.bool_], Sequence[float]], Sequence[LinearModel]],
    judge: Callable[[LinearModel, NDArray[np.bool_]], float],
    held: NDArray[np.bool_],
    sweep: Sequence[float],
) -> tuple[LinearModel, float]:
    """The model fitted on all rows with the value of `sweep` that does best on the rows `held` out, and that value.

    `fit` fits on some rows with several values, `judge` says how well a model does on some rows. `sweep` goes from the
    strongest to the weakest regularisation: ties break toward stronger regularisation.
    """
    scores = [judge(model, held) for model in fit(~held, sweep)]
    best = sweep[int(np.argmax(scores))]
    return fit(np.ones_like(held), [best])[0], best
