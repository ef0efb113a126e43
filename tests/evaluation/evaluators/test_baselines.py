"""Baselines without learning on toy data whose answers are known."""

import numpy as np
import pytest

from openvision.data.shards.dataset import ShardWriter
from openvision.evaluation.evaluators.baselines import (
    Baselines,
    best_ranks,
    chance,
    constant_scores,
    neighbour_scores,
    one_hot,
    pixel_vectors,
    word_overlap,
)
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.metrics.ranks import target_ranks
from openvision.weights.folder import load_folder


def test_pixel_vectors_ignore_brightness_and_contrast() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 100, (1, 3, 4, 4), dtype=np.uint8)
    pair = pixel_vectors(np.concatenate([image, 2 * image + 20]))
    assert pair[0] @ pair[1] == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(pair, axis=1) == pytest.approx([1, 1], abs=1e-6)


def test_a_blank_image_is_similar_to_nothing() -> None:
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


def test_the_nearest_image_names_the_query() -> None:
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


@pytest.fixture
def model(fake_run) -> EvaluatedModel:
    loaded, _, _ = load_folder(fake_run / "model")
    return EvaluatedModel(loaded.vision)


def test_a_zero_shot_set_without_learning_and_without_a_text_tower(model, fake_data) -> None:
    names = Baselines(data="heldout_compositional", train="train", label="name").measure(model, fake_data)
    assert names.values["chance_top1"] == pytest.approx(1 / 12)
    assert names.values["majority_top1"] <= 1 / 12
    assert names.facts == {"images": 12, "train": 12, "rejected": 0, "classes": 12}
    groups = Baselines(data="heldout_compositional", train="train", label="category", match="exact")
    found = groups.measure(model, fake_data)
    assert found.values["chance_top1"] == pytest.approx(1 / 3)
    # The same shapes in the same places were trained on in other colours: pixels know the shape.
    assert found.values["pixels1_top1"] > found.values["chance_top1"]
    assert found.intervals.keys() == {f"{row}_top{k}" for row in ("majority", "pixels1", "pixels10") for k in (1, 5)}
    assert not found.outcomes, "there is nothing to compare between models"


def test_a_retrieval_set_with_several_captions(model, fake_data, tmp_path, picture) -> None:
    with ShardWriter(tmp_path / "train") as writer:
        for colour in ("red", "blue"):
            writer.write(
                colour, picture(colour, "bar"), "png", "", {"texts": [f"a {colour} bar", f"{colour} and flat"]}
            )
    found = Baselines(data="train", train="train", text="texts").measure(model, tmp_path)
    assert (found.values["chance_t2i_r1"], found.values["chance_i2t_r1"]) == (0.5, 0.5)
    # Every image is its own nearest neighbour.
    assert found.values["pixels1_t2i_r1"] == found.values["pixels1_i2t_r1"] == 1
    one = Baselines(data="train", train="train", text="texts", captions=1).measure(model, tmp_path)
    assert one.facts["texts"] == 2


def test_ranks_of_the_best_of_several_texts() -> None:
    scores = np.array([[0.1, 0.9, 0.5], [0.2, 0.3, 0.3]])
    assert best_ranks(scores, np.array([0, 0, 1])).tolist() == [0, 1]
