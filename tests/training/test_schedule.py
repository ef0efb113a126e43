"""Learning rates of the published stages (spec section 5)."""

import math

from openvision.recipe.sections import Stage
from openvision.training.optimizer import build

IMAGENET = 1_281_167
PRETRAIN = Stage(
    resolution=84,
    samples=10000 * IMAGENET,
    batch_size=32768,
    base_learning_rate=8e-6,
    warmup_samples=40 * IMAGENET,
)


def learning_rate(stage: Stage, step: int) -> float:
    return build.learning_rate(step, stage.steps, stage.warmup_steps, stage.peak_learning_rate)


def test_published_step_counts_and_peak():
    assert (PRETRAIN.steps, PRETRAIN.warmup_steps) == (390_981, 1563)
    assert math.isclose(PRETRAIN.peak_learning_rate, 1.024e-3)
    last = Stage(resolution=336, samples=200 * IMAGENET, batch_size=8192, base_learning_rate=1e-7)
    assert (last.steps, last.warmup_steps) == (31_278, 0)
    assert math.isclose(last.peak_learning_rate, 3.2e-6)


def test_warmup_starts_at_zero_and_reaches_the_peak():
    assert learning_rate(PRETRAIN, 0) == 0.0
    assert math.isclose(learning_rate(PRETRAIN, 1563), 1.024e-3)
    assert math.isclose(learning_rate(PRETRAIN, 521), 1.024e-3 / 3, rel_tol=1e-6)


def test_cosine_falls_to_zero():
    middle = 1563 + (390_981 - 1563) // 2
    assert math.isclose(learning_rate(PRETRAIN, middle), 1.024e-3 / 2, rel_tol=1e-6)
    assert learning_rate(PRETRAIN, 390_981) == 0.0


def test_without_warmup_the_first_update_has_the_peak():
    stage = Stage(resolution=8, samples=64, batch_size=8, base_learning_rate=0.32)
    assert learning_rate(stage, 0) == stage.peak_learning_rate == 0.01
