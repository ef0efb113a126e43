"""Linear models whose answers are known, or that scikit-learn gives too."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from openvision.evaluation.metrics.linear import Scaling, choose, fit_discriminants, fit_logistic, fit_ridge


@pytest.fixture
def features():
    generator = np.random.default_rng(0)
    return generator.normal(2, 3, size=(200, 12)) * np.logspace(-2, 1, 12)


@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_regression_is_that_of_scikit_learn(features, classes):
    generator = np.random.default_rng(1)
    scaled = Scaling.of(features)(features)
    labels = (scaled[:, :classes] + generator.normal(size=(200, classes))).argmax(axis=1)
    for strength, model in zip((0.01, 1.0), fit_logistic(features, labels, (0.01, 1.0)), strict=True):
        theirs = LogisticRegression(C=strength, max_iter=1000, tol=1e-6).fit(scaled, labels).predict_proba(scaled)
        exponentials = np.exp(model.scores(features).astype(np.float64))
        assert exponentials / exponentials.sum(axis=1, keepdims=True) == pytest.approx(theirs, abs=2e-3)


@pytest.mark.parametrize("rows", [200, 8])
def test_ridge_regression_is_that_of_scikit_learn_with_more_features_than_rows_too(features, rows):
    known = features[:rows]
    targets = np.random.default_rng(2).normal(size=(rows, 3))
    scaling = Scaling.of(known)
    for penalty, model in zip((10.0, 0.1), fit_ridge(known, targets, (10.0, 0.1)), strict=True):
        theirs = Ridge(alpha=penalty * rows).fit(scaling(known), targets).predict(scaling(features))
        assert model.scores(features) == pytest.approx(theirs, abs=1e-3)


def test_discriminants_answer_a_class_that_lies_between_others():
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 5, 1000)
    line = labels[:, None] + 0.2 * generator.normal(size=(1000, 1))
    features = np.concatenate([line, generator.normal(size=(1000, 6))], axis=1)
    targets = np.eye(5)[labels]
    (ridge,), (discriminants,) = fit_ridge(features, targets, [0.1]), fit_discriminants(features, targets, [0.1])
    assert (ridge.scores(features).argmax(axis=1) == labels).mean() < 0.6
    assert (discriminants.scores(features).argmax(axis=1) == labels).mean() > 0.95


def test_a_class_without_images_is_no_answer(features):
    labels = np.arange(200) % 2
    (model,) = fit_discriminants(features, np.eye(3)[2 * labels], [1.0])
    assert set(model.scores(features).argmax(axis=1)) <= {0, 2}


def test_the_penalty_is_chosen_on_the_rows_held_out():
    generator = np.random.default_rng(4)
    features = generator.normal(size=(200, 100))
    targets = generator.normal(size=(200, 1))
    held = np.arange(200) < 40

    def error(model, rows):
        return -float(np.square(model.scores(features[rows]) - targets[rows]).mean())

    model, best = choose(
        lambda rows, penalties: fit_ridge(features[rows], targets[rows], penalties), error, held, (1e4, 1e-4)
    )
    # There is nothing to learn: the strongest penalty is best, and the last fit is on all rows.
    assert best == 1e4
    assert model.bias.item() == pytest.approx(targets.mean(), abs=1e-5)
