"""Prompts: canonical forms, aliases, files, and the vector of a class."""

import json
import sys

import numpy as np
import pytest

from openvision.encoding import class_embeddings
from openvision.errors import OpenVisionError
from openvision.evaluation.data.prompts import Protocol, canonicalize, class_names, classifier, protocol


@pytest.mark.parametrize(
    ("text", "keep", "canonical"),
    [
        ("a close-up photo of the {}.", "{}", "a closeup photo of the {}"),
        ("A_bad  photo of a {}!", "{}", "a bad photo of a {}"),
        ("Great White, or: 'shark'", ",", "great white, or shark"),
        ("  {} ", "{}", "{}"),
        ("{it}", "", "it"),
    ],
)
def test_canonical_forms(text, keep, canonical) -> None:
    assert canonicalize(text, keep) == canonical


def test_aliases_are_names_of_their_own_in_the_original_protocol_only() -> None:
    original = Protocol("o", ("a photo of a {}.", "{}"), canonical=True)
    assert original.prompts("Tench, T._tinca,") == ["a photo of a tench", "tench", "a photo of a t tinca", "t tinca"]
    assert Protocol("p", ("a {}.",)).prompts("Tench, T.") == ["a Tench, T.."]


def encode(texts):
    """A vector of letter counts, unit length."""
    counts = np.array([[text.count(letter) + 0.1 for letter in "abcdefgh"] for text in texts], dtype=np.float32)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_a_class_is_the_mean_of_its_prompts() -> None:
    how = Protocol("p", ("{}", "a {}", "the big {}"), canonical=True)
    names = ["bad, cab", "deaf"]
    vectors = classifier(encode, names, how)
    mean = encode(["bad", "a bad", "the big bad", "cab", "a cab", "the big cab"]).mean(axis=0)
    assert vectors[0] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)
    plain = Protocol("p", ("{}", "a {}"))
    assert classifier(encode, names, plain) == pytest.approx(class_embeddings(encode, names, plain.templates), abs=1e-7)


def test_many_classes_are_encoded_a_part_at_a_time(monkeypatch) -> None:
    sizes = []

    def counting(texts):
        sizes.append(len(texts))
        return encode(texts)

    monkeypatch.setattr("openvision.evaluation.data.prompts._PROMPTS_AT_A_TIME", 5)
    how = Protocol("p", ("{}", "a {}"))
    names = [f"{letter}{other}" for letter in "abcd" for other in "efgh"]
    parted = classifier(counting, names, how)
    assert max(sizes) <= 5
    assert sum(sizes) == 32
    monkeypatch.undo()
    assert np.array_equal(parted, classifier(encode, names, how))


def test_classes_of_one_name_are_encoded_once_and_tie_exactly(monkeypatch) -> None:
    seen = []

    def in_batches(texts):
        # The last bit of a vector may depend on what is encoded beside it.
        seen.extend(texts)
        return encode(texts) * (1 + 1e-6 * len(seen))

    monkeypatch.setattr("openvision.evaluation.data.prompts._PROMPTS_AT_A_TIME", 2)
    vectors = classifier(in_batches, ["Cab", "bad", "dab", "cab"], Protocol("p", ("{}",), canonical=True))
    assert seen == ["cab", "bad", "dab"]
    assert np.array_equal(vectors[0], vectors[3])
    assert vectors.shape == (4, 8)


def test_files_of_templates_and_names(tmp_path) -> None:
    (tmp_path / "t.txt").write_text("a {c} here\n{}\n")
    assert protocol("t.txt", tmp_path).templates == ("a {} here", "{}")
    (tmp_path / "t.json").write_text(json.dumps(["one {}"]))
    assert protocol(str(tmp_path / "t.json")).templates == ("one {}",)
    (tmp_path / "n.txt").write_text("a cat\n  a dog \n")
    assert class_names("n.txt", tmp_path) == ["a cat", "a dog"]
    assert protocol("plain").templates == ("{}",)
    assert protocol(["{}", "a {}"]) == Protocol("{}; a {}", ("{}", "a {}"))


def test_what_may_be_wrong_with_them(tmp_path) -> None:
    with pytest.raises(OpenVisionError, match="neither a prompt set"):
        protocol("opnvision", tmp_path)
    (tmp_path / "bad.txt").write_text("a picture\n")
    with pytest.raises(OpenVisionError, match="exactly once"):
        protocol("bad.txt", tmp_path)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(OpenVisionError, match="exactly once"):
        protocol(["a picture"])
    with pytest.raises(OpenVisionError, match="must be a JSON list"):
        class_names("bad.json", tmp_path)
    with pytest.raises(OpenVisionError, match="does not exist"):
        class_names("none.txt", tmp_path)
    with pytest.raises(OpenVisionError, match="holds no letter or digit"):
        classifier(encode, ["cat", "!?"], Protocol("p", ("{}",), canonical=True))


def test_without_open_clip_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OpenVisionError, match=r"openvision-encoders\[open-clip\]"):
        protocol("open_clip")
