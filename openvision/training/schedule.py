"""The learning rate: linear warm-up times cosine decay to 0 (spec section 5)."""

import math

from openvision.training.recipe import Stage


def learning_rate(stage: Stage, step: int) -> float:
    """Learning rate of the update after `step` finished updates of `stage`; the first one is 0 under warm-up."""
    total, warmup = stage.steps, stage.warmup_steps
    progress = min(max((step - warmup) / (total - warmup), 0.0), 1.0)
    ramp = min(1.0, step / warmup) if warmup else 1.0
    return stage.peak_learning_rate * ramp * 0.5 * (1 + math.cos(math.pi * progress))
