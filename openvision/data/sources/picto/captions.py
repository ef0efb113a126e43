"""Captions: short and messy alt-texts as on the web, and synthetic captions of true sentences.

Synthetic captions state what the name says, what Unicode's annotations or the artist's tags say, how a style draws, and
what was measured on the image. Wording is chosen by a hash of the image's key, never at random.
"""

import hashlib
import re

from openvision.data.sources.openmoji.attributes import VisualAttributes
from openvision.data.sources.openmoji.captions import as_sentences, enumerated, pick, proportion, synthetic_caption
from openvision.data.sources.picto.concepts import Concept

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
    """The name in one of the forms of web alt-texts, with up to three search keywords."""
    return _formed(key, _EMOJI_FORMS, _plain(concept.name.text), keywords, code=f"U+{concept.hexcode.upper()}")


def emoji_caption(key: str, concept: Concept, tags: list[str], look: str, measured: VisualAttributes) -> str:
    """Five to eight true sentences, each with its subject; `look` describes the style."""
    subject = _plain(concept.name.bare)
    phrases = [f"{subject}, {look}", f"{subject} belongs to {concept.group.replace('&', 'and')}"]
    return f"{synthetic_caption(concept.name, measured)} {as_sentences(phrases + _tag_phrase(key, subject, tags))}"


def clipart_alt(key: str, title: str, tags: list[str], artist: str) -> str:
    """Title, tags or file name, as beside the drawing on a web page."""
    forms = _CLIPART_FORMS if artist else _CLIPART_FORMS[:-1]
    return _formed(key, forms, title, tags, artist=artist)


def clipart_caption(key: str, title: str, tags: list[str], place: str, measured: VisualAttributes) -> str:
    """Three to five sentences from title, tags, folder and measured attributes."""
    subject = _plain(title).lower()
    whole = pick(key, "whole", ("a drawing of {0}", "clip art of {0}", "the drawing shows {0}"))
    phrases = [whole.format(subject), f"{subject} belongs to {place}", *_tag_phrase(key, subject, tags)]
    return as_sentences([*phrases, _colours(key, subject, measured), f"{subject} is {_shape(measured)}"])


def photograph_caption(noun: str, article: str, kind: str, plural: bool, bright: bool, ratio: float) -> str:
    """Three sentences on a grey photograph of a garment on black; `ratio` is width by height."""
    shade = "bright" if bright else "dark"
    be = "are" if plural else "is"
    whole = f"a small grey photograph of {article} {noun} on a black ground"
    return as_sentences([whole, f"the {noun} {be} {kind}", f"the {shade} {noun} {be} {proportion(ratio)}"])


def _tag_phrase(key: str, subject: str, tags: list[str]) -> list[str]:
    return [pick(key, "tags", _TAG_FORMS).format(subject=subject, tags=enumerated(tags[:3]))] if tags else []


def _formed(key: str, forms: tuple[str, ...], name: str, keywords: list[str], **fields: str) -> str:
    """One of the forms, filled in; without keywords only forms that need none."""
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


def _colours(key: str, subject: str, measured: VisualAttributes) -> str:
    if not measured.filled:
        return f"{subject} in {measured.colours[0]} lines"
    if measured.leading_share >= 0.6 and measured.leading_extent >= 0.3:
        return f"mostly {measured.colours[0]} {subject}"
    return pick(key, "colours", ("{0} in {1}", "{0} drawn in {1}")).format(subject, enumerated(measured.colours))


def _shape(measured: VisualAttributes) -> str:
    if measured.round:
        return "round"
    mirror = " and symmetric" if measured.symmetry > 0.9 else ""
    return proportion(measured.width / measured.height) + mirror


def _plain(text: str) -> str:
    """Replace punctuation that could end a sentence by spaces."""
    return " ".join(re.sub(r"[^\w\s'-]", " ", text.replace("&", "and")).split())
