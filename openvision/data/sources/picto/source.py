"""`picto`: drawings of many styles and artists as pairs, for experiments on how far an encoder generalises.

Ten styles of emoji by six vendors, clip art, and photographs for the cross-domain test (picto_split.py says what each
part tests). All of it comes from packages of npm and Debian (picto_packages.py). Every choice is made on pictures of
96 px, so that a set of larger pictures holds the same pairs.
"""

import hashlib
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from openvision.data.shards.dataset import ShardWriter
from openvision.data.sources.openmoji.measure import Measured, measure
from openvision.data.sources.picto.captions import clipart_alt, clipart_caption, emoji_alt, emoji_caption
from openvision.data.sources.picto.card import data_card
from openvision.data.sources.picto.clipart import ClipArt, clipart_drawings
from openvision.data.sources.picto.draw import draw_page, png_bytes
from openvision.data.sources.picto.fashion import GARMENTS, photographs
from openvision.data.sources.picto.names import read_concepts
from openvision.data.sources.picto.packages import Package, Packages, committed_packages, default_folder
from openvision.data.sources.picto.split import FASHION_MNIST, SPLITS, TRAIN, HeldNames, split_of
from openvision.data.sources.picto.styles import EmojiDrawing, emoji_drawings
from openvision.errors import OpenVisionError, require
from openvision.files import atomic_folder
from openvision.images.decode import BadSampleError

DEFAULT_SIZE = 96
_STAMP = "picto.json"
_RECIPE = 1
_CLIPART = "openclipart"


@dataclass(frozen=True)
class Pair:
    """A picture that can be drawn at any size, and its texts, which need it measured."""

    key: str
    split: str
    style: str
    name: str
    tones: tuple[str, ...]
    """Skin tones of the name."""
    draw: Callable[[int], np.ndarray]
    texts: Callable[[Measured], tuple[str, str]]
    """Alt-text and caption."""
    meta: dict[str, str]


@dataclass(frozen=True)
class Drawn:
    """A pair whose picture lies in the spool."""

    pair: Pair
    digest: bytes
    """Of the pixels that identical pictures are told by."""
    start: int
    length: int
    alt: str
    synthetic: str


