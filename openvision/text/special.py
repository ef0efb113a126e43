"""The special tokens of any tokenizer.json: which of its entries pad, begin and end a text.

Libraries name them differently. Padding and the end must be there, since no other entry can take their place; [bos] and
[CLS], the class token that OpenVision's text tower reads in the last column, are appended where a file lacks them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import tokenizers

from openvision.errors import OpenVisionError
from openvision.files import JsonObject

PAD, BOS, EOS, UNK, CLS = "[PAD]", "[bos]", "[eos]", "[UNK]", "[CLS]"
SPECIAL = (PAD, BOS, EOS, UNK, CLS)
"""Those of the tokenizers that are made here."""

# Names by which published tokenizers have them, most specific first.
_PADDING = (PAD, "<pad>", "<|pad|>", "<|padding|>", "<PAD>")
_BEGIN = (BOS, "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>")
_END = (EOS, "</s>", "<eos>", "[SEP]", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>")
_UNKNOWN = (UNK, "<unk>", "<|unk|>")
# An id that no text has, of a tokenizer that knows every byte.
NO_UNKNOWN = -1
_MAX_ID = 2**24


@dataclass(frozen=True)
class SpecialTokens:
    """Names of the entries that have a part in the layout of ids."""

    pad: str = PAD
    bos: str = BOS
    eos: str = EOS
    unk: str | None = UNK
    """None where every text has ids of its own, as with bytes."""
    cls: str = CLS


def find_special(backend: tokenizers.Tokenizer, content: JsonObject) -> SpecialTokens:
    """The special tokens of a tokenizer whose file holds `content`; [bos] and [CLS] are appended if it lacks them.

    Raises OpenVisionError without padding or without an end.
    """
    known = backend.get_vocab()
    padding = content.get("padding") or {}
    pad = next((name for name in (padding.get("pad_token"), *_PADDING) if name in known), None)
    eos = next((name for name in _END if name in known), None)
    for name, role, choice in ((pad, "padding", _PADDING), (eos, "end", _END)):
        if name is None:
            raise OpenVisionError(
                f"it has no {role} token ({', '.join(choice)}); add one with the tokenizers library, "
                f"tokenizer.add_special_tokens([{choice[0]!r}]), and save it again"
            )
    if pad == eos:
        raise OpenVisionError(
            f"it pads with {pad}, its end, so that nothing tells where a text ends; add a padding token with the "
            f"tokenizers library, tokenizer.add_special_tokens([{PAD!r}]), and save it again"
        )
    bos = next((name for name in _BEGIN if name in known), BOS)
    backend.add_special_tokens([name for name in (bos, CLS) if name not in known])
    unknown = content["model"].get("unk_token")
    unk = next((name for name in (unknown, *_UNKNOWN) if name in known), None)
    assert pad is not None
    assert eos is not None
    return SpecialTokens(pad, bos, eos, unk, CLS)


def is_own(content: JsonObject) -> bool:
    """Whether a file was made here: WordPiece with all five special tokens in its vocabulary."""
    model = content["model"]
    return model["type"] == "WordPiece" and all(name in model["vocab"] for name in SPECIAL)


def check_foreign(content: JsonObject) -> None:
    """Raise ValueError for what the library hangs on or ends the process at."""
    for step in steps_of(content):
        pattern = step.get("pattern")
        if isinstance(pattern, dict) and not all(pattern.values()):
            raise ValueError(f"its step {step.get('type')!r:.40} has an empty pattern")
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, dict):
        wrong = [index for index in vocabulary.values() if type(index) is not int or not 0 <= index < _MAX_ID]
        if wrong:
            raise ValueError(f"an id of its vocabulary is {wrong[0]!r:.40}")
        return
    # Unigram: pieces with their scores.
    if not isinstance(vocabulary, list) or not all(isinstance(one, list) and len(one) == 2 for one in vocabulary):
        raise ValueError("it has no vocabulary")


def steps_of(content: JsonObject) -> Iterator[JsonObject]:
    """All steps of normaliser, pre-tokeniser and decoder, sequences flattened."""
    pending = [content.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    while pending:
        step = pending.pop()
        if isinstance(step, dict):
            yield step
            for name in ("normalizers", "pretokenizers", "decoders"):
                pending += step.get(name) or []
