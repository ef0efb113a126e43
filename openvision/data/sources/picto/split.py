"""The training split, and what each of the other splits tests.

- validation_style: training concepts, drawn by a vendor that is not in training. Every choice is made on it.
- heldout_style: training concepts, drawn by another such vendor.
- heldout_concepts: emoji that no training style has, drawn by every vendor (the json says which).
- fashion_mnist: photographs; training has drawings only.

Whole families are held out: the man, woman and person of one role in all skin tones, so that no near duplicate of a
held-out emoji is in training. A hash of the family's name decides, not a committed list: emoji of later Unicode
versions and further styles get their split without moving any other emoji.
"""

import hashlib
from collections.abc import Iterable

from openvision.data.sources.picto.concepts import Concept

TRAIN, VALIDATION_STYLE, HELDOUT_STYLE = "train", "validation_style", "heldout_style"
HELDOUT_CONCEPTS, FASHION_MNIST = "heldout_concepts", "fashion_mnist"
SPLITS = (TRAIN, VALIDATION_STYLE, HELDOUT_STYLE, HELDOUT_CONCEPTS, FASHION_MNIST)

_SALT = "picto concepts 1"
_HELD_SHARE = 0.1
# Plural and singular count as one word.
_PLURAL = "s"


def is_held_out(family: str) -> bool:
    """Whether this family is kept out of training."""
    digest = hashlib.sha256(f"{_SALT}: {family}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < _HELD_SHARE * 2**64


def split_of(concept: Concept, style_split: str) -> str:
    """Split of an image, from its concept and the split of its style (TRAIN, VALIDATION_STYLE or HELDOUT_STYLE)."""
    return HELDOUT_CONCEPTS if is_held_out(concept.family) else style_split


class HeldNames:
    """Names of held-out concepts, to keep them out of training texts."""

    def __init__(self, concepts: Iterable[Concept]) -> None:
        """`concepts` are all concepts, held out or not."""
        held = (concept for concept in concepts if is_held_out(concept.family))
        names = {_words(name) for concept in held for name in (concept.family, concept.concept)}
        # Indexed by one word each, so that a text is compared with few names.
        self._by_word: dict[str, list[frozenset[str]]] = {}
        for name in sorted(names, key=sorted):
            if name:
                self._by_word.setdefault(min(name), []).append(name)

    def named_in(self, text: str) -> bool:
        """Whether the text has all words of a held-out name, in any order."""
        words = _words(text)
        return any(name <= words for word in words for name in self._by_word.get(word, ()))


def _words(text: str) -> frozenset[str]:
    separated = "".join(letter if letter.isalnum() else " " for letter in text.lower())
    return frozenset(word.removesuffix(_PLURAL) for word in separated.split())
