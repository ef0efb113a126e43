"""Texts of the pictures: alt-texts in the short and messy forms of the web, and captions of true sentences.

Captions state what the name says, what Unicode's annotations or the artist's tags say, how a style draws, and what was
measured on the picture. Wording varies with the key of a picture, never at random.
"""

import hashlib
import re

from openvision.data.sources.openmoji.captions import synthetic_caption
from openvision.data.sources.openmoji.measure import Measured
from openvision.data.sources.picto.names import Concept

_EMOJI_FORMS = (
    "{name}",
    "{name} emoji",
    "{title} Icon",
    "{underscored}.png",
    "{dashed}-72x72.png",
    "{name} {keywords}",
    "{keywords} {name} sticker",
    "{title} | {keywords}",
    "emoji {name}, {keywords}",
    "{name} clip art png transparent",
    "IMG {underscored}",
    "{title} free download",
    "{code} {name}",
)
_CLIPART_FORMS = (
    "{name}",
    "{title} clip art",
    "{underscored}.png",
    "{keywords} {name}",
    "{name} - {keywords}",
    "{title} | Free {keywords} vector",
    "{dashed}.svg",
    "{name} by {artist}",
)
_TAG_FORMS = (
    "{subject}, a picture for {tags}",
    "{subject} stands for {tags}",
    "{tags}: a picture of {subject}",
)


def emoji_alt(key: str, concept: Concept, keywords: list[str]) -> str:
    """The name in one of the forms alt-texts have, with a few of the keywords people search it by."""
    return _formed(key, _EMOJI_FORMS, _plain(concept.name.text), keywords, code=f"U+{concept.hexcode.upper()}")


def emoji_caption(key: str, concept: Concept, tags: list[str], look: str, measured: Measured) -> str:
    """Five to eight true sentences, each with its subject; `look` says how the style draws."""
    subject = _plain(concept.name.bare)
    sentences = [f"{subject}, {look}", f"{subject} belongs to {concept.group.replace('&', 'and')}"]
    if tags:
        sentences.append(pick(key, "tags", _TAG_FORMS).format(subject=subject, tags=listed(tags[:3])))
    return f"{synthetic_caption(concept.name, measured)} {_joined(sentences)}"


def clipart_alt(key: str, title: str, tags: list[str], artist: str) -> str:
    """Title, tags or file name, as they would stand beside the drawing on a page."""
    forms = _CLIPART_FORMS if artist else _CLIPART_FORMS[:-1]
    return _formed(key, forms, title, tags, artist=artist)


def clipart_caption(key: str, title: str, tags: list[str], place: str, measured: Measured) -> str:
    """Three to five sentences from title, tags, the folder it lies in, and what was measured."""
    subject = _plain(title).lower()
    whole = pick(key, "whole", ("a drawing of {0}", "clip art of {0}", "the drawing shows {0}"))
    sentences = [whole.format(subject), f"{subject} belongs to {place}"]
    if tags:
        sentences.append(pick(key, "tags", _TAG_FORMS).format(subject=subject, tags=listed(tags[:3])))
    return _joined([*sentences, _colours(key, subject, measured), f"{subject} is {_shape(measured)}"])


def photograph_caption(noun: str, article: str, kind: str, plural: bool, bright: bool, ratio: float) -> str:
    """Three sentences on a grey photograph of a garment on black; `ratio` is its width by its height."""
    shade = "bright" if bright else "dark"
    be = "are" if plural else "is"
    whole = f"a small grey photograph of {article} {noun} on a black ground"
    return _joined([whole, f"the {noun} {be} {kind}", f"the {shade} {noun} {be} {_proportion(ratio)}"])


def listed(words: list[str]) -> str:
    """ "a, b and c"."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def pick(key: str, purpose: str, forms: tuple[str, ...]) -> str:
    """One of the forms, always the same for the same key and purpose."""
    digest = hashlib.sha256(f"{purpose}:{key}".encode()).digest()
    return forms[digest[0] % len(forms)]


def _formed(key: str, forms: tuple[str, ...], name: str, keywords: list[str], **fields: str) -> str:
    """Without keywords only the forms that need none."""
    usable = forms if keywords else tuple(form for form in forms if "{keywords}" not in form)
    start = hashlib.sha256(f"keywords:{key}".encode()).digest()[0] % max(1, len(keywords))
    return pick(key, "alt", usable).format(
        name=name,
        title=name.title(),
        underscored=name.replace(" ", "_"),
        dashed=name.replace(" ", "-"),
        keywords=" ".join((keywords[start:] + keywords[:start])[:3]),
        **fields,
    )


def _joined(sentences: list[str]) -> str:
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in dict.fromkeys(sentences))


def _colours(key: str, subject: str, measured: Measured) -> str:
    if not measured.filled:
        return f"{subject} in {measured.colours[0]} lines"
    if measured.leading_share >= 0.6 and measured.leading_extent >= 0.3:
        return f"mostly {measured.colours[0]} {subject}"
    return pick(key, "colours", ("{0} in {1}", "{0} drawn in {1}")).format(subject, listed([*measured.colours]))


def _shape(measured: Measured) -> str:
    if measured.round:
        return "round"
    mirror = " and symmetric" if measured.symmetry > 0.9 else ""
    return _proportion(measured.width / measured.height) + mirror


def _proportion(ratio: float) -> str:
    return "wider than tall" if ratio > 1.25 else "taller than wide" if ratio < 0.8 else "about as wide as tall"


def _plain(text: str) -> str:
    """Without characters that end a sentence or clutter one."""
    return " ".join(re.sub(r"[^\w\s'-]", " ", text.replace("&", "and")).split())
