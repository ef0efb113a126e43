"""Captions of emoji: a web-like alt-text, and a synthetic caption of true sentences.

Sentences state what the name says and what was measured on the image. Each names its subject, because training draws
one sentence at a time. Wording is chosen by a hash of the name, never at random.

The phrases at the end (`pick`, `enumerated`, `as_sentences`, `proportion`) serve other sources too.
"""

import hashlib
import re
from collections.abc import Sequence

from openvision.data.sources.openmoji.attributes import VisualAttributes
from openvision.data.sources.openmoji.names import EmojiName

_ALT_FORMS = (
    "{name}",
    "{name} emoji",
    "{title} Icon",
    "{underscored}.png",
    "{name} clipart",
    "emoji of {name}",
    "{dashed}-72x72.png",
    "{title} | free emoji",
    "IMG {name}",
    "{name} sticker png",
)


def alt_text(name: EmojiName) -> str:
    """The name in one of the forms of web alt-texts; every word of the name is kept."""
    words = " ".join(re.sub(r"[^\w\s'-]", "", name.text).split())
    return pick(name.text, "alt", _ALT_FORMS).format(
        name=words, title=words.title(), underscored=words.replace(" ", "_"), dashed=words.replace(" ", "-")
    )


def synthetic_caption(name: EmojiName, measured: VisualAttributes) -> str:
    """Three to six true sentences, each with its subject."""
    return as_sentences([_whole(name), *_parts(name), _colours(name, measured), _layout(name, measured)])


def _whole(name: EmojiName) -> str:
    if name.country:
        return pick(name.text, "whole", ("the flag of {0}", "the national flag of {0}")).format(_plain(name.country))
    subject = _plain(name.bare)
    if len(set(name.tones)) == 2:
        return f"{subject}, one with {name.tones[0]} skin and one with {name.tones[1]} skin"
    if name.tones:
        return pick(name.text, "whole", ("{0} with {1} skin", "{1} skinned {0}")).format(subject, name.tones[0])
    return pick(name.text, "whole", ("an emoji of {0}", "the picture shows {0}", "a drawing of {0}")).format(subject)


def _parts(name: EmojiName) -> list[str]:
    """Sentences on gender, role, hair, direction and skin, each about the whole subject."""
    parts = []
    right = ", facing right" if name.faces_right else ""
    skin = f" with {name.tones[0]} skin" if len(set(name.tones)) == 1 else ""
    if name.gender and name.hair:
        parts.append(f"{_hair(name.hair)} on a {name.gender}{skin}")
    elif name.gender and name.role:
        parts.append(_role(name, skin) + right)
    elif name.kind in _KIND_NOUNS:
        parts.append(f"{_plain(name.bare)} is {_KIND_NOUNS[name.kind]}")
    if skin:
        parts.append(f"the skin of the {_plain(name.bare)} is {name.tones[0]}")
    return parts


_KIND_NOUNS = {
    "animal": "an animal",
    "food": "food or drink",
    "plant": "a plant",
    "face": "a face",
    "vehicle": "a vehicle",
    "building": "a building",
    "clock": "a time on a clock",
    "sign": "a sign",
}


def _hair(hair: str) -> str:
    return {"bald": "a bald head", "beard": "a beard"}.get(hair, hair)


def _role(name: EmojiName, skin: str) -> str:
    """Gender, skin and role in another order than in the name."""
    role, first = _plain(name.role), name.role.split()[0]
    if first.endswith("ing") or first in ("in", "with", "deaf", "pregnant", "old", "older"):
        return f"{name.gender}{skin}, {role}"
    return f"the {role} is a {name.gender}{skin}"


def _colours(name: EmojiName, measured: VisualAttributes) -> str:
    subject = _plain(name.bare)
    if not measured.filled:
        return f"{subject} in {measured.colours[0]} lines"
    # For a person "mostly" would read as a statement on the skin, and figures are open at the bottom.
    if measured.leading_share >= 0.6 and measured.leading_extent >= 0.3 and name.kind not in ("person", "body"):
        return f"mostly {measured.colours[0]} {subject}"
    return pick(name.text, "colours", ("{0} in {1}", "{0} drawn in {1}")).format(subject, enumerated(measured.colours))


def _layout(name: EmojiName, measured: VisualAttributes) -> str:
    mirror = " and symmetric" if measured.symmetry > 0.9 else ""
    return f"{_plain(name.bare)} is {proportion(measured.width / measured.height)}{mirror}"


def _plain(text: str) -> str:
    """Remove punctuation that could end a sentence."""
    return re.sub(r"[^\w\s'-]", "", text.replace("&", "and"))


def pick(key: str, purpose: str, forms: Sequence[str]) -> str:
    """One of the forms, the same for the same key and purpose."""
    digest = hashlib.sha256(f"{purpose}:{key}".encode()).digest()
    return forms[digest[0] % len(forms)]


def enumerated(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def as_sentences(phrases: Sequence[str]) -> str:
    """Phrases as sentences, repeated ones once."""
    return " ".join(f"{phrase[0].upper()}{phrase[1:]}." for phrase in dict.fromkeys(phrases))


def proportion(ratio: float) -> str:
    """Width by height in words."""
    return "wider than tall" if ratio > 1.25 else "taller than wide" if ratio < 0.8 else "about as wide as tall"
