"""`openvision data picto`: emoji in ten styles of six vendors, clip art and Fashion-MNIST as shards, with DATA.md.

split.py says what each split tests. Everything comes from packages of npm and Debian (packages.py). Every choice is
made on images of 96 px, so that a set of larger images holds the same image-text pairs.
"""

import hashlib
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from openvision.data.shards.dataset import ShardWriter
from openvision.data.sources.openmoji.attributes import VisualAttributes, measure
from openvision.data.sources.openmoji.glyphs import png_bytes
from openvision.data.sources.picto.captions import clipart_alt, clipart_caption, emoji_alt, emoji_caption
from openvision.data.sources.picto.clipart import ClipArt, clipart_drawings
from openvision.data.sources.picto.concepts import read_concepts
from openvision.data.sources.picto.emoji import EmojiDrawing, emoji_drawings
from openvision.data.sources.picto.fashion_mnist import GARMENTS, photographs
from openvision.data.sources.picto.packages import Package, Packages, committed_packages, default_folder
from openvision.data.sources.picto.render import render_page
from openvision.data.sources.picto.split import FASHION_MNIST, SPLITS, TRAIN, HeldNames, split_of
from openvision.data.sources.stamp import has_stamp, write_stamp
from openvision.errors import require
from openvision.files import atomic_folder
from openvision.images.decode import BadSampleError

DEFAULT_SIZE = 96
_STAMP = "picto.json"
_RECIPE = 1
_CLIPART = "openclipart"


@dataclass(frozen=True)
class Pair:
    """An image that renders at any size, and its texts, which state its measured attributes."""

    key: str
    split: str
    style: str
    name: str
    tones: tuple[str, ...]
    """Skin tones of the name."""
    render: Callable[[int], np.ndarray]
    """Side in pixels -> uint8 (side, side, 3); raises BadSampleError."""
    texts: Callable[[VisualAttributes], tuple[str, str]]
    """Alt-text and synthetic caption."""
    meta: dict[str, str]


@dataclass(frozen=True)
class Rendered:
    """A pair whose image is in the spool file."""

    pair: Pair
    digest: bytes
    """SHA-256 of the pixels at 96 px, equal for identical images."""
    start: int
    length: int
    alt: str
    synthetic: str


