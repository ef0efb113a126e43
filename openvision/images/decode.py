"""Decode images: bytes to RGB pixels, at the smallest scale that still covers the crop.

A JPEG stores 8 x 8 blocks of frequencies. Without the high ones it decodes to a half, a quarter or an eighth of its
size in a fraction of the time. So the crop is chosen first, from the size in the header, and the image is decoded at
the smallest scale that still covers the crop at the target resolution. simplejpeg decodes JPEGs; Pillow decodes the
rest (other formats, CMYK, EXIF rotation, damaged files). A bad image raises `BadSampleError`; the loader counts it by
reason and replaces it with the next sample.
"""

import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from openvision.errors import OpenVisionError


class BadSampleError(OpenVisionError):
    """A sample that cannot be used. `reason` is the short name under which it is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


# Larger images are refused before decoding: a small file can expand to gigabytes.
MAX_PIXELS = 50_000_000
# A large image is converted and resized in strips of so many pixels, which bounds the memory beside its own.
STRIP_PIXELS = 2**22
# Pillow opens more formats, some by starting other programs (Ghostscript for EPS), which is unsafe for web data.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "ICO")
Box = tuple[int, int, int, int]
"""Top, left, height and width of a crop, pixels."""
_SCALES = (8, 4, 2)
_JPEG_START = b"\xff\xd8\xff"
# An EXIF segment can only be at the beginning of the file.
_EXIF_WITHIN = 4096
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Pixels:
    """A decoded image, uint8 (H, W, 3)."""

    array: np.ndarray

    @property
    def height(self) -> int:
        """Rows."""
        return self.array.shape[0]

    @property
    def width(self) -> int:
        """Columns."""
        return self.array.shape[1]

    def crop(self, box: Box, size: int) -> np.ndarray:
        """The pixels of `box`; `size`, the side to resize to, is not needed here."""
        top, left, height, width = box
        return self.array[top : top + height, left : left + width]


@dataclass(frozen=True)
class Jpeg:
    """A JPEG that is decoded when it is cropped."""

    data: bytes
    height: int
    width: int

    def crop(self, box: Box, size: int) -> np.ndarray:
        """The pixels of `box`, at the smallest scale of 1/8, 1/4, 1/2 and 1 with at least `size` pixels a side.

        At a smaller scale the edges of the box fall between pixels and are rounded, by half a pixel at most.
        """
        top, left, height, width = box
        scale = next((scale for scale in _SCALES if min(height, width) >= scale * size), 1)
        array = self._decode(scale)
        rows, columns = array.shape[0] / self.height, array.shape[1] / self.width
        first_row, first_column = round(top * rows), round(left * columns)
        last_row, last_column = round((top + height) * rows), round((left + width) * columns)
        return array[first_row:last_row, first_column:last_column]

    def _decode(self, scale: int) -> np.ndarray:
        rows, columns = -(-self.height // scale), -(-self.width // scale)
        try:
            return simplejpeg.decode_jpeg(self.data, min_height=rows, min_width=columns)
        except Exception:
            # Pillow reads some files that simplejpeg rejects, and its error says why when it cannot.
            full = _decode_by_pillow(self.data, MAX_PIXELS)
            return np.asarray(Image.fromarray(full).reduce(scale)) if scale > 1 else full


SourceImage = Pixels | Jpeg


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> SourceImage:
    """Open an encoded image: its size is known, the pixels of a JPEG are not decoded yet.

    Raises BadSampleError for bytes that are not an image or exceed `max_pixels`; a truncated JPEG raises it in `crop`.
    """
    if data.startswith(_JPEG_START) and b"Exif\x00\x00" not in data[:_EXIF_WITHIN]:
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except Exception:
            return Pixels(_decode_by_pillow(data, max_pixels))
        if colours in ("YCbCr", "Gray", "RGB"):
            _check_size(int(width), int(height), max_pixels)
            return Jpeg(data, int(height), int(width))
    return Pixels(_decode_by_pillow(data, max_pixels))


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Encoded image -> RGB uint8 (H, W, 3), upright, transparency on white.

    Raises BadSampleError for bytes that are not an image, are truncated, or exceed `max_pixels`.
    """
    image = open_image(data, max_pixels)
    return image.crop((0, 0, image.height, image.width), max(image.height, image.width))


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int, str]:
    """Width, height (upright) and format (png, jpeg, ...) of an encoded image, from its header.

    Raises BadSampleError as `decode_image` does, but not for what is wrong with the pixels.
    """
    with opened_image(data, max_pixels) as image:
        width, height = image.size
        # Without this test Pillow would decode a whole PNG to look for EXIF data behind the pixels.
        if "exif" in image.info and image.getexif().get(_EXIF_ORIENTATION, 1) >= 5:
            width, height = height, width
        return width, height, str(image.format).lower()


def _decode_by_pillow(data: bytes, max_pixels: int) -> np.ndarray:
    with opened_image(data, max_pixels) as image:
        return to_rgb(image)


@contextmanager
def opened_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """An image whose header was read; raises BadSampleError for whatever a decoder raises here or in the block."""
    try:
        with warnings.catch_warnings():
            # Pillow warns above its own limit; this project's limit is checked here, before decoding. Other warnings
            # are about defects of a stranger's file.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
                _check_size(image.width, image.height, max_pixels)
                yield image
    except BadSampleError:
        raise
    except Image.DecompressionBombError as error:
        raise BadSampleError("too_large", str(error)) from error
    # Decoders raise nearly everything for a damaged file: OSError, ValueError, TypeError, struct.error, RuntimeError.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise BadSampleError("undecodable", f"the image cannot be decoded: {reason}") from error


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """The accepted formats that this build of Pillow supports."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadSampleError("too_large", f"the image has {width} x {height} pixels, more than {max_pixels}")


def to_rgb(image: Image.Image) -> np.ndarray:
    """Any Pillow image -> RGB uint8 (H, W, 3): EXIF rotation applied, transparency on white, 16 bits scaled."""
    # A PNG may tell its orientation after its pixels.
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    strip_rows = max(1, STRIP_PIXELS // max(1, image.width))
    # 16-bit grey: Pillow's own conversion would clip it to white. Other modes do not say how many bits they use.
    sixteen = image.mode.startswith("I;16") or (image.mode in ("I", "F") and np.max(image.getextrema()) > 255)
    if strip_rows >= image.height:
        return _strip_to_rgb(image, sixteen)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, strip_rows):
        bottom = min(top + strip_rows, image.height)
        pixels[top:bottom] = _strip_to_rgb(image.crop((0, top, image.width, bottom)), sixteen)
    return pixels


def _strip_to_rgb(image: Image.Image, sixteen: bool) -> np.ndarray:
    """`to_rgb` of some rows; `sixteen` says that grey values have 16 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        scaled = values / 257 if sixteen else values
        return np.repeat(scaled.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return np.array(Image.alpha_composite(canvas, layer).convert("RGB"))
    return np.array(image.convert("RGB"))
