"""Baselines without learning on toy data whose answers are known."""

import numpy as np
import pytest

from openvision.evaluation.evaluators.baselines import (
    chance,
    constant_scores,
    neighbour_scores,
    one_hot,
    pixel_vectors,
    word_overlap,
)
from openvision.evaluation.metrics.ranks import target_ranks


def test_pixel_vectors_ignore_brightness_and_contrast() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 100, (1, 3, 4, 4), dtype=np.uint8)
    pair = pixel_vectors(np.concatenate([image, 2 * image + 20]))
    assert pair[0] @ pair[1] == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(pair, axis=1) == pytest.approx([1, 1], abs=1e-6)


def test_a_blank_picture_is_similar_to_nothing() -> None:
    blank = pixel_vectors(np.full((1, 3, 4, 4), 255, dtype=np.uint8))
    assert not blank.any()


def test_word_overlap_prefers_rare_words() -> None:
    known = ["woman scientist", "woman", "woman dark skin", "man"]
    candidates = ["scientist", "woman", "zebra"]
    scores = word_overlap(known, candidates)
    assert scores[0, 0] > scores[0, 1] > 0
    assert scores[1, 1] == pytest.approx(1)
    assert not scores[:, 2].any()
    assert scores.max() <= 1 + 1e-6


def test_word_overlap_is_plain_jaccard_when_words_are_equally_rare() -> None:
    # Every word stands in one name.
    assert word_overlap(["a b", "c"], ["a b", "a", "c"])[0].tolist() == pytest.approx([1, 0.5, 0])


def test_the_nearest_picture_names_the_query() -> None:
    known = np.eye(3, dtype=np.float32)
    fits = np.array([[1.0, 0.0], [0.0, 1.0], [0.2, 0.2]])
    queries = np.array([[0.9, 0.1, 0.0], [0.1, 0.8, 0.2]], dtype=np.float32)
    assert neighbour_scores(queries, known, fits, 1).tolist() == [[1, 0], [0, 1]]


def test_several_neighbours_vote_by_similarity_and_enemies_are_silent() -> None:
    known = np.array([[1, 0], [0, 1], [-1, 0]], dtype=np.float32)
    fits = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    scores = neighbour_scores(np.array([[0.8, 0.6]], dtype=np.float32), known, fits, 10)
    assert scores[0].tolist() == pytest.approx([0.8, 0.6, 0.0])


def test_unnamed_candidates_tie_and_lose() -> None:
    # The neighbour's name shares no word with any candidate: nobody is right by luck of order.
    scores = neighbour_scores(np.eye(1, 2), np.eye(2), np.zeros((2, 5)), 1)
    assert target_ranks(scores, np.array([0])).tolist() == [4]


def test_constant_answer_and_chance() -> None:
    labels = one_hot(["a", "a", "b"], ["a", "b", "c"])
    scores = constant_scores(labels, 4)
    assert scores.shape == (4, 3)
    assert target_ranks(scores, np.array([0, 1, 2, 0])).tolist() == [0, 1, 2, 0]
    assert not one_hot(["unheard of"], ["a"]).any()
    assert (chance(1, 400), chance(5, 3)) == (0.0025, 1.0)
