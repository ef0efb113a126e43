"""What the entries of a vocabulary stand for, whichever way its tokenizer writes them.

| tokenizer | writes | for |
|---|---|---|
| WordPiece | `cat`, `##s` | a word's beginning, what continues it |
| byte-level BPE | `Ġcat`, `s` | the same, in characters that stand for bytes |
| SentencePiece (Unigram, BPE) | `▁cat`, `s` | the same |
| BPE of CLIP | `cat</w>`, `s` | a word's end, what is before it |

The same string is another thing in two of them: `s` begins a word of WordPiece and continues one of the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tokenizers import decoders

from openvision.files import JsonObject
from openvision.text.special import SpecialTokens, steps_of

Place = Literal["begins", "continues", "ends", "does not end", "unmarked", "special", "raw"]
METASPACE = "▁"
_REPLACED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Meaning:
    """What an entry stands for."""

    text: str
    """Characters of a text, or the part in the layout of a special token: "pad"."""
    place: Place
    """Where in a word; "raw" is an entry that is no text, such as a part of a character."""


def meanings(vocabulary: dict[str, int], content: JsonObject, special: SpecialTokens) -> dict[Meaning, int]:
    """The id of each entry of a tokenizer by its meaning; `content` is that of its tokenizer.json."""
    roles = {name: role for role, name in vars(special).items() if name is not None}
    added = {token["content"] for token in content.get("added_tokens") or []}
    reads = _reader(content)

    def meaning(entry: str) -> Meaning:
        if entry in roles:
            return Meaning(roles[entry], "special")
        return Meaning(entry, "raw") if entry in added else reads(entry)

    return {meaning(entry): index for entry, index in vocabulary.items()}


def same_meaning(wanted: Meaning, known: dict[Meaning, int]) -> int | None:
    """The id of what means the same in another vocabulary, whose meanings are `known`; None where nothing does.

    Whether a comma or a bracket stands behind a space is no part of its meaning: WordPiece does not say it.
    """
    if wanted in known or any(character.isalnum() for character in wanted.text):
        return known.get(wanted)
    other: dict[Place, Place] = {"begins": "continues", "continues": "begins"}
    return known.get(Meaning(wanted.text, other[wanted.place])) if wanted.place in other else None


def _reader(content: JsonObject) -> Callable[[str], Meaning]:
    """What makes a meaning of an entry that is no special token."""
    model = content["model"]
    kinds = {step.get("type") for step in steps_of(content)}
    if prefix := model.get("continuing_subword_prefix"):
        return lambda entry: _marked(entry, prefix, "continues", "begins")
    if "ByteLevel" in kinds:
        return _of_bytes
    if suffix := model.get("end_of_word_suffix"):
        return lambda entry: (
            Meaning(entry.removesuffix(suffix), "ends") if entry.endswith(suffix) else Meaning(entry, "does not end")
        )
    if "Metaspace" in kinds or any(METASPACE in str(step) for step in steps_of(content)):
        return lambda entry: _marked(entry, METASPACE, "begins", "continues")
    return lambda entry: Meaning(entry, "begins" if model["type"] == "WordLevel" else "unmarked")


def _marked(entry: str, mark: str, with_mark: Place, without: Place) -> Meaning:
    """The meaning of an entry whose mark, if it has one, is its first characters."""
    text = entry.removeprefix(mark)
    return Meaning(text, with_mark if len(text) < len(entry) else without)


def _of_bytes(entry: str) -> Meaning:
    text = decoders.ByteLevel().decode([entry])
    if _REPLACED in text:
        # A part of a character.
        return Meaning(entry, "raw")
    return _marked(text, " ", "begins", "continues")
