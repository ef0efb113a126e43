"""A sentence encoder of `transformers` as a text tower: BERT, RoBERTa, XLM-R, and what is built as they are.

The folder is as sentence-transformers writes it:

config.json              shape, in transformers' names
model.safetensors        weights of the encoder
tokenizer.json           its tokenizer
1_Pooling/config.json    which of its tokens are the sentence: the first, or the mean of all

Weights are renamed into `models.text.SentenceTower`, which computes the same; transformers is not needed. Embeddings of
the token type, which is 0 in all sentences, are added to the positions.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from openvision.errors import OpenVisionError
from openvision.files import JsonObject, read_json
from openvision.models.text import SentenceTower, TextConfig, TextTransformer
from openvision.text.tokenizer import FILE_NAME, Tokenizer
from openvision.weights.strict import assign_strictly
from openvision.weights.tensors import read_tensors

CONFIG, WEIGHTS, POOLING = "config.json", "model.safetensors", "1_Pooling/config.json"
# `model_type` -> the first id of a text: [CLS], or <s>.
FAMILIES: dict[str, Literal["class", "bos"]] = {
    "bert": "class",
    "roberta": "bos",
    "xlm-roberta": "bos",
    "camembert": "bos",
}
_POOLING: dict[str, Literal["class", "mean"]] = {
    "pooling_mode_cls_token": "class",
    "pooling_mode_mean_tokens": "mean",
}
_PREFIX = re.compile(r"^(bert|roberta)\.")
# Beside the encoder: the pooler of BERT's sentence task, heads of pretraining, a table of 0, 1, 2, ...
_UNUSED = re.compile(r"^(pooler|cls|lm_head)\.|^embeddings\.position_ids$")
_WORDS, _PLACES, _TYPES = (f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type"))
_QKV = re.compile(r"^encoder\.layer\.(\d+)\.attention\.self\.query\.(weight|bias)$")
_RENAMED = {
    "attention.output.dense": "attn.proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "norm2",
}
_LAYER = re.compile(r"^encoder\.layer\.(\d+)\.(.+)\.(weight|bias)$")


@dataclass(frozen=True)
class SentenceEncoder:
    """The encoder of a folder, float32 on the CPU; its head, which is ours, is empty."""

    folder: Path
    tower: SentenceTower

    def copy_into(self, tower: TextTransformer) -> str:
        """Copy the weights into the text tower of a model, in place; returns a line about what was copied.

        Rows of the vocabulary beyond the encoder's, and the projection into the shared space, are left fresh. Raises
        OpenVisionError for a tower of another shape.
        """
        ours, theirs = tower.config, self.tower.config
        wanted = {name: getattr(theirs, name) for name in _SHAPE if getattr(ours, name) != getattr(theirs, name)}
        if wanted:
            lines = ", ".join(
                f'{name} = "{one}"' if isinstance(one, str) else f"{name} = {one}" for name, one in wanted.items()
            )
            raise OpenVisionError(
                f"warm_start.text = {str(self.folder)!r}: the encoder has another shape than model.text; "
                f"write there {lines}"
            )
        if ours.context_length > theirs.context_length:
            raise OpenVisionError(
                f"warm_start.text = {str(self.folder)!r}: the encoder reads {theirs.context_length - 1} ids at most; "
                f"model.text.context_length is at most {theirs.context_length}, not {ours.context_length}"
            )
        entries = theirs.vocab_size
        if ours.vocab_size < entries:
            raise OpenVisionError(
                f"warm_start.text = {str(self.folder)!r}: the encoder has {entries} entries; set "
                f"model.text.vocab_size to at least that, and to as many as its tokenizer has ids"
            )
        given = dict(self.tower.named_parameters())
        with torch.no_grad():
            for name, parameter in tower.named_parameters():
                if name == "token_embed.weight":
                    parameter[:entries].copy_(given[name])
                elif name == "pos_embed":
                    parameter.copy_(given[name][:, : parameter.shape[1]])
                elif not name.startswith("head."):
                    parameter.copy_(given[name])
        return f"text tower: copied from {self.folder}, {theirs.depth} blocks of width {theirs.width}; projection fresh"


_SHAPE = ("encoder", "first", "width", "depth", "mlp_dim", "heads", "norm_eps", "pad_id", "pool")


def read_sentence_encoder(folder: Path) -> SentenceEncoder:
    """Read a local folder; raises OpenVisionError that names the file, what is wrong with it, and the remedy."""
    if not (folder / CONFIG).is_file():
        raise OpenVisionError(
            f"sentence encoder {folder} has no {CONFIG}; name a local folder as sentence-transformers saves it"
        )
    config = _config(folder, read_json(folder / CONFIG))
    if not (folder / WEIGHTS).is_file():
        raise OpenVisionError(
            f"sentence encoder {folder} has no {WEIGHTS}; load it with transformers and save it again, which writes one"
        )
    with torch.device("meta"):
        tower = SentenceTower(config, 1)
    offset = 0 if config.first == "class" else (config.pad_id or 0) + 1
    # Before its release 4.31 transformers saved positions, which are whole numbers, beside the weights.
    read = read_tensors(folder / WEIGHTS, lambda name: _UNUSED.search(_PREFIX.sub("", name)))
    state = _renamed(read, folder / WEIGHTS, offset)
    assign_strictly(tower, state | {"head.weight": torch.zeros(1, config.width)}, str(folder / WEIGHTS))
    return SentenceEncoder(folder, tower)


def tokenizer_of_encoder(folder: Path, named: Tokenizer | None) -> Tokenizer:
    """The tokenizer of a sentence encoder, which its ids need; `named` is that of `data.tokenizer`.

    Raises OpenVisionError when there is none, or when the other one is named.
    """
    if not (folder / FILE_NAME).is_file():
        raise OpenVisionError(
            f"sentence encoder {folder} has no {FILE_NAME}; load its tokenizer with transformers and save it again, "
            "which writes one"
        )
    found = Tokenizer.load(folder)
    if named is not None and named.vocabulary_sha256() != found.vocabulary_sha256():
        raise OpenVisionError(
            f"data.tokenizer is not that of the sentence encoder {folder}, so the same ids would be other words; leave "
            "data.tokenizer out"
        )
    return found


def _config(folder: Path, content: JsonObject) -> TextConfig:
    kind = content.get("model_type")
    if kind not in FAMILIES:
        raise OpenVisionError(
            f"sentence encoder {folder} is of type {kind!r:.40}, which has other layers; text towers are made of "
            f"{', '.join(FAMILIES)}"
        )
    odd = {
        "hidden_act": content.get("hidden_act", "gelu") != "gelu",
        "position_embedding_type": content.get("position_embedding_type", "absolute") != "absolute",
        "is_decoder": bool(content.get("is_decoder", False)),
    }
    if found := next((name for name, is_odd in odd.items() if is_odd), None):
        raise OpenVisionError(
            f"sentence encoder {folder}: its {found} is {content[found]!r:.40}, which the text tower does not compute; "
            "take another encoder"
        )
    first = FAMILIES[kind]
    try:
        pad = content["pad_token_id"]
        positions = content["max_position_embeddings"] - (0 if first == "class" else pad + 1)
        return TextConfig(
            width=content["hidden_size"],
            depth=content["num_hidden_layers"],
            mlp_dim=content["intermediate_size"],
            heads=content["num_attention_heads"],
            vocab_size=content["vocab_size"],
            # In this project's layout, which has [bos] and the class token in columns of their own.
            context_length=positions + 1,
            pad_id=pad,
            pool=_pool(folder),
            encoder="bert",
            first=first,
            norm_eps=content["layer_norm_eps"],
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise OpenVisionError(f"{folder / CONFIG} does not describe a sentence encoder: {reason}") from error


def _pool(folder: Path) -> Literal["class", "mean"]:
    path = folder / POOLING
    if not path.is_file():
        raise OpenVisionError(
            f"sentence encoder {folder} has no pooled output: {POOLING}, which says whether the sentence is its first "
            "token or the mean, is missing; save it with sentence-transformers, or write that file"
        )
    content = read_json(path)
    modes = [name for name, on in content.items() if name.startswith("pooling_mode_") and on is True]
    # Newer versions of the library write one name.
    named = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
    if not modes and content.get("pooling_mode") in named:
        modes = [named[content["pooling_mode"]]]
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise OpenVisionError(
            f"{path} pools by {', '.join(modes) or 'nothing'}; a text tower takes {' or '.join(_POOLING)} alone"
        )
    return _POOLING[modes[0]]


def _renamed(state: dict[str, Tensor], path: Path, offset: int) -> dict[str, Tensor]:
    """Tensors by the names of `SentenceTower`; those that it does not know keep theirs."""
    given = {_PREFIX.sub("", name): tensor for name, tensor in state.items()}
    for name in (_WORDS, _PLACES, _TYPES):
        if name not in given:
            raise OpenVisionError(f"{path} has no {name}; is it a sentence encoder?")
    places = given.pop(_PLACES)[offset:] + given.pop(_TYPES)[0]
    found = {"token_embed.weight": given.pop(_WORDS), "pos_embed": places[None]}
    for name in list(given):
        if match := _QKV.match(name):
            layer, kind = match.groups()
            parts = [f"encoder.layer.{layer}.attention.self.{part}.{kind}" for part in ("query", "key", "value")]
            if all(part in given for part in parts):
                found[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat([given.pop(part) for part in parts])
    for name, tensor in given.items():
        match = _LAYER.match(name)
        if match is not None and match[2] in _RENAMED:
            found[f"blocks.{match[1]}.{_RENAMED[match[2]]}.{match[3]}"] = tensor
        else:
            found[name.replace("embeddings.LayerNorm.", "embed_norm.")] = tensor
    return found
