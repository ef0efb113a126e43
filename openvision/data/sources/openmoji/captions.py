"""Texts for a drawn emoji: an alt-text as the web writes them, and a caption of true sentences.

Sentences state what the name says and what openmoji_measure.py read off the picture. Each stands alone, because
training draws one of them at a time. Wording varies with the key, never at random.
"""

import hashlib
import re

from openvision.data.sources.openmoji.measure import Measured
from openvision.data.sources.openmoji.names import Name

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


def alt_text(name: Name) -> str:
    """The name in one of the forms that alt-texts have; every word of the name is kept."""
    words = " ".join(re.sub(r"[^\w\s'-]", "", name.text).split())
    form = _pick(name, "alt", _ALT_FORMS)
    return form.format(
        name=words, title=words.title(), underscored=words.replace(" ", "_"), dashed=words.replace(" ", "-")
    )


def synthetic_caption(name: Name, measured: Measured) -> str:
    """Three to six true sentences about the picture, each with its subject, so that each can stand alone."""
    sentences = [_whole(name), *_parts(name), _colours(name, measured), _layout(name, measured)]
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in dict.fromkeys(sentences))


def _whole(name: Name) -> str:
    if name.country:
        return _pick(name, "whole", ("the flag of {0}", "the national flag of {0}")).format(_plain(name.country))
    subject = _plain(name.bare)
    if len(set(name.tones)) == 2:
        return f"{subject}, one with {name.tones[0]} skin and one with {name.tones[1]} skin"
    if name.tones:
        return _pick(name, "whole", ("{0} with {1} skin", "{1} skinned {0}")).format(subject, name.tones[0])
    return _pick(name, "whole", ("an emoji of {0}", "the picture shows {0}", "a drawing of {0}")).format(subject)


def _parts(name: Name) -> list[str]:
    """What is known of gender, role, hair, direction and skin, each said of the whole subject."""
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


def _role(name: Name, skin: str) -> str:
    """Gender, skin and role in another order than the name has them."""
    role, first = _plain(name.role), name.role.split()[0]
    if first.endswith("ing") or first in ("in", "with", "deaf", "pregnant", "old", "older"):
        return f"{name.gender}{skin}, {role}"
    return f"the {role} is a {name.gender}{skin}"


def _colours(name: Name, measured: Measured) -> str:
    *others, last = measured.colours
    listed = f"{', '.join(others)} and {last}" if others else last
    subject = _plain(name.bare)
    if not measured.filled:
        return f"{subject} in {measured.colours[0]} lines"
    # Of a person "mostly" would sound like a statement on the skin, and figures are open at the bottom.
    if measured.leading_share >= 0.6 and measured.leading_extent >= 0.3 and name.kind not in ("person", "body"):
        return f"mostly {measured.colours[0]} {subject}"
    return _pick(name, "colours", ("{0} in {1}", "{0} drawn in {1}")).format(subject, listed)


def _layout(name: Name, measured: Measured) -> str:
    ratio = measured.width / measured.height
    if ratio > 1.25:
        shape = "wider than tall"
    elif ratio < 0.8:
        shape = "taller than wide"
    else:
        shape = "about as wide as tall"
    mirror = " and symmetric" if measured.symmetry > 0.9 else ""
    return f"{_plain(name.bare)} is {shape}{mirror}"


def _plain(text: str) -> str:
    """Without characters that end a sentence or clutter one."""
    return re.sub(r"[^\w\s'-]", "", text.replace("&", "and"))


def _pick(name: Name, purpose: str, forms: tuple[str, ...]) -> str:
    digest = hashlib.sha256(f"{purpose}:{name.text}".encode()).digest()
    return forms[digest[0] % len(forms)]
