"""Class embeddings, candidates and templates."""

import numpy as np
import pytest

from openvision.encoding import PLAIN, check_templates, class_embeddings
from openvision.errors import OpenVisionError
from openvision.evaluation.data.prompts import PROMPTS
from openvision.evaluation.evaluators.zero_shot import answers, candidates_of, readable, summarize


def encode(texts) -> np.ndarray:
    """A text becomes the direction of its first letter, except prompts that begin with "x"."""
    rows = np.zeros((len(texts), 3), dtype=np.float32)
    for row, text in enumerate(texts):
        rows[row, {"a": 0, "b": 1}.get(text[0], 2)] = 1
    return rows


def test_templates_are_averaged_as_unit_vectors() -> None:
    classes = class_embeddings(encode, ["a", "b"], ("{}", "x {}"))
    half = 2**-0.5
    assert classes == pytest.approx(np.array([[half, 0, half], [0, half, half]]), abs=1e-6)


def test_names_with_braces_stay_as_they_are() -> None:
    seen = []
    class_embeddings(lambda texts: seen.extend(texts) or encode(texts), ["{0} %s"], ("a {}",))
    assert seen == ["a {0} %s"]


@pytest.mark.parametrize("templates", [(), ("no place",), ("{} and {}",)])
def test_bad_templates(templates) -> None:
    with pytest.raises(OpenVisionError, match="template"):
        check_templates(templates)


def test_our_own_templates_are_good_and_distinct() -> None:
    check_templates(PLAIN)
    check_templates(PROMPTS)
    assert len(set(PROMPTS)) == len(PROMPTS)


def test_candidates_are_sorted_and_unique() -> None:
    candidates, targets = candidates_of(["b", "a", "b"])
    assert candidates == ["a", "b"]
    assert targets.tolist() == [1, 0, 1]


def test_classification() -> None:
    images = np.eye(3, dtype=np.float32)
    ranks, predicted = answers(images, images[[0, 2, 1]], np.array([0, 1, 2]))
    assert ranks[0] == 0
    assert predicted.tolist() == [0, 2, 1]
    result = summarize(ranks, np.array([0, 1, 2]), np.arange(3))
    assert result.values["top1"] == pytest.approx(1 / 3)
    assert result.values["top5"] == 1


def test_identifiers_are_read_as_words() -> None:
    assert readable("people-body_&_hands") == "people body hands"
