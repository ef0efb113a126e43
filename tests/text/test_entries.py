"""Entries of tokenizers of all kinds, and which of them mean the same."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from openvision.files import JsonObject
from openvision.text.entries import Meaning, meanings, same_meaning
from openvision.text.special import SpecialTokens
from openvision.text.tokenizer import Tokenizer
from openvision.training.setup.adapt import shared_entries
from tests.text.test_any_tokenizer import written

NONE = SpecialTokens("p", "b", "e", None, "c")
BPE: JsonObject = {"type": "BPE"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"model": {"type": "WordPiece", "continuing_subword_prefix": "##"}},
            {"cat": ("cat", "begins"), "##s": ("s", "continues"), ",": (",", "begins")},
        ),
        (
            {"model": BPE, "pre_tokenizer": {"type": "ByteLevel"}},
            {"Ġcat": ("cat", "begins"), "s": ("s", "continues"), "Ã¼": ("ü", "continues"), "Ã": ("Ã", "raw")},
        ),
        (
            {"model": {"type": "Unigram"}, "pre_tokenizer": {"type": "Metaspace"}},
            {"▁cat": ("cat", "begins"), "s": ("s", "continues")},
        ),
        (
            {"model": BPE, "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}},
            {"▁cat": ("cat", "begins"), "s": ("s", "continues")},
        ),
        (
            {"model": BPE | {"end_of_word_suffix": "</w>"}},
            {"cat</w>": ("cat", "ends"), "s": ("s", "does not end")},
        ),
        ({"model": BPE | {"continuing_subword_prefix": "@@"}}, {"cat": ("cat", "begins"), "@@s": ("s", "continues")}),
        ({"model": {"type": "WordLevel"}}, {"cat": ("cat", "begins")}),
        ({"model": BPE}, {"cat": ("cat", "unmarked")}),
        (
            {"model": BPE, "added_tokens": [{"content": "<mask>"}]},
            {"<mask>": ("<mask>", "raw"), "b": ("bos", "special")},
        ),
    ],
    ids=["WordPiece", "bytes", "Unigram", "Llama", "CLIP", "prefix", "words", "no marks", "special"],
)
def test_every_way_to_mark_words(content, expected):
    found = meanings({entry: index for index, entry in enumerate(expected)}, content, NONE)
    assert found == {Meaning(*meaning): index for index, meaning in enumerate(expected.values())}


def test_punctuation_is_the_same_behind_a_space_or_not():
    known = {Meaning(",", "begins"): 3, Meaning("s", "begins"): 4}
    assert same_meaning(Meaning(",", "continues"), known) == 3
    assert same_meaning(Meaning("s", "continues"), known) is None
    assert same_meaning(Meaning(",", "raw"), known) is None


def test_a_text_reads_the_rows_of_its_own_words(tmp_path):
    """Of "a cat" in byte-level BPE the row of WordPiece's `cat` is copied, not that of `##cat`, and so is its end."""
    pieces = ["[PAD]", "[bos]", "[eos]", "[UNK]", "[CLS]", "a", "cat", "##cat", "s", "##s", ","]
    own = Tokenizer._from_entries({piece: index for index, piece in enumerate(pieces)})
    backend = byte_pairs(["Ġ", "c", "a", "t", "s", ","], [("c", "a"), ("ca", "t"), ("Ġ", "cat")])
    theirs = Tokenizer.load(written(backend, tmp_path))
    ours, given = shared_entries(theirs, own)
    names = {index: entry for entry, index in theirs.vocabulary().items()}
    copied = {names[index]: pieces[row] for index, row in zip(ours.tolist(), given.tolist(), strict=True)}
    assert copied == {
        **{"<pad>": "[PAD]", "</s>": "[eos]", "[bos]": "[bos]", "[CLS]": "[CLS]"},
        **{"Ġcat": "cat", "cat": "##cat", "s": "##s", ",": ","},
    }
    assert [names[index] for index in theirs.tokens(["s cat"])[0]] == ["s", "Ġcat"]


def byte_pairs(alphabet: list[str], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Byte-level BPE of a few merges."""
    entries = ["<pad>", "</s>", *alphabet, *(first + second for first, second in merges)]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens(["<pad>", "</s>"])
    return backend
