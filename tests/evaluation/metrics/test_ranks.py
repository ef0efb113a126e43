"""Ranks against cases computed by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from openvision.encoding import check_features
from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.baselines import best_ranks
from openvision.evaluation.evaluators.retrieval import retrieve
from openvision.evaluation.metrics import ranks as metrics
from openvision.evaluation.metrics.ranks import retrieval_ranks, target_ranks


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_ranks_by_hand() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.9, 0.1, 0.5]])
    assert target_ranks(scores, np.array([0, 1, 2])).tolist() == [0, 2, 1]


def test_ties_count_against_the_method() -> None:
    scores = np.array([[1.0, 1.0, 0.0], [0.5, 0.5, 0.5]])
    ranks = target_ranks(scores, np.array([0, 0]))
    assert ranks.tolist() == [1, 2]
    assert not (ranks < 1).any()


def test_a_constant_model_is_always_wrong_in_retrieval() -> None:
    same = unit(np.ones((7, 4)))
    result = retrieve(same, same).values
    assert result["t2i_r1"] == result["t2i_r5"] == result["i2t_r5"] == 0
    assert result["t2i_r10"] == 1


@settings(max_examples=30, deadline=None)
@given(arrays(np.float64, (6, 5), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])), st.randoms())
def test_permuting_candidates_changes_nothing(scores: np.ndarray, random) -> None:
    targets = np.array([0, 1, 2, 3, 4, 0])
    order = list(range(5))
    random.shuffle(order)
    moved = np.argsort(order)[targets]
    assert target_ranks(scores[:, order], moved).tolist() == target_ranks(scores, targets).tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_features_are_named(bad: float) -> None:
    features = np.zeros((4, 3), dtype=np.float32)
    features[2, 1] = bad
    with pytest.raises(OpenVisionError, match=r"1 of 4 image features .* row 2"):
        check_features(features, "image features")
    with pytest.raises(OpenVisionError, match="NaN"):
        retrieval_ranks(features, features)
    with pytest.raises(OpenVisionError, match="NaN"):
        target_ranks(features, np.zeros(4, dtype=int))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_retrieval_does_not_depend_on_the_chunk(chunk: int) -> None:
    rng = np.random.default_rng(0)
    images = unit(rng.normal(size=(11, 8)))
    texts = unit(np.repeat(images, 2, axis=0) + 0.8 * rng.normal(size=(22, 8)))
    # Twice the same text for two pictures: an exact tie across blocks.
    texts[4] = texts[19]
    owners = np.repeat(np.arange(11), 2)

    def found(size: int) -> dict[str, float]:
        return retrieve(images, texts, np.arange(11), owners, chunk=size).values

    assert found(chunk) == found(10_000)


@pytest.mark.parametrize("chunk", [1, 7, 64, 299, 300])
def test_duplicate_texts_tie_whatever_the_block(chunk: int) -> None:
    # Sums in float32 differ in their last bit from block to block, and break such ties by luck.
    images = unit(np.random.default_rng(1).normal(size=(300, 192)))
    texts = images.copy()
    texts[150:] = texts[:150]
    ranks = retrieval_ranks(images, texts, chunk=chunk)
    assert ranks[:150].tolist() == [1] * 150


def test_one_caption_an_image_equals_the_score_matrix() -> None:
    rng = np.random.default_rng(2)
    images, texts = unit(rng.normal(size=(20, 6))), unit(rng.normal(size=(20, 6)))
    scores = (images.astype(np.float64) @ texts.astype(np.float64).T).astype(np.float32)
    own = np.arange(20)
    assert retrieval_ranks(images, texts).tolist() == target_ranks(scores, own).tolist()
    assert retrieval_ranks(images, texts).tolist() == best_ranks(scores, own).tolist()
    assert retrieval_ranks(texts, images).tolist() == target_ranks(scores.T, own).tolist()


def test_several_captions_an_image() -> None:
    images = np.eye(3, dtype=np.float32)
    # Image 0 has two captions, one of them far away; image 1's caption lies nearer to image 2.
    texts = unit(np.array([[1, 0, 0], [0, 0.2, 1], [0, 0.6, 0.8], [0, 0.1, 1]]))
    owners = np.array([0, 0, 1, 2])
    # Text to image: texts 0 and 3 find their image first; text 1 finds image 0 last; text 2 finds image 1 second.
    assert retrieval_ranks(texts, images, owners, np.arange(3)).tolist() == [0, 2, 1, 0]
    # Image to text: image 0 by its first caption; image 1 by caption 2; image 2's caption is first.
    assert retrieval_ranks(images, texts, np.arange(3), owners).tolist() == [0, 0, 0]
    result = retrieve(images, texts, np.arange(3), owners).values
    assert result["t2i_r1"] == 0.5
    assert result["i2t_r1"] == 1
    assert best_ranks((texts @ images.T).T, owners).tolist() == [0, 0, 0]


def test_own_captions_do_not_stand_in_each_others_way() -> None:
    images = np.eye(2, dtype=np.float32)
    texts = unit(np.array([[1, 0], [0.9, 0.1], [0.8, 0.6]]))
    # Image 1's only caption is beaten by none of image 0's for image 1, and image 0's two captions rank first.
    assert retrieval_ranks(images, texts, np.arange(2), np.array([0, 0, 1])).tolist() == [0, 0]


def test_a_text_without_its_image_is_an_error() -> None:
    images = np.eye(2, dtype=np.float32)
    with pytest.raises(OpenVisionError, match="query 1 has no right answer"):
        retrieval_ranks(images, images, np.array([0, 9]), np.arange(2))


def test_no_more_than_a_block_of_similarities_is_held(monkeypatch) -> None:
    shapes = []
    real = metrics.similarity

    def recording(a, b):
        shapes.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(metrics, "similarity", recording)
    generator = np.random.default_rng(0)
    images, texts = generator.normal(size=(90, 4)), generator.normal(size=(450, 4))
    owner = np.repeat(np.arange(90), 5)
    metrics.retrieval_ranks(texts, images, owner, np.arange(90), chunk=32)
    metrics.retrieval_ranks(images, texts, np.arange(90), owner, chunk=32)
    assert max(max(shape) for shape in shapes) == 32


def test_equal_texts_are_right_for_all_their_images():
    """A perfect model of class folders: every image at its class's text."""
    corners = np.eye(3, dtype=np.float32)
    classes = np.array([0, 1, 0, 2, 1, 0])
    perfect = retrieve(corners[classes], corners[classes], text_ids=classes).values
    assert {name: value for name, value in perfect.items() if name.endswith("_r1")} == {"t2i_r1": 1, "i2t_r1": 1}
    assert perfect["t2i_median"] == perfect["i2t_median"] == 1
    # Of a model that mixes two classes up nothing is right for them.
    wrong = np.array([1, 0, 2])[classes]
    found = retrieve(corners[wrong], corners[classes], text_ids=classes, chunk=2).values
    assert (found["t2i_r1"], found["i2t_r1"]) == (1 / 6, 1 / 6)


def test_an_image_with_several_texts_shares_only_those_that_are_equal():
    texts = np.eye(4, dtype=np.float32)[[0, 1, 1, 2, 3]]
    owner, numbers = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 2, 3])
    # Image 1 is where the text that it shares with image 0 is; image 2 where image 1's other text is.
    images = np.eye(4, dtype=np.float32)[[0, 1, 2]]
    found = retrieve(images, texts, np.arange(3), owner, text_ids=numbers)
    assert found.arrays["t2i_rank"].tolist() == [0, 0, 0, 2, 2]
    assert found.arrays["i2t_rank"].tolist() == [0, 0, 4]
    # With different texts it is the plain recall.
    plain = retrieve(images, texts, np.arange(3), owner)
    same = retrieve(images, texts, np.arange(3), owner, text_ids=np.arange(5))
    assert same.arrays["t2i_rank"].tolist() == plain.arrays["t2i_rank"].tolist()
    assert same.values == plain.values
