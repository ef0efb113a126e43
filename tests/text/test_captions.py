"""Which texts a step sees of a sample."""

from collections import Counter

import numpy as np
import pytest

from openvision.text.captions import Captions, sample_captions, sentences


@pytest.mark.parametrize(
    ("caption", "pieces"),
    [
        ("A dog. It runs!", ["A dog", " It runs"]),
        ("One... two!?! three", ["One", " two", "?", " three"]),
        ("It costs 3.50 dollars. Really? Yes.", ["It costs 3", "50 dollars", " Really? Yes"]),
        ("left|right", ["left", "right"]),
        (". . .", [" ", " "]),
        ("", []),
        ("...", []),
        (["First part.", "Second"], ["First part", " Second"]),
        ("no end", ["no end"]),
    ],
)
def test_sentences_split_as_the_original_does(caption, pieces):
    assert sentences(caption) == pieces


def test_every_sentence_is_drawn_equally_often():
    rng = np.random.default_rng(0)
    drawn = Counter(sample_captions("alt", "One. Two. Three.", rng).sentence for _ in range(3000))
    assert drawn.keys() == {"One", " Two", " Three"}
    assert all(abs(count - 1000) < 120 for count in drawn.values())


def test_full_caption_is_the_target():
    captions = sample_captions("alt", ["One.", "Two."], np.random.default_rng(0))
    assert captions.full == "One. Two."
    assert captions.alt == "alt"


@pytest.mark.parametrize("synthetic", [None, "", "...", []])
def test_without_synthetic_caption_the_alt_text_stands_in(synthetic):
    assert sample_captions("alt", synthetic, np.random.default_rng(0)) == Captions("alt", "alt", "alt")


def test_one_of_several_alt_texts():
    rng = np.random.default_rng(0)
    drawn = [sample_captions(["a", "b"], None, rng) for _ in range(100)]
    assert {captions.alt for captions in drawn} == {"a", "b"}
    assert all(captions.full == captions.alt for captions in drawn)
