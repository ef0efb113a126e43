"""A byte-level language model with random weights, to try commands and tests without a download."""

from pathlib import Path

import torch

from openvision.errors import require
from openvision.multimodal.model.huggingface import Tokenizer, quiet, transformers

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MARKS = ("<|im_start|>", "<|im_end|>", "<pad>")


def toy_tokenizer(template: str | None = TEMPLATE, pad: str | None = "<pad>") -> Tokenizer:
    """One token for each byte, and the marks of the chat template."""
    tokenizers = require("tokenizers", extra="vlm")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(mark, special=True) for mark in _MARKS])
    made = transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=_MARKS[1])
    made.chat_template = template
    return made


def write_toy_llm(
    folder: str | Path, width: int = 32, tie: bool = False, template: str | None = TEMPLATE, pad: str | None = "<pad>"
) -> Path:
    """Write a two-layer Llama with random weights and its tokenizer into `folder`; the weights are always the same."""
    made = toy_tokenizer(template, pad)
    config = transformers().LlamaConfig(
        vocab_size=len(made),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=made.convert_tokens_to_ids("<|im_end|>"),
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(1)
        transformers().LlamaForCausalLM(config).save_pretrained(folder)
        made.save_pretrained(folder)
    return Path(folder)
