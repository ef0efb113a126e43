"""Texts for a drawn emoji: an alt-text as the web writes them, and a caption of true sentences.

Sentences state what the name says and what was measured on the picture. Each stands alone, because training draws
one of them at a time. Wording varies with the key, never at random.
"""

import hashlib
import re
from dataclasses import dataclass

import numpy as np

from openvision.data.sources.openmoji_names import Name

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

# Colours of the OpenMoji palette and the words for them.
_PALETTE: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((234, 90, 71), (210, 47, 39), (190, 40, 40)),
    "orange": ((241, 143, 38), (226, 121, 36), (230, 160, 90)),
    "yellow": ((252, 234, 43), (241, 179, 27), (245, 205, 60)),
    "green": ((92, 158, 49), (177, 204, 51), (60, 170, 90)),
    "blue": ((97, 178, 228), (30, 80, 160), (146, 211, 245), (40, 110, 200)),
    "purple": ((185, 154, 201), (138, 79, 158), (120, 60, 150)),
    "pink": ((255, 167, 192), (231, 93, 148), (240, 150, 170)),
    "brown": ((165, 121, 57), (107, 66, 38), (106, 70, 47), (150, 90, 60), (92, 60, 40)),
    "beige": ((250, 220, 188), (222, 187, 144), (193, 154, 101), (230, 200, 165)),
    "grey": ((155, 155, 154), (208, 207, 206), (111, 111, 110), (63, 63, 63)),
    "black": ((20, 20, 20),),
}
_WORDS = [word for word, shades in _PALETTE.items() for _ in shades]
_SHADES = np.array([shade for shades in _PALETTE.values() for shade in shades], dtype=np.float32)
_LEAST_SHARE = 0.08


@dataclass(frozen=True)
class Measured:
    """What the picture itself shows."""

    colours: tuple[str, ...]
    """Up to three main colours of the drawing, largest area first; background and outlines not counted."""
    width: float
    height: float
    """Extent of the drawing as a share of the picture's side."""
    symmetry: float
    """Share of drawn pixels whose left-right mirror image looks the same."""


def measure(pixels: np.ndarray) -> Measured:
    """Measure a drawing on white, uint8 (H, W, 3)."""
    values = pixels.astype(np.float32)
    drawn = values.min(axis=2) < 250
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    mirrored = np.abs(values - values[:, ::-1]).max(axis=2) < 40
    inked = drawn | drawn[:, ::-1]
    return Measured(
        colours=_main_colours(values[drawn]),
        width=(columns[-1] - columns[0] + 1) / pixels.shape[1],
        height=(rows[-1] - rows[0] + 1) / pixels.shape[0],
        symmetry=float(mirrored[inked].mean()),
    )


def _main_colours(drawn: np.ndarray) -> tuple[str, ...]:
    distances = np.linalg.norm(drawn[:, None] - _SHADES[None], axis=2)
    nearest = np.array(_WORDS)[distances.argmin(axis=1)]
    words, counts = np.unique(nearest, return_counts=True)
    share = dict(zip(words.tolist(), (counts / len(drawn)).tolist(), strict=True))
    # Outlines are black with grey rims: both are colours of the picture only where they are more than a line.
    for word, least in (("black", 0.6), ("grey", 0.25)):
        if share.get(word, 0) < least:
            share.pop(word, None)
    ranked = sorted(share, key=lambda word: (-share[word], word))
    main = [word for word in ranked if share[word] >= _LEAST_SHARE] or ranked[:1] or ["black"]
    return tuple(main[:3])


def alt_text(name: Name) -> str:
    """The name in one of the forms that alt-texts have; every word of the name is kept."""
    words = re.sub(r"[^\w\s'-]", "", name.text)
    form = _pick(name, "alt", _ALT_FORMS)
    return form.format(
        name=words, title=words.title(), underscored=words.replace(" ", "_"), dashed=words.replace(" ", "-")
    )


