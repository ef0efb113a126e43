"""Probes on features whose answer is known."""

import numpy as np
import pytest

from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.patch_probe import drawn, mean_iou
from openvision.evaluation.metrics.probes import few_shot, hold_out, linear_probe, nearest_neighbours


@pytest.fixture
def clusters():
    """Three classes as clouds round far apart centres, on scales that differ by a thousand."""
    generator = np.random.default_rng(0)
    centres = 6 * generator.normal(size=(3, 12))
    scales = np.logspace(-2, 1, 12)

    def cloud(count):
        labels = np.arange(count) % 3
        return ((centres[labels] + generator.normal(size=(count, 12))) * scales).astype(np.float32), labels

    return cloud(90), cloud(60)


def test_a_linear_probe_finds_what_is_linear(clusters) -> None:
    train, (test, labels) = clusters
    found = linear_probe(train, None, test)
    assert (found.predicted == labels).mean() > 0.97
    assert found.validation[found.strength] == max(found.validation.values())


def test_the_strength_is_chosen_on_the_validation_rows(clusters) -> None:
    train, (test, labels) = clusters
    generator = np.random.default_rng(1)
    noisy = (train[0], np.where(generator.random(90) < 0.4, generator.integers(0, 3, 90), train[1]))
    found = linear_probe(noisy, (test[:30], labels[:30]), test[30:], sweep=(1e-3, 1e3))
    assert found.strength == 1e-3
    assert found.validation[1e-3] > found.validation[1e3]


def test_held_out_rows_come_from_every_class() -> None:
    labels = np.array([0] * 40 + [1] * 10 + [2])
    held = hold_out(labels)
    assert [int(held[labels == one].sum()) for one in range(3)] == [4, 1, 0]
    assert np.array_equal(held, hold_out(labels))


def test_one_class_cannot_be_probed(clusters) -> None:
    (train, _), (test, _) = clusters
    with pytest.raises(OpenVisionError, match="at least two classes"):
        linear_probe((train, np.zeros(90, dtype=int)), None, test)


def test_neighbours_vote_by_nearness() -> None:
    bank = np.array([[1, 0], [0.9, 0.1], [0.9, -0.1], [0, 1.0]])
    labels = np.array([1, 0, 0, 2])
    asked = np.array([[1, 0], [0.1, 1.0]])
    assert nearest_neighbours(bank, labels, asked, k=1).tolist() == [1, 2]
    assert nearest_neighbours(bank, labels, asked, k=3, temperature=10.0).tolist() == [0, 2]
    # A sharp vote is the nearest one's.
    assert nearest_neighbours(bank, labels, asked, k=3, temperature=0.001).tolist() == [1, 2]
    # Length of a vector does not matter.
    assert nearest_neighbours(1000 * bank, labels, asked, k=1).tolist() == [1, 2]


def test_few_shots_grow_better_and_repeat(clusters) -> None:
    train, (test, labels) = clusters
    scores = [(few_shot(train, test, shots, 0) == labels).mean() for shots in (1, 10)]
    assert scores[0] > 0.5
    assert scores[1] > 0.95
    assert np.array_equal(few_shot(train, test, 5, 3), few_shot(train, test, 5, 3))
    # Labels need not be 0, 1, 2.
    assert set(few_shot((train[0], train[1] * 7 + 2), test, 10, 0)) <= {2, 9, 16}


def test_what_is_drawn_differs_from_the_ground() -> None:
    images = np.full((1, 3, 8, 10), 255, dtype=np.uint8)
    images[0, :, :4, :4] = 0
    images[0, 1, 4:, 4:6] = 200
    images[0, :, :4, 4:] = 250
    assert drawn(images, (255, 255, 255), 4).tolist() == [[True, False, False, True]]
    assert drawn(images, (0, 0, 0), 4).tolist() == [[False, True, True, True]]


def test_iou_is_the_mean_of_both_kinds() -> None:
    truth = np.array([[True, True, False, False], [False] * 4])
    answers = np.array([[True, False, False, False], [False] * 4])
    assert mean_iou(answers, truth).tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, 1.0])
