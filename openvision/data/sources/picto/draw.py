"""From an SVG or PNG to a square picture on white, with bounds: what cannot be drawn is refused and says why.

Only what a drawing itself holds is drawn: no file beside it, no font of the machine, so that the same packages give
the same pixels everywhere.
"""

import io
import re

import numpy as np
from PIL import Image, ImageChops

from openvision.errors import require
from openvision.images.decode import BadSampleError, decode_image

_LARGEST_SVG = 2 * 2**20
_LARGEST_PNG = 512
# A drawing longer than this beside its width is a ribbon: scaled into a square nothing is left of it.
_LONGEST_SHAPE = 8.0
_MARGIN = 0.03
# Points of an inch: the drawings of Open Clip Art were made when programs took 90 pixels for one.
_DPI = 90
# A page is looked at in this size, to see how much of it is drawn on: less ink than the least is a speck.
_LOOK, _LEAST_INK = 128, 8
_PAGE_OVERSAMPLING, _LARGEST_PAGE = 1.5, 2048
_BLANK = 200
_FOREIGN = re.compile(r"""href\s*=\s*["'](?!\#|data:)[^"']""")
_FOREIGN_ELEMENT = re.compile(r"<(?:\w+:)?(?:image|use|feImage)\b[^>]*>", re.DOTALL)
_TEXT = re.compile(r"<(?:\w+:)?(?:text|flowRoot)\b[^>]*[^/]>")


def draw_icon(svg: str, size: int) -> np.ndarray:
    """An icon that fills its own square -> uint8 (size, size, 3) on white."""
    return _checked(np.asarray(_padded(_rendered(svg, size), size)))


def draw_page(svg: str, size: int) -> np.ndarray:
    """A drawing anywhere on a page -> its ink, in the middle of a white square, uint8 (size, size, 3)."""
    box = _ink_box(_rendered(svg, _LOOK))
    extent = max(box[2] - box[0], box[3] - box[1])
    if extent < _LEAST_INK:
        raise BadSampleError("small on its page", f"only {extent} of {_LOOK} pixels of the page are drawn on")
    inner = round(size * (1 - 2 * _MARGIN))
    # Drawn again as large as it takes for the ink alone to fill the square.
    page = _rendered(svg, min(_LARGEST_PAGE, round(_PAGE_OVERSAMPLING * inner * _LOOK / extent)))
    box = _ink_box(page)
    width, height = box[2] - box[0], box[3] - box[1]
    if max(width, height) > _LONGEST_SHAPE * min(width, height):
        raise BadSampleError("a ribbon", f"the drawing measures {width} x {height}")
    scale = inner / max(width, height)
    fitted = (max(1, round(width * scale)), max(1, round(height * scale)))
    return _checked(np.asarray(_padded(page.crop(box).resize(fitted, Image.Resampling.LANCZOS), size)))


def _ink_box(page: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is not white."""
    box = ImageChops.invert(page).getbbox()
    if box is None:
        raise BadSampleError("blank", "nothing is drawn on the page")
    return box


def draw_png(data: bytes, size: int) -> np.ndarray:
    """A small PNG -> uint8 (size, size, 3) on white; smaller ones are scaled up, which blurs them."""
    image = Image.fromarray(decode_image(data, max_pixels=_LARGEST_PNG**2))
    return _checked(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))


def png_bytes(pixels: np.ndarray) -> bytes:
    """The picture as PNG, uint8 (H, W, 3) or (H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _rendered(svg: str, size: int) -> Image.Image:
    """The SVG on white, its longer side at most `size` pixels."""
    _check_svg(svg)
    resvg = require("resvg_py", extra="picto")
    try:
        png = resvg.svg_to_bytes(svg_string=svg, width=size, height=size, dpi=_DPI, skip_system_fonts=True)
    except ValueError as error:
        raise BadSampleError("not drawable", str(error)) from error
    # resvg keeps the proportion within this box, and may round one side up.
    return Image.fromarray(decode_image(bytes(png), max_pixels=(size + 1) ** 2))


def _check_svg(svg: str) -> None:
    if len(svg) > _LARGEST_SVG:
        raise BadSampleError("too large", f"the SVG has {len(svg)} characters, more than {_LARGEST_SVG}")
    if "<!ENTITY" in svg:
        raise BadSampleError("declares entities", "the SVG defines entities, which can unfold without bound")
    if any(_FOREIGN.search(element) for element in _FOREIGN_ELEMENT.findall(svg)):
        raise BadSampleError("refers to a file", "the SVG shows a file that is not part of it")
    if _TEXT.search(svg):
        raise BadSampleError("needs fonts", "the SVG writes text, which looks different with each machine's fonts")


def _padded(image: Image.Image, size: int) -> Image.Image:
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas


def _checked(pixels: np.ndarray) -> np.ndarray:
    if pixels.min() > _BLANK:
        raise BadSampleError("blank", "nothing darker than paper is drawn")
    return pixels
