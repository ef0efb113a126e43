"""Render SVGs and PNGs to square images on white; a drawing that is unsafe or unusable raises BadSampleError.

A drawing that refers to other files or to system fonts is refused, so that the same packages give the same pixels on
every machine.
"""

import io
import re

import numpy as np
from PIL import Image, ImageChops

from openvision.errors import require
from openvision.images.decode import BadSampleError, decode_image

_LARGEST_SVG = 2 * 2**20
_LARGEST_PNG = 512
# Above this aspect ratio a drawing is a ribbon: scaled into a square nothing of it can be seen.
_LONGEST_SHAPE = 8.0
_MARGIN = 0.03
# Open Clip Art dates from programs that took 90 pixels for an inch.
_DPI = 90
# Side at which a page is rendered to find its ink, and the smallest extent of ink that is no speck.
_PROBE_SIZE, _LEAST_INK = 128, 8
_PAGE_OVERSAMPLING, _LARGEST_PAGE = 1.5, 2048
_BLANK = 200
_FOREIGN = re.compile(r"""href\s*=\s*["'](?!\#|data:)[^"']""")
_FOREIGN_ELEMENT = re.compile(r"<(?:\w+:)?(?:image|use|feImage)\b[^>]*>", re.DOTALL)
_TEXT = re.compile(r"<(?:\w+:)?(?:text|flowRoot)\b[^>]*[^/]>")


def render_icon(svg: str, size: int) -> np.ndarray:
    """An icon that fills its view box -> uint8 (size, size, 3) on white."""
    return _not_blank(np.asarray(_padded(_rendered(svg, size), size)))


def render_glyph(svg: str, size: int) -> Image.Image:
    """An icon without its ground: RGBA, its longer side at most `size` pixels, cut to its ink."""
    image = Image.open(io.BytesIO(_png_of(svg, size))).convert("RGBA")
    if (box := image.getbbox()) is None:
        raise BadSampleError("blank", "the icon draws nothing")
    return image.crop(box)


def render_page(svg: str, size: int) -> np.ndarray:
    """A drawing anywhere on a page -> its ink centred on white, uint8 (size, size, 3)."""
    box = _ink_box(_rendered(svg, _PROBE_SIZE))
    extent = max(box[2] - box[0], box[3] - box[1])
    if extent < _LEAST_INK:
        raise BadSampleError("small on its page", f"the drawing covers only {extent} of {_PROBE_SIZE} pixels")
    inner = round(size * (1 - 2 * _MARGIN))
    # Rendered again at the size at which the ink alone fills the square.
    page = _rendered(svg, min(_LARGEST_PAGE, round(_PAGE_OVERSAMPLING * inner * _PROBE_SIZE / extent)))
    box = _ink_box(page)
    width, height = box[2] - box[0], box[3] - box[1]
    if max(width, height) > _LONGEST_SHAPE * min(width, height):
        raise BadSampleError("a ribbon", f"the drawing measures {width} x {height}")
    scale = inner / max(width, height)
    fitted = (max(1, round(width * scale)), max(1, round(height * scale)))
    return _not_blank(np.asarray(_padded(page.crop(box).resize(fitted, Image.Resampling.LANCZOS), size)))


def _ink_box(page: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of all that is not white."""
    box = ImageChops.invert(page).getbbox()
    if box is None:
        raise BadSampleError("blank", "nothing is drawn on the page")
    return box


def render_png(data: bytes, size: int) -> np.ndarray:
    """A small PNG -> uint8 (size, size, 3) on white, scaled up or down."""
    image = Image.fromarray(decode_image(data, max_pixels=_LARGEST_PNG**2))
    return _not_blank(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))


def _rendered(svg: str, size: int) -> Image.Image:
    """The SVG on white, its longer side at most `size` pixels."""
    # resvg keeps the aspect ratio within this box, and may round one side up.
    return Image.fromarray(decode_image(_png_of(svg, size), max_pixels=(size + 1) ** 2))


def _png_of(svg: str, size: int) -> bytes:
    _check_svg(svg)
    resvg = require("resvg_py", extra="picto")
    try:
        return bytes(resvg.svg_to_bytes(svg_string=svg, width=size, height=size, dpi=_DPI, skip_system_fonts=True))
    except ValueError as error:
        raise BadSampleError("not drawable", str(error)) from error


def _check_svg(svg: str) -> None:
    if len(svg) > _LARGEST_SVG:
        raise BadSampleError("too large", f"the SVG has {len(svg)} characters, more than {_LARGEST_SVG}")
    if "<!ENTITY" in svg:
        raise BadSampleError("declares entities", "the SVG defines entities, which can expand without bound")
    if any(_FOREIGN.search(element) for element in _FOREIGN_ELEMENT.findall(svg)):
        raise BadSampleError("refers to a file", "the SVG embeds a file that is not part of it")
    if _TEXT.search(svg):
        raise BadSampleError("needs fonts", "the SVG has text, which depends on the fonts of the machine")


def _padded(image: Image.Image, size: int) -> Image.Image:
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas


def _not_blank(pixels: np.ndarray) -> np.ndarray:
    if pixels.min() > _BLANK:
        raise BadSampleError("blank", "the drawing is nearly white")
    return pixels
