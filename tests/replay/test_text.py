"""Public bug reports about tokenizers and truncation, tried here."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import openvision
from openvision.errors import OpenVisionError
from openvision.models.layers import unit
from openvision.models.openvision import OpenVision
from openvision.text.tokenizer import Tokenizer
from openvision.training.setup.start import tokenizer_of_start
from openvision.weights.export.targets import ExportOptions, export
from openvision.weights.export.text import EXAMPLE_TEXTS
from openvision.weights.folder import save_folder
from openvision.weights.load import Checkpoint
from tests.replay import models

LENGTH = models.SHAPE.text.context_length
CALL = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return models.checkpoint()


@pytest.fixture(scope="module")
def model(checkpoint) -> OpenVision:
    return checkpoint.model


@pytest.fixture(scope="module")
def own(checkpoint) -> Tokenizer:
    return checkpoint.tokenizer


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory) -> Path:
    """The text tower and the tokenizer as transformers reads them."""
    path = tmp_path_factory.mktemp("export") / "vit"
    export(checkpoint, "transformers", path, ExportOptions(check=False))
    return path / "text"


@pytest.fixture(scope="module")
def stock(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tower(folder):
    from transformers import SiglipTextModel

    return SiglipTextModel.from_pretrained(folder).eval()


def features(model: OpenVision, own: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    with torch.inference_mode():
        return model.encode_text(torch.from_numpy(own.encode(texts, LENGTH)))


def test_a_truncated_text_keeps_its_end(own):
    """mlfoundations/open_clip#130: truncation cut the end-of-text token, at which the features are read."""
    for words in range(LENGTH - 4, LENGTH + 5):
        (ids,) = own.encode(["cat " * words], LENGTH)
        kept = min(words, LENGTH - 3)
        assert ids[kept + 1] == own.eos_id
        assert ids[-1] == own.cls_id


def test_features_are_never_read_at_the_beginning(model, own):
    """mlfoundations/open_clip#1151: a text truncated past its end was pooled at the first token.

    Every text then had the features of every other.
    """
    texts = ["", "cat", "cat " * 40, "dogs " * 40, "猫 犬 " * 40, "😀", *(f"{'cat ' * n}dogs" for n in range(1, 8))]
    found = features(model, own, texts)
    cosines = found @ found.T - 2 * torch.eye(len(texts))
    assert cosines.max() < 1 - 1e-6


def test_a_long_text_is_truncated_and_not_refused(checkpoint):
    """marqo-ai/marqo#350: the tokenizer of a custom model raised for texts longer than the context."""
    encoder = openvision.Encoder(checkpoint.model, checkpoint.tokenizer)
    long, longer = encoder.encode_texts(["dogs " * 100, "dogs " * 1000])
    assert torch.equal(long, longer)


def test_texts_of_unknown_words_and_numbers_fit(own):
    """openai/CLIP#212: 44 words, numbers and rare names among them, were refused as too long."""
    text = "the Commission cannot accept Amendments Nos 1 4 9 11 13 15 19 23 39 40 41 49 51 59 61 64 66 70 71 72 74"
    ids, cut = own.encode_counting([text], 80)
    assert ids.shape == (1, 80)
    assert cut == 0
    assert own.unk_id in ids[0]


def test_a_text_of_another_length_is_refused_by_its_length(model):
    """openai/CLIP#432: ids of a shorter context met a sum of tensors that do not fit."""
    with pytest.raises(ValueError, match=f"texts have 8 ids, the tower reads exactly {LENGTH}"):
        model.encode_text(torch.zeros(1, 8, dtype=torch.long))


def test_the_stock_tokenizer_lower_cases(own, stock):
    """huggingface/transformers#43054: the exported tokenizer of SigLIP 2 did not lower-case as training did."""
    tokens = own.tokens(["a photo of a cat"])[0]
    assert stock("A Photo Of A CAT")["input_ids"] == [own.bos_id, *tokens, own.eos_id, own.cls_id]
    assert own.unk_id not in tokens


