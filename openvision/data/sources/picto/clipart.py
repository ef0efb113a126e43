"""Open Clip Art: drawings by many artists, with titles and tags as noisy as alt-texts; all go into training.

A title may be that of a whole collection ("Lemon SVG theme"); then the file name is used. Patterns, drawings under
another licence than public domain, and drawings whose texts name a held-out emoji are left out.
"""

import hashlib
import html
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from openvision.data.sources.picto.packages import Packages
from openvision.data.sources.picto.split import HeldNames

_FOLDER = "usr/share/openclipart/svg/"
# Patterns, gradients and thousands of stars depict nothing, and logos are trade marks.
_LEFT_OUT_FOLDERS = ("special", "logos", "shapes/stars", "duplicates")
_PUBLIC_DOMAIN = re.compile(r"/(?:PublicDomain|publicdomain)/?$")
_LICENCE = re.compile(r"""<cc:license[^>]*rdf:resource="([^"]*)""")
_TITLE = re.compile(r"<dc:title[^>]*>(.*?)</dc:title>", re.DOTALL)
_TAG = re.compile(r"<rdf:li[^>]*>(.*?)</rdf:li>", re.DOTALL)
_CREATOR = re.compile(r"<dc:creator[^>]*>.*?<dc:title[^>]*>(.*?)</dc:title>.*?</dc:creator>", re.DOTALL)
_NUMBER = re.compile(r"( \d+| r)+$")
# Tags that the library uses for housekeeping.
_NO_TAG = re.compile(r"hash(\(.*)?|unsorted|unchecked|remove|clip ?art|svg|image|none|root")
# A title that more drawings share is that of a collection.
_TITLE_SHARED_BY = 3
_TEXT_SHARED_BY = 20
_LONGEST_TITLE = 80


@dataclass(frozen=True)
class ClipArt:
    """A drawing with its metadata."""

    key: str
    title: str
    file: str
    """The file name as words, without its running number."""
    tags: tuple[str, ...]
    folder: tuple[str, ...]
    """Names of its folders, outermost first."""
    artist: str
    svg: str

    @property
    def place(self) -> str:
        """The folders as words."""
        return " and ".join(self.folder[:2])


def clipart_drawings(packages: Packages, held: HeldNames, reasons: Counter[str]) -> Iterator[ClipArt]:
    """The usable drawings in the order of their paths; `reasons` counts the others."""
    read = [_read(path, data) for path, data in sorted(packages.members("openclipart", _is_drawing))]
    shared = Counter(art.title for art, _ in read)
    seen: Counter[str] = Counter()
    for art, licence in read:
        if shared[art.title] > _TITLE_SHARED_BY or not art.title:
            art = replace(art, title=art.file)
        seen[art.title.lower()] += 1
        if reason := _objection(art, licence, held, seen[art.title.lower()]):
            reasons[reason] += 1
        else:
            yield art


def _objection(art: ClipArt, licence: str, held: HeldNames, seen: int) -> str | None:
    """Reason to leave out a drawing; None to keep it."""
    if not _PUBLIC_DOMAIN.search(licence):
        return "no public-domain dedication in the file"
    if "/".join(art.folder).startswith(_LEFT_OUT_FOLDERS):
        return "patterns, stars, logos"
    if not re.search("[a-z]{3}", art.title.lower()):
        return "no title"
    if seen > _TEXT_SHARED_BY:
        return f"a title repeated more than {_TEXT_SHARED_BY} times"
    if held.named_in(" ".join((art.title, *art.tags, *art.folder))):
        return "names a held-out emoji"
    return None


def _is_drawing(name: str) -> bool:
    return name.startswith(_FOLDER) and name.endswith(".svg")


def _read(path: str, data: bytes) -> tuple[ClipArt, str]:
    """A drawing and the licence in its metadata."""
    svg = data.decode("utf-8", errors="replace")
    inner = path.removeprefix(_FOLDER)
    *folders, file = inner.split("/")
    title, creator, licence = _TITLE.search(svg), _CREATOR.search(svg), _LICENCE.search(svg)
    tags = (_text(tag).lower().replace("_", " ") for tag in _TAG.findall(svg))
    art = ClipArt(
        key=f"openclipart-{hashlib.sha256(inner.encode()).hexdigest()[:12]}",
        title=_NUMBER.sub("", _text(title[1]).replace("_", " "))[:_LONGEST_TITLE].strip() if title else "",
        file=_NUMBER.sub("", re.sub(r"[\W_]+", " ", file.removesuffix(".svg"))).strip(),
        tags=tuple(dict.fromkeys(tag for tag in tags if len(tag) > 2 and not _NO_TAG.fullmatch(tag))),
        folder=tuple(re.sub(r"[\W_]+", " ", folder) for folder in folders if folder != "unsorted"),
        artist=_text(creator[1]) if creator else "",
        svg=svg,
    )
    return art, licence[1] if licence else ""


def _text(markup: str) -> str:
    """Text without mark-up, entities and runs of white space."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())
