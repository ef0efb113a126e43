"""Small language models with random weights: a toy to try commands and tests, and one that is trained from scratch."""

from collections.abc import Iterable
from pathlib import Path

import torch

from openvision.errors import OpenVisionError, require
from openvision.multimodal.model.huggingface import Tokenizer, quiet, transformers

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MARKS = ("<|im_start|>", "<|im_end|>", "<pad>")
_HEAD, _VOCABULARY = 32, 1024
"""Width of a head and most entries of a model that is trained from scratch."""


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
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return _write(folder, toy_tokenizer(template, pad), **shape, tie_word_embeddings=tie)


def write_small_llm(folder: str | Path, texts: Iterable[str], width: int = 128, depth: int = 3) -> Path:
    """Write a Llama to be trained from scratch on `texts`, whose tokenizer it has, into `folder`.

    Its initial values have a deviation of one over the root of the width: with the usual 0.02 a narrow model needs
    some four times the steps (docs/experiments.md). Raises OpenVisionError for a width that is no multiple of 32.
    """
    if width % _HEAD:
        raise OpenVisionError(f"width {width} of a language model is no multiple of {_HEAD}, the width of a head")
    shape = {
        "hidden_size": width,
        "intermediate_size": 11 * width // 4,
        "num_hidden_layers": depth,
        "num_attention_heads": width // _HEAD,
    }
    return _write(folder, toy_tokenizer(texts=texts), **shape, tie_word_embeddings=False, initializer_range=width**-0.5)


def _write(folder: str | Path, tokenizer: Tokenizer, **shape: float) -> Path:
    """Write a Llama of a shape, as `LlamaConfig` takes it, and its tokenizer."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = transformers().LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=end, **shape)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(1)
        transformers().LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Path(folder)