def test_the_stock_tokenizer_adds_every_special_token(own, stock):
    """lucidrains/classifier-free-guidance-pytorch#13: without begin and end tokens the features were poor."""
    for text, ids in zip(EXAMPLE_TEXTS, stock(list(EXAMPLE_TEXTS), **CALL)["input_ids"].tolist(), strict=True):
        (ours,) = own.encode([text], LENGTH).tolist()
        assert sorted(ids) == sorted(ours)
        # A stock tokenizer pads last: the class token stands before the pads.
        assert [one for one in ids if one != own.cls_id] == [one for one in ours if one != own.cls_id]


@pytest.mark.parametrize("batch", [1, 3, len(EXAMPLE_TEXTS)])
def test_the_stock_call_gives_our_features(model, own, stock, tower, batch):
    """embeddings-benchmark/mteb#1424: padded to the longest text of a batch, SigLIP fell from 80 % to 10 % on MNIST.

    As SigLIP's, the call must ask for padding; what it gives does not depend on the batch.
    """
    texts = list(EXAMPLE_TEXTS[:batch])
    with torch.inference_mode():
        theirs = unit(tower(**stock(texts, **CALL)).pooler_output)
        training = unit(tower(input_ids=torch.from_numpy(own.encode(texts, LENGTH))).pooler_output)
    assert torch.allclose(theirs, features(model, own, texts), atol=1e-5)
    assert torch.allclose(training, theirs, atol=1e-5)


def test_one_text_that_is_no_list(model, own, stock, tower):
    """huggingface/transformers#28569: whether a tokenizer pads by itself was told in one place and done in another.

    A single text with the documented call is a batch of one; the files alone, without transformers, pad by themselves.
    """
    import tokenizers

    (ids,) = stock("two dogs", **CALL)["input_ids"].tolist()
    assert ids == tokenizers.Tokenizer.from_file(f"{stock.name_or_path}/tokenizer.json").encode("two dogs").ids
    with torch.inference_mode():
        found = unit(tower(input_ids=torch.tensor([ids])).pooler_output)
    assert torch.allclose(found, features(model, own, ["two dogs"]), atol=1e-5)


def test_punctuation_is_cleaned_as_in_training(own, stock):
    """NVlabs/RADIO#142: the export of SigLIP 2 lacked training's cleaning of texts, which cost 12 points."""
    for text in ("Fish & chips!", "it's 3 o'clock...", "CAFÉ—Ｃａｔ ﬁsh", "a\tcat\n\ncat\u200b", "[CLS] a [PAD] cat"):
        tokens = own.tokens([text])[0][: LENGTH - 3]
        assert stock(text, truncation=True)["input_ids"] == [own.bos_id, *tokens, own.eos_id, own.cls_id]


def test_a_word_of_the_vocabulary_is_one_token(own, folder, stock):
    """huggingface/transformers#27961: 1,138 whole words of CLIP's vocabulary were split into smaller tokens.

    Read back from an export, the tokenizer is the same.
    """
    back = Tokenizer.load(folder)
    words = {word: index for word, index in stock.get_vocab().items() if not word.startswith(("##", "["))}
    assert len(words) >= 30
    for word, index in words.items():
        assert own.tokens([word])[0] == back.tokens([word])[0] == [index]
        assert stock(word, add_special_tokens=False)["input_ids"] == [index]
    assert np.array_equal(back.encode(EXAMPLE_TEXTS, LENGTH), own.encode(EXAMPLE_TEXTS, LENGTH))
    assert back.tokens(["two dogs " * 50])[0] == own.tokens(["two dogs " * 50])[0]


def test_ids_of_another_vocabulary_never_reach_trained_towers(model, own, tmp_path):
    """openai/CLIP#279: may a pretrained model read the ids of another tokenizer? It may not, and nobody told."""
    save_folder(tmp_path / "model", model, own, "", {})
    other = Tokenizer.train(["a cat of a photo, two fish"], 120)
    with pytest.raises(OpenVisionError, match="trained with another vocabulary"):
        tokenizer_of_start(str(tmp_path / "model"), models.SHAPE, other)
    theirs = tokenizer_of_start(str(tmp_path / "model"), models.SHAPE, None)
    assert theirs is not None
    assert theirs.vocabulary_sha256() == own.vocabulary_sha256()
