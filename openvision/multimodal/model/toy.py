"""Small language models with random weights: a toy to try commands and tests, and one that is trained from scratch."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from openvision.errors import OpenVisionError, require
from openvision.multimodal.model.huggingface import Tokenizer, quiet, transformers

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MARKS = ("<|im_start|>", "<|im_end|>", "<pad>")


# Of a model that is trained from scratch.
_HEAD, _VOCABULARY = 32, 1024


def toy_tokenizer(
    template: str | None = TEMPLATE, pad: str | None = "<pad>", texts: Iterable[str] | None = None
) -> Tokenizer:
    """One token for each byte, and the marks of the chat template; with `texts` also merges of their bytes."""
    tokenizers = require("tokenizers", extra="vlm")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if texts is not None:
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=_VOCABULARY - len(_MARKS), initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(mark, special=True) for mark in _MARKS])
    made = transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=_MARKS[1])
    made.chat_template = template
    return made


def write_toy_llm(
    folder: str | Path, width: int = 32, tie: bool = False, template: str | None = TEMPLATE, pad: str | None = "<pad>"
) -> Path:
    """Write a two-layer Llama with random weights and its tokenizer into `folder`; the weights are always the same."""
    return _write(folder, toy_tokenizer(template, pad), _Shape(width, 2, heads=2, mlp_dim=2 * width, tie=tie))


def write_small_llm(folder: str | Path, texts: Iterable[str], width: int = 128, depth: int = 3) -> Path:
    """Write a Llama to be trained from scratch on `texts`, whose tokenizer it has, into `folder`.

    Its initial values have a deviation of one over the root of the width: with the usual 0.02 a narrow model needs
    several times the steps (docs/experiments.md). Raises OpenVisionError for a width that is no multiple of 32.
    """
    if width % _HEAD:
        raise OpenVisionError(f"width {width} of a language model is no multiple of {_HEAD}, the width of a head")
    shape = _Shape(width, depth, heads=width // _HEAD, mlp_dim=11 * width // 4, deviation=width**-0.5)
    return _write(folder, toy_tokenizer(texts=texts), shape)


@dataclass(frozen=True)
class _Shape:
    width: int
    depth: int
    heads: int
    mlp_dim: int
    tie: bool = False
    deviation: float = 0.02
    """Of initial values."""


def _write(folder: str | Path, tokenizer: Tokenizer, shape: _Shape) -> Path:
    config = transformers().LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.mlp_dim,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        tie_word_embeddings=shape.tie,
        initializer_range=shape.deviation,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(1)
        transformers().LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Path(folder)
