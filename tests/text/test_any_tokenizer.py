"""Any tokenizer.json of the tokenizers library: byte-level BPE, Unigram, WordPiece of another library."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.inference.load import load
from openvision.recipe.schema import parse_recipe
from openvision.text.tokenizer import Tokenizer
from openvision.training.trainer import Trainer
from tests.conftest import TINY_RECIPE

TEXTS = ["a red car", "ein rotes Auto", "une voiture rouge", "красная машина", "红色的汽车", "赤い車 😀"] * 4


def bytes_bpe(special: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )  # pyright: ignore[reportCallIssue]
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def unigram() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Metaspace()
    # As in XLM-R: padding is not id 0.
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    options = {"unk_token": "<unk>", "show_progress": False}
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, **options)
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def bert() -> tokenizers.Tokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "car", "##s"]
    backend = tokenizers.Tokenizer(
        models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )  # pyright: ignore[reportCallIssue]
    backend.normalizer = normalizers.BertNormalizer()  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    return backend


MADE = {
    "bytes": lambda: bytes_bpe(["<|padding|>", "<|endoftext|>"]),
    "unigram": unigram,
    "bert": bert,
}


def written(backend: tokenizers.Tokenizer, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", MADE)
def test_layout_ids_and_text(kind, tmp_path):
    backend = MADE[kind]()
    tokenizer = Tokenizer.load(written(backend, tmp_path))
    texts = ["a red car", "", "cars red " * 20]
    ids = tokenizer.encode(texts, 12)
    plain = [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
    for row, own in zip(ids, plain, strict=True):
        kept = own[:9]
        padding = [tokenizer.pad_id] * (9 - len(kept))
        assert row.tolist() == [tokenizer.bos_id, *kept, tokenizer.eos_id, *padding, tokenizer.cls_id]
    special = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.cls_id)
    assert len(set(special)) == 4
    assert max(special) < tokenizer.vocab_size
    assert tokenizer.decode(ids[0]).strip() == "a red car"
    labels, mask = tokenizer.encode_target(["a red car"], 16)
    assert tokenizer.decode(labels[0]).strip() == "a red car"
    assert mask.sum() == len(plain[0]) + 1


@pytest.mark.parametrize("kind", MADE)
def test_a_name_of_a_special_token_in_a_text_is_characters_in_copies_too(kind, tmp_path):
    tokenizer = Tokenizer.load(written(MADE[kind](), tmp_path))
    text = f"{tokenizer.special.eos} [CLS]"
    for one in (tokenizer, pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert not {tokenizer.eos_id, tokenizer.cls_id} & set(one.tokens([text])[0])


@pytest.mark.parametrize("kind", MADE)
def test_what_is_saved_is_read_back_as_the_same(kind, tmp_path):
    tokenizer = Tokenizer.load(written(MADE[kind](), tmp_path / "first"))
    (tmp_path / "second").mkdir()
    tokenizer.save(tmp_path / "second")
    (tmp_path / "stock").mkdir()
    tokenizer.save_for_stock(tmp_path / "stock", 16)
    stock = tokenizers.Tokenizer.from_file(str(tmp_path / "stock" / "tokenizer.json")).encode("a red car").ids
    ours = tokenizer.encode(["a red car"], 16)[0].tolist()
    assert len(stock) == 16
    assert [index for index in stock if index != tokenizer.pad_id] == [i for i in ours if i != tokenizer.pad_id]
    for read in (
        Tokenizer.load(tmp_path / "second"),
        Tokenizer.from_vocabulary(tmp_path / "second" / "tokenizer.json"),
        Tokenizer.from_vocabulary(tmp_path / "stock" / "tokenizer.json"),
    ):
        assert np.array_equal(read.encode(TEXTS, 16), tokenizer.encode(TEXTS, 16))
        assert (read.special, read.vocab_size) == (tokenizer.special, tokenizer.vocab_size)
    assert Tokenizer.load(tmp_path / "second").vocabulary_sha256() == tokenizer.vocabulary_sha256()


def test_bytes_know_every_text_and_another_normaliser_is_another_tokenizer(tmp_path):
    tokenizer = Tokenizer.load(written(MADE["bytes"](), tmp_path / "a"))
    text = "ᚠᛇᚻ 👩‍🚀"
    assert tokenizer.decode(tokenizer.encode([text], 60)[0]) == text
    assert not tokenizer.only_unknown(tokenizer.encode([text], 60)).any()
    backend = MADE["bytes"]()
    backend.normalizer = normalizers.Lowercase()
    other = Tokenizer.load(written(backend, tmp_path / "b"))
    assert other.vocabulary() == tokenizer.vocabulary()
    assert other.vocabulary_sha256() != tokenizer.vocabulary_sha256()


def recipe_of(file: Path, entries: int):
    content = copy.deepcopy(TINY_RECIPE)
    content["data"] = {k: v for k, v in content["data"].items() if k != "vocab_size"} | {"tokenizer": str(file)}
    for part in ("text", "decoder"):
        if content["model"].get(part):
            content["model"][part]["vocab_size"] = entries
    return parse_recipe(content, "tiny")


@pytest.mark.slow
def test_a_run_trains_with_it_and_its_model_encodes_with_it(shapes_folder, tmp_path):
    file = written(unigram(), tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(file)
    Trainer(recipe_of(file, tokenizer.vocab_size), shapes_folder, tmp_path / "run").run()
    encoder = load(tmp_path / "run")
    assert encoder.tokenizer.vocabulary_sha256() == tokenizer.vocabulary_sha256()
    assert encoder.encode_texts(["красная машина"]).norm().item() == pytest.approx(1)


def test_a_vocabulary_larger_than_the_models(shapes_folder, tmp_path):
    file = written(unigram(), tmp_path / "tokenizer")
    with pytest.raises(OpenVisionError, match=r"the tokenizer has \d+ entries, the model only 20; raise vocab_size"):
        Trainer(recipe_of(file, 20), shapes_folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (
            ["<|endoftext|>"],
            r"tokenizer.json: it has no padding token \(\[PAD\], .*add one with the",
        ),
        (["<pad>"], r"it has no end token \(\[eos\], </s>"),
    ],
)
def test_a_missing_special_token_is_one_sentence(special, message, tmp_path):
    with pytest.raises(OpenVisionError, match=message):
        Tokenizer.load(written(bytes_bpe(special), tmp_path))


def test_padding_with_the_end_is_refused(tmp_path):
    backend = bytes_bpe(["<|endoftext|>"])
    backend.enable_padding(pad_token="<|endoftext|>")
    with pytest.raises(OpenVisionError, match=r"it pads with <\|endoftext\|>, its end"):
        Tokenizer.load(written(backend, tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["model"].update(vocab=3), "it has no vocabulary"),
        (lambda content: content["model"]["vocab"].update(a=2**40), "an id of its vocabulary is 1099511627776"),
        (lambda content: content["model"]["vocab"].update(a=None), "an id of its vocabulary is None"),
        (lambda content: content["model"].update(type="Magic"), "is not a tokenizer file"),
        (
            lambda content: content.update(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
            "its step 'Replace' has an empty pattern",
        ),
    ],
)
def test_damaged_files(change, message, tmp_path):
    file = written(MADE["bytes"](), tmp_path)
    content: JsonObject = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(OpenVisionError, match=message):
        Tokenizer.load(file)
