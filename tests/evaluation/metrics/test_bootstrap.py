"""Resampling: against the slow way, at the level it claims, paired and clustered."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvision.errors import OpenVisionError
from openvision.evaluation.metrics.bootstrap import Outcomes, class_mean_interval, difference, interval


def slow_interval(values, units, draws=4000):
    """Resample units one by one."""
    generator = np.random.default_rng(1)
    groups = [values[units == unit] for unit in np.unique(units)]
    means = [
        np.concatenate([groups[i] for i in generator.integers(0, len(groups), len(groups))]).mean()
        for _ in range(draws)
    ]
    return np.quantile(means, [0.025, 0.975])


def test_equal_to_the_slow_way_with_several_values_an_image() -> None:
    generator = np.random.default_rng(0)
    units = np.repeat(np.arange(60), generator.integers(1, 6, 60))
    values = (generator.random(len(units)) < 0.2 + 0.6 * (units % 2)).astype(float)
    assert interval(Outcomes.of(values, units)) == pytest.approx(slow_interval(values, units), abs=0.015)


def test_captions_of_one_image_count_as_one() -> None:
    values = np.tile([0.0, 1.0], 50)
    alone = interval(Outcomes.of(values))
    together = interval(Outcomes.of(np.repeat(values, 5), np.repeat(np.arange(100), 5)))
    assert together == pytest.approx(alone, abs=0.01)


def test_about_95_of_100_intervals_hold_the_truth() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        low, high = interval(Outcomes.of(generator.random(150) < 0.3), draws=500)
        held += low <= 0.3 <= high
    assert 180 <= held <= 198


def test_pairs_see_what_separate_intervals_cannot() -> None:
    generator = np.random.default_rng(0)
    hard = generator.random(400) < 0.5
    first, second = hard.astype(float), hard.astype(float)
    second[np.flatnonzero(hard)[:20]] = 0
    found = difference(Outcomes.of(first), Outcomes.of(second))
    assert found.value == pytest.approx(0.05)
    assert found.significant
    assert found.p < 0.001
    # Alone, the two intervals overlap widely.
    assert interval(Outcomes.of(second))[1] > interval(Outcomes.of(first))[0]


def test_equal_models_do_not_differ_and_signs_turn() -> None:
    values = np.tile([0.0, 1.0, 1.0], 30)
    same = difference(Outcomes.of(values), Outcomes.of(values))
    assert (same.value, same.low, same.high, same.p, same.significant) == (0, 0, 0, 1, False)
    other = values.copy()
    other[:9] = 0
    there, back = (difference(Outcomes.of(a), Outcomes.of(b)) for a, b in ((values, other), (other, values)))
    assert there.value == pytest.approx(-back.value)
    assert there.low == pytest.approx(-back.high, abs=0.01)


def test_noise_is_called_a_difference_rarely() -> None:
    generator = np.random.default_rng(3)
    small = [
        difference(Outcomes.of(generator.random(200) < 0.4), Outcomes.of(generator.random(200) < 0.4), 1000).p < 0.05
        for _ in range(200)
    ]
    assert sum(small) <= 20


@given(st.lists(st.booleans(), min_size=1, max_size=60))
@settings(max_examples=40, deadline=None)
def test_the_mean_lies_in_its_interval(values) -> None:
    low, high = interval(Outcomes.of(np.array(values, dtype=float)), draws=400)
    mean = float(np.mean(values))
    assert 0 <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= 1


def test_class_means_against_the_slow_way() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 120)
    hits = generator.random(120) < 0.2 + 0.15 * labels
    slow = []
    for _ in range(3000):
        rows = generator.integers(0, 120, 120)
        drawn, own = hits[rows], labels[rows]
        slow.append(np.mean([drawn[own == one].mean() for one in np.unique(own)]))
    assert class_mean_interval(hits, labels, 3000) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.015)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(OpenVisionError, match="not measured on the same images"):
        difference(Outcomes.of(np.ones(3)), Outcomes.of(np.ones(4)))
    with pytest.raises(OpenVisionError, match="at least one value"):
        Outcomes.of(np.array([]))