@dataclass
class Counts:
    """Pairs in the set, and drawings left out of it."""

    kept: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(style, split) -> pairs."""
    left_out: dict[str, Counter[str]] = field(default_factory=dict)
    """Style -> reason -> drawings."""

    def leave_out(self, style: str, reason: str) -> None:
        """Count a drawing that is left out."""
        self.left_out.setdefault(style, Counter())[reason] += 1


def make_picto(
    folder: Path,
    size: int = DEFAULT_SIZE,
    packages_folder: Path | None = None,
    offline: bool = False,
    say: Callable[[str], None] = lambda line: None,
    table: dict[str, Package] | None = None,
) -> Path:
    """Write the splits train, validation_style, heldout_style, heldout_concepts and fashion_mnist, unless they exist.

    `size` is the side of the images in pixels; missing packages are fetched into `packages_folder`; `say` receives
    progress messages. Raises OpenVisionError when a package is not available or `folder` holds other files.
    """
    table = table or committed_packages()
    resvg = require("resvg_py", extra="picto")
    hashes = {short: package.sha512[:16] for short, package in table.items()}
    stamp = {"recipe": _RECIPE, "size": size, "resvg-py": resvg.__version__, "packages": hashes}
    if has_stamp(folder, _STAMP, stamp):
        return folder
    packages = Packages(packages_folder or default_folder(), table, offline)
    _fetch_all(packages, say)
    counts = Counts()
    with atomic_folder(folder) as temporary:
        with tempfile.TemporaryFile(dir=temporary) as spool:
            rendered = render_all(_pairs(packages, counts), size, spool, counts, say)
            kept = without_duplicates(rendered, counts)
            say(f"writing {len(kept)} pairs")
            _write(temporary, kept, spool, counts)
        _write_photographs(temporary, packages, counts)
        (temporary / "DATA.md").write_text(_data_card(table, size, counts), encoding="utf-8")
        write_stamp(temporary, _STAMP, stamp)
    return folder


def _fetch_all(packages: Packages, say: Callable[[str], None]) -> None:
    """Fetch all packages first: a missing one is reported before minutes of rendering."""
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
    split = split_of(concept, style.split)
    # A training text must not name what is held out; the texts of other splits are built alike.
    tags = [tag for tag in concept.tags if not held.named_in(tag)]
    keywords = [word for word in concept.keywords if not held.named_in(word)]
    return Pair(
        key=key,
        split=split,
        style=style.name,
        name=concept.name.text,
        tones=concept.name.tones,
        render=drawing.render,
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
        render=lambda size: render_page(art.svg, size),
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


def render_all(
    pairs: Iterator[Pair], size: int, spool: BinaryIO, counts: Counts, say: Callable[[str], None]
) -> list[Rendered]:
    """Render every pair once into the spool file; what cannot be rendered is counted by reason."""
    rendered: list[Rendered] = []
    style = ""
    for pair in pairs:
        if pair.style != style:
            style = pair.style
            say(f"rendering {style}")
        try:
            seen = pair.render(min(size, DEFAULT_SIZE))
            pixels = seen if size <= DEFAULT_SIZE else pair.render(size)
        except BadSampleError as error:
            counts.leave_out(pair.style, error.reason)
            continue
        png = png_bytes(pixels)
        alt, synthetic = pair.texts(measure(seen))
        digest = hashlib.sha256(seen.tobytes()).digest()
        rendered.append(Rendered(pair, digest, spool.tell(), len(png), alt, synthetic))
        spool.write(png)
    return rendered


def without_duplicates(rendered: list[Rendered], counts: Counts) -> list[Rendered]:
    """Of identical images keep the one with the shortest name, so that none is in two splits.

    Where identical images have names of different skin tones, the style lacks the toned drawings and a toned name
    would be untrue: then only one without a tone is kept.
    """
    identical: dict[bytes, list[Rendered]] = defaultdict(list)
    for one in sorted(rendered, key=lambda one: (len(one.pair.name), one.pair.key)):
        identical[one.digest].append(one)
    kept = []
    for same in identical.values():
        untrue = same[0].pair.tones and any(one.pair.tones != same[0].pair.tones for one in same)
        kept += [] if untrue else same[:1]
        for one in same if untrue else same[1:]:
            counts.leave_out(one.pair.style, "one image for many skin tones" if untrue else "identical to another")
    return kept


def _write(folder: Path, kept: list[Rendered], spool: BinaryIO, counts: Counts) -> None:
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


def _data_card(table: dict[str, Package], size: int, counts: Counts) -> str:
    """DATA.md, for users of the shards: splits, the licence and author of every source, and what was left out."""
    return f"""# picto shards

Drawings at {size} px with alt-texts and captions; photographs at 28 px. Each sample has a `png`, a `txt` (a short and
messy alt-text) and a `json`: `name`, `concept` (the name without skin tones), `style`, `vendor`, `category`, `source`,
`licence`, and `synthetic`, a caption of sentences from names, tags, the style, and what was measured on the image.

## Pairs
{_table(("style", *SPLITS), _count_rows(counts.kept))}

- train: the training split.
- validation_style: training concepts by a vendor that is not in training. Choices are made on it.
- heldout_style: training concepts by another such vendor.
- heldout_concepts: emoji that no training style has, by every vendor. Their words may occur in other names.
- fashion_mnist: photographs of ten classes, the test part.

The last three are not read before the final report. Of identical images one is kept, so none is in two splits.

## Sources
Every package was fetched under this name and version and has this SHA-512. An image is under the licence of its source,
also as a shard; CC BY and CC BY-SA require the attribution in this table.

{_table(("package", "version", "licence", "attribution", "used for", "SHA-512 starts"), _source_rows(table))}

## Left out
{_table(("style", "reason", "drawings"), _left_out_rows(counts.left_out))}
"""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _count_rows(kept: Counter[tuple[str, str]]) -> list[list[str]]:
    styles = list(dict.fromkeys(style for style, _ in kept))
    rows = [[style, *(_number(kept[style, split]) for split in SPLITS)] for style in sorted(styles)]
    totals = [str(sum(kept[style, split] for style in styles)) for split in SPLITS]
    return [*rows, ["all", *totals]]


def _number(count: int) -> str:
    return str(count) if count else ""


def _source_rows(table: dict[str, Package]) -> list[list[str]]:
    return [
        [package.name, package.version, package.licence, package.attribution, package.use, package.sha512[:16]]
        for package in table.values()
    ]


def _left_out_rows(left_out: dict[str, Counter[str]]) -> list[list[str]]:
    return [[style, reason, str(count)] for style, reasons in left_out.items() for reason, count in reasons.items()]