def synthetic_caption(name: Name, measured: Measured) -> str:
    """Three to six true sentences about the picture."""
    sentences = [_whole(name), *_parts(name), _colours(name, measured), _layout(name, measured)]
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def _whole(name: Name) -> str:
    if name.country:
        return _pick(name, "whole", ("this is the flag of {0}", "the national colours of {0}")).format(
            _plain(name.country)
        )
    subject = _plain(name.bare)
    form = _pick(name, "whole", ("an emoji of {0}", "the picture shows {0}", "a drawing of {0}"))
    return form.format(subject) + _with_tones(name)


def _with_tones(name: Name) -> str:
    if not name.tones:
        return ""
    return f" with {' and '.join(dict.fromkeys(name.tones))} skin"


def _parts(name: Name) -> list[str]:
    parts = []
    if name.kind == "person" and name.gender in ("man", "woman", "person"):
        parts.append(_pick(name, "gender", ("the person is a {0}", "there is a {0} in it")).format(name.gender))
    if name.hair:
        parts.append(_hair(name))
    elif name.gender and name.role:
        parts.append(_role(name))
    elif name.faces_right:
        parts.append("it faces right")
    if len(name.tones) == 1:
        parts.append(_pick(name, "tone", ("the skin is {0}", "the skin tone is {0}")).format(name.tones[0]))
    elif len(name.tones) == 2:
        parts.append(f"one has {name.tones[0]} skin and the other {name.tones[1]} skin")
    if not parts and (sentence := _KIND_SENTENCES.get(name.kind)):
        parts.append(_pick(name, "kind", sentence))
    return parts[:3]


_KIND_SENTENCES = {
    "flag": ("a flag", "it is the flag of a country or region"),
    "animal": ("it is an animal", "this is an animal"),
    "food": ("it is something to eat or drink", "this is food or drink"),
    "plant": ("it is a plant", "this is a plant"),
    "face": ("it is a face", "a face with an expression"),
    "vehicle": ("it is a vehicle", "something to travel with"),
    "building": ("it is a building", "this is a building"),
    "clock": ("it is a clock", "a clock tells the time"),
    "person": ("it is about people", "somebody is in the picture"),
    "body": ("it is a part of the body", "a part of the body"),
    "sign": ("it is a sign", "this is a sign or symbol"),
}


def _hair(name: Name) -> str:
    if name.hair == "bald":
        return "the head is bald"
    if name.hair == "beard":
        return "there is a beard"
    assert name.hair is not None
    return f"the hair is {name.hair.removesuffix(' hair')}"


def _role(name: Name) -> str:
    role, first = _plain(name.role), name.role.split()[0]
    right = " and faces right" if name.faces_right else ""
    if first.endswith("ing") or first in ("in", "with", "deaf", "pregnant", "old", "older"):
        return _pick(name, "role", ("somebody is {0}", "{0} is what we see")).format(role) + right
    return _pick(name, "role", ("the role is {0}", "seen in the role of {0}")).format(role) + right


def _colours(name: Name, measured: Measured) -> str:
    *others, last = measured.colours
    listed = f"{', '.join(others)} and {last}" if others else last
    naming = "the main colours are {0}" if others else "the main colour is {0}"
    return _pick(name, "colours", ("mostly {0}", naming, "drawn in {0}")).format(listed)


def _layout(name: Name, measured: Measured) -> str:
    ratio = measured.width / measured.height
    if ratio > 1.25:
        shape = "wider than tall"
    elif ratio < 0.8:
        shape = "taller than wide"
    else:
        shape = "about as wide as tall"
    mirror = " and symmetric" if measured.symmetry > 0.97 else " and not symmetric" if measured.symmetry < 0.7 else ""
    return _pick(name, "layout", ("the drawing is {0}", "it is {0}")).format(shape + mirror)


def _plain(text: str) -> str:
    """Without characters that end a sentence or clutter one."""
    return re.sub(r"[^\w\s'-]", "", text)


def _pick(name: Name, purpose: str, forms: tuple[str, ...]) -> str:
    digest = hashlib.sha256(f"{purpose}:{name.text}".encode()).digest()
    return forms[digest[0] % len(forms)]
