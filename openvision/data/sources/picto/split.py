"""Which pictures are trained on, and what each of the others tests.

- validation_style: trained concepts, drawn by a vendor never trained on. Every choice is made on it.
- heldout_style: trained concepts, drawn by another such vendor.
- heldout_concepts: emoji of no training style, drawn by every vendor (the json says which).
- fashion_mnist: photographs; all of training is drawn.

A side is chosen for a whole family: the man, woman and person of one role in all skin tones, so that no near twin of a
held-out emoji is trained on. It is a hash of the family's name, not a committed list: every emoji of a coming Unicode
version and every further style finds its side by itself, and no other emoji changes its own.
"""

import hashlib
from collections.abc import Iterable

from openvision.data.sources.picto.names import Concept

TRAIN, VALIDATION_STYLE, HELDOUT_STYLE = "train", "validation_style", "heldout_style"
HELDOUT_CONCEPTS, FASHION_MNIST = "heldout_concepts", "fashion_mnist"
SPLITS = (TRAIN, VALIDATION_STYLE, HELDOUT_STYLE, HELDOUT_CONCEPTS, FASHION_MNIST)

_SALT = "picto concepts 1"
_HELD_SHARE = 0.1
# Plural and singular count as one word.
_PLURAL = "s"


def is_held_out(family: str) -> bool:
    """Whether no picture of this family is trained on."""
    digest = hashlib.sha256(f"{_SALT}: {family}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < _HELD_SHARE * 2**64


def split_of(concept: Concept, part: str) -> str:
    """Where a picture goes, by its concept and the part its style plays (TRAIN or one of the two styles kept)."""
    return HELDOUT_CONCEPTS if is_held_out(concept.family) else part


class HeldNames:
    """The names of held-out concepts, to keep them out of the texts that are trained on."""

    def __init__(self, concepts: Iterable[Concept]) -> None:
        """Take all concepts, held out or not."""
        held = (concept for concept in concepts if is_held_out(concept.family))
        names = {_words(name) for concept in held for name in (concept.family, concept.concept)}
        # By one of its words each, so that a text is compared with few names.
        self._by_word: dict[str, list[frozenset[str]]] = {}
        for name in sorted(names, key=sorted):
            if name:
                self._by_word.setdefault(min(name), []).append(name)

    def named_in(self, text: str) -> bool:
        """Whether all words of a held-out name stand in the text, in any order."""
        words = _words(text)
        return any(name <= words for word in words for name in self._by_word.get(word, ()))


def _words(text: str) -> frozenset[str]:
    separated = "".join(letter if letter.isalnum() else " " for letter in text.lower())
    return frozenset(word.removesuffix(_PLURAL) for word in separated.split())