@dataclass
class Counts:
    """What is in the set and what is not."""

    kept: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(style, split) -> pairs."""
    left_out: dict[str, Counter[str]] = field(default_factory=dict)
    """Style -> reason -> drawings."""

    def leave_out(self, style: str, reason: str) -> None:
        """Count a drawing that is not in the set."""
        self.left_out.setdefault(style, Counter())[reason] += 1


def make_picto(
    folder: Path,
    size: int = DEFAULT_SIZE,
    packages_folder: Path | None = None,
    offline: bool = False,
    say: Callable[[str], None] = lambda line: None,
    table: dict[str, Package] | None = None,
) -> Path:
    """Write `folder`/{train,validation_style,heldout_style,heldout_concepts,fashion_mnist} and DATA.md, or find them.

    `size` is the side of the pictures in pixels; packages are fetched into `packages_folder` unless they lie there,
    and `say` is told what is going on. Raises OpenVisionError when a package cannot be had or `folder` holds
    something else.
    """
    table = table or committed_packages()
    resvg = require("resvg_py", extra="picto")
    hashes = {short: package.sha512[:16] for short, package in table.items()}
    stamp = {"recipe": _RECIPE, "size": size, "resvg-py": resvg.__version__, "packages": hashes}
    if (folder / _STAMP).is_file() and json.loads((folder / _STAMP).read_text()) == stamp:
        return folder
    if folder.exists() and any(folder.iterdir()) and not (folder / _STAMP).is_file():
        raise OpenVisionError(f"{folder} holds other files; choose another folder for the shards of picto")
    packages = Packages(packages_folder or default_folder(), table, offline)
    _fetch_all(packages, say)
    counts = Counts()
    with atomic_folder(folder) as temporary:
        with tempfile.TemporaryFile(dir=temporary) as spool:
            drawn = draw_all(_pairs(packages, counts), size, spool, counts, say)
            kept = without_twins(drawn, counts)
            say(f"writing {len(kept)} pairs")
            _write(temporary, kept, spool, counts)
        _write_photographs(temporary, packages, counts)
        (temporary / "DATA.md").write_text(data_card(table, size, counts.kept, counts.left_out), encoding="utf-8")
        (temporary / _STAMP).write_text(json.dumps(stamp) + "\n")
    return folder


def _fetch_all(packages: Packages, say: Callable[[str], None]) -> None:
    """All of them before any is used: what is missing is said before minutes of drawing."""
    for short, package in packages.table.items():
        say(f"package {package.name} {package.version}")
        packages.path(short)


def _pairs(packages: Packages, counts: Counts) -> Iterator[Pair]:
    concepts = read_concepts(packages)
    held = HeldNames(concepts.by_hexcode.values())
    for drawing in emoji_drawings(packages, concepts, counts.left_out):
        yield _emoji_pair(drawing, packages.table[drawing.style.name], held)
    reasons = counts.left_out.setdefault(_CLIPART, Counter())
    for art in clipart_drawings(packages, held, reasons):
        yield _clipart_pair(art, packages.table[_CLIPART])


def _emoji_pair(drawing: EmojiDrawing, package: Package, held: HeldNames) -> Pair:
    concept, style = drawing.concept, drawing.style
    key = f"{style.name}-{concept.hexcode}"
    split = split_of(concept, style.part)
    # A trained text must not name what is held out; other texts may say what they like, but all are made alike.
    tags = [tag for tag in concept.tags if not held.named_in(tag)]
    keywords = [word for word in concept.keywords if not held.named_in(word)]
    return Pair(
        key=key,
        split=split,
        style=style.name,
        name=concept.name.text,
        tones=concept.name.tones,
        draw=drawing.draw,
        texts=lambda measured: (
            emoji_alt(key, concept, keywords),
            emoji_caption(key, concept, tags, style.look, measured),
        ),
        meta={
            "name": concept.name.text,
            "concept": concept.concept,
            "style": style.name,
            "vendor": style.vendor,
            "category": concept.group,
            "emoji": concept.name.emoji,
            "source": f"{package.name} {package.version}",
            "licence": package.licence,
        },
    )


def _clipart_pair(art: ClipArt, package: Package) -> Pair:
    tags = [tag for tag in art.tags if tag not in art.title.lower()]
    return Pair(
        key=art.key,
        split=TRAIN,
        style=_CLIPART,
        name=art.title,
        tones=(),
        draw=lambda size: draw_page(art.svg, size),
        texts=lambda measured: (
            clipart_alt(art.key, art.title, tags, art.artist),
            clipart_caption(art.key, art.title, tags, art.place, measured),
        ),
        meta={
            "name": art.title,
            "concept": art.title.lower(),
            "style": _CLIPART,
            "vendor": _CLIPART,
            "category": art.folder[0] if art.folder else "unsorted",
            "artist": art.artist,
            "source": f"{package.name} {package.version}",
            "licence": package.licence,
        },
    )


def draw_all(
    pairs: Iterator[Pair], size: int, spool: BinaryIO, counts: Counts, say: Callable[[str], None]
) -> list[Drawn]:
    """Draw every pair once into the spool, counting by reason what cannot be drawn."""
    drawn: list[Drawn] = []
    style = ""
    for pair in pairs:
        if pair.style != style:
            style = pair.style
            say(f"drawing {style}")
        try:
            seen = pair.draw(min(size, DEFAULT_SIZE))
            pixels = seen if size <= DEFAULT_SIZE else pair.draw(size)
        except BadSampleError as error:
            counts.leave_out(pair.style, error.reason)
            continue
        png = png_bytes(pixels)
        alt, synthetic = pair.texts(measure(seen))
        digest = hashlib.sha256(seen.tobytes()).digest()
        drawn.append(Drawn(pair, digest, spool.tell(), len(png), alt, synthetic))
        spool.write(png)
    return drawn


def without_twins(drawn: list[Drawn], counts: Counts) -> list[Drawn]:
    """Of identical pictures the one of the shortest name, so that none stands on both sides of a split.

    Where identical pictures have names of different skin tones the style lacks the toned drawings, and a toned name
    would be untrue: then only one without tones stays.
    """
    twins: dict[bytes, list[Drawn]] = defaultdict(list)
    for one in sorted(drawn, key=lambda one: (len(one.pair.name), one.pair.key)):
        twins[one.digest].append(one)
    kept = []
    for same in twins.values():
        untrue = same[0].pair.tones and any(one.pair.tones != same[0].pair.tones for one in same)
        kept += [] if untrue else same[:1]
        for one in same if untrue else same[1:]:
            counts.leave_out(one.pair.style, "one picture for many skin tones" if untrue else "identical to another")
    return kept


def _write(folder: Path, kept: list[Drawn], spool: BinaryIO, counts: Counts) -> None:
    """Write the pairs in the order of a hash of their keys, which mixes the styles within every shard."""
    writers = {split: ShardWriter(folder / split) for split in SPLITS if split != FASHION_MNIST}
    for one in sorted(kept, key=lambda one: hashlib.sha256(one.pair.key.encode()).digest()):
        spool.seek(one.start)
        pair = one.pair
        meta = pair.meta | {"synthetic": one.synthetic}
        writers[pair.split].write(pair.key, spool.read(one.length), "png", one.alt, meta)
        counts.kept[pair.style, pair.split] += 1
    for writer in writers.values():
        writer.close()


def _write_photographs(folder: Path, packages: Packages, counts: Counts) -> None:
    package = packages.table["fashion-mnist"]
    with ShardWriter(folder / FASHION_MNIST) as writer:
        for photograph in photographs(packages):
            meta = {
                "name": photograph.garment.name,
                "concept": photograph.garment.name,
                "style": FASHION_MNIST,
                "vendor": "zalando",
                "category": "clothing",
                "source": f"{package.name} {package.version}",
                "licence": package.licence,
                "synthetic": photograph.synthetic,
            }
            writer.write(photograph.key, png_bytes(photograph.pixels), "png", photograph.alt, meta)
            counts.kept[FASHION_MNIST, FASHION_MNIST] += 1
    classes = [garment.name for garment in GARMENTS]
    (folder / FASHION_MNIST / "classes.json").write_text(json.dumps(classes) + "\n")
