"""Texts of an export: a tokenizer for stock libraries, and a text tower that reads what such a tokenizer writes.

Training's layout is [bos], tokens, [eos], padding, and the class token in the last column. A stock tokenizer can only
pad last: [bos], tokens, [eos], [CLS], padding. Both give the same embedding here, because the vector of the class token
moves from the vocabulary into the last position: whatever pad stands in the last column becomes the class token, and
a [CLS] before it is one pad more.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from openvision.models.text import TextTransformer
from openvision.text.tokenizer import Tokenizer
from openvision.weights.export.parity import text_model
from openvision.weights.load import Checkpoint

# Short, empty, long, invisible, upper-case with accents and rare letters, and the name of a special token.
EXAMPLE_TEXTS = (
    "a red circle on white",
    "",
    "two dogs " * 300,
    "\u200b \t\n",
    "A Photo Of A CAT; Café ﬁ ß 猫 😀, it's 3 o'clock",
    "[CLS] and [PAD]",
    "x",
)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, length: int) -> None:
    """Write tokenizer.json in the layout of stock libraries, and transformers' tokenizer_config.json beside it.

    Exact with `tokenizers` as it is, and with transformers' `tokenizer(texts, padding="max_length", truncation=True)`:
    transformers switches off the padding and truncation that a tokenizer.json asks for unless a call asks, too.
    """
    tokenizer.save_for_stock(folder, length)
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.special.bos,
        "eos_token": tokenizer.special.eos,
        "cls_token": tokenizer.special.cls,
        "pad_token": tokenizer.special.pad,
        **({} if tokenizer.special.unk is None else {"unk_token": tokenizer.special.unk}),
        "model_max_length": length,
        "model_input_names": ["input_ids"],
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        # The name of a special token inside a text is ordinary characters, as in training.
        "split_special_tokens": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")


def class_token_in_position(text: TextTransformer, tokenizer: Tokenizer | None) -> TextTransformer:
    """The same tower for both layouts: the vector of the class token is in the last position; blocks are shared.

    Without a tokenizer nobody knows which ids they are, and the tower stays as it is.
    """
    if tokenizer is None:
        return text
    state = text.state_dict()
    tokens, positions = state["token_embed.weight"].clone(), state["pos_embed"].clone()
    positions[0, -1] += tokens[tokenizer.cls_id] - tokens[tokenizer.pad_id]
    tokens[tokenizer.cls_id] = tokens[tokenizer.pad_id]
    with torch.device("meta"):
        moved = TextTransformer(text.config, text.head.out_features)
    moved.load_state_dict({**state, "token_embed.weight": tokens, "pos_embed": positions}, assign=True)
    return moved.eval()


def example_ids(checkpoint: Checkpoint, batch: int = len(EXAMPLE_TEXTS)) -> Tensor:
    """Ids of example texts in training's layout, int64 (batch, context_length)."""
    model = text_model(checkpoint)
    length = model.config.text.context_length
    if checkpoint.tokenizer is not None:
        return torch.from_numpy(checkpoint.tokenizer.encode(EXAMPLE_TEXTS[:batch], length))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.text.vocab_size, (batch, length), generator=generator)


def comparable_rows(tokenizer: Tokenizer) -> list[int]:
    """Rows of EXAMPLE_TEXTS that other libraries split as training does, by the file of this tokenizer.

    A file that was not made here has them read names of special tokens as such; it has no place to say otherwise.
    """
    special = [name for name in vars(tokenizer.special).values() if name is not None]
    rows = range(len(EXAMPLE_TEXTS))
    return [row for row in rows if tokenizer.is_own or not any(name in EXAMPLE_TEXTS[row] for name in special)]


def stock_ids(folder: Path, texts: list[str]) -> Tensor:
    """Ids of `texts` by the tokenizer.json in a folder, read by the `tokenizers` library alone."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return torch.tensor([encoding.ids for encoding in backend.encode_batch(texts)])
