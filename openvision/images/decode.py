"""Decode images: bytes to RGB pixels, at the smallest scale that still covers the crop.

A JPEG stores 8 x 8 blocks of frequencies. Without the high ones it decodes to a half, a quarter or an eighth of its
size in a fraction of the time. So the crop is chosen first, from the size in the header, and the image is decoded at
the smallest scale that still covers the crop at the target resolution. simplejpeg decodes JPEGs; Pillow decodes the
rest (other formats, CMYK, EXIF rotation, damaged files). A bad image raises `BadSampleError`; the loader counts it by
reason and replaces it with the next sample.
"""

import functools
import importlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

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
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "ICO", "HEIF")
IMAGE_SUFFIXES = frozenset(
    {
        ".avif",
        ".bmp",
        ".gif",
        ".heic",
        ".heif",
        ".jfif",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    }
)
"""Suffixes of image files in folders, in lower case."""
# The brand behind "ftyp" in the first box of a HEIC file.
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
Box = tuple[int, int, int, int]
"""Top, left, height and width of a crop, pixels."""
_SCALES = (8, 4, 2)
_JPEG_START = b"\xff\xd8\xff"
_EXIF_START, _XMP_START = b"Exif\x00\x00", b"http://ns.adobe.com/xap/1.0/\x00"
# EXIF and XMP of a PNG may follow the pixels.
_PNG_METADATA = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")
_TIFF_BITS = 258
_TAIL_ROWS = 8
# EXIF orientation -> what makes the image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
    if data.startswith(_JPEG_START) and _is_upright(data):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        # Pillow reads some files that simplejpeg rejects, and its error says why when it cannot.
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


def has_gray_tail(pixels: np.ndarray) -> bool:
    """Whether an image, RGB uint8 (H, W, 3), looks like a JPEG that was cut and closed again.

    A decoder fills what is missing with middle gray. The rule: the last rows, a sixteenth of the image and at least 8,
    are all within 2 of (128, 128, 128), and rows above them are not.
    """
    rows = max(_TAIL_ROWS, -(-len(pixels) // 16))
    # Nearly every image is done after its last row.
    if len(pixels) <= rows or not _is_gray(pixels[-1]) or not _is_gray(pixels[-rows:]):
        return False
    return not _is_gray(pixels)


def _is_gray(pixels: np.ndarray) -> bool:
    return bool(((pixels >= 126) & (pixels <= 130)).all())


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int, str]:
    """Width, height (upright) and format (png, jpeg, ...) of an encoded image, from its header.

    Raises BadSampleError as `decode_image` does, but not for what is wrong with the pixels.
    """
    with opened_image(data, max_pixels) as image:
        width, height = image.size
        # Without this test Pillow would decode every PNG to look for EXIF behind its pixels. The size of a TIFF is
        # already that of the upright image.
        bare = image.format == "PNG" and not any(name in data for name in _PNG_METADATA)
        if image.format != "TIFF" and not bare and orientation(image) >= 5:
            width, height = height, width
        return width, height, str(image.format).lower()


def _is_upright(data: bytes) -> bool:
    """Whether a JPEG surely needs no turn, from the segments before its pixels; Pillow looks closer if it may."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:  # start of the pixels
            return True
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1:
            segment = data[at + 4 : end]
            if segment.startswith(_EXIF_START) and not _is_upright_exif(segment[len(_EXIF_START) :]):
                return False
            turns = re.findall(rb"tiff:Orientation(?:=\"|>)?(.?)", segment) if segment.startswith(_XMP_START) else []
            if any(turn != b"1" for turn in turns):
                return False
        at = end
    return False


def _is_upright_exif(exif: bytes) -> bool:
    """Whether every orientation in the first directory of an EXIF block is a plain 1."""
    order = {b"II*\x00": "little", b"MM\x00*": "big"}.get(exif[:4])
    if order is None:
        return False
    read = functools.partial(int.from_bytes, byteorder="little" if order == "little" else "big")
    at = read(exif[4:8])
    entries = read(exif[at : at + 2])
    if at + 2 + 12 * entries > len(exif):
        return False
    tags = (exif[start : start + 12] for start in range(at + 2, at + 2 + 12 * entries, 12))
    # Tag, type 3 (16 bits), one value.
    return all(
        (read(tag[2:4]), read(tag[4:8]), read(tag[8:10])) == (3, 1, 1)
        for tag in tags
        if read(tag[:2]) == ExifTags.Base.Orientation
    )


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
    except UnidentifiedImageError as error:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and "HEIF" not in _known_formats():
            remedy = 'pip install "openvision-encoders[heif]"'
            raise BadSampleError("unsupported_image", f"HEIC images need the package pillow-heif: {remedy}") from error
        raise BadSampleError("undecodable", "the image cannot be decoded: its bytes are of no known format") from error
    # Decoders raise nearly everything for a damaged file: OSError, ValueError, TypeError, struct.error, RuntimeError.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise BadSampleError("undecodable", f"the image cannot be decoded: {reason}") from error


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """The accepted formats that this build of Pillow supports; pillow-heif adds HEIF."""
    Image.init()
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadSampleError("too_large", f"the image has {width} x {height} pixels, more than {max_pixels}")


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an image, 1 to 8; 1 where no tag can be read. May decode the pixels of a PNG."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    # Readers of a stranger's tags raise nearly everything.
    except Exception:
        return 1
    return found if found in _TURNS else 1


def to_rgb(image: Image.Image) -> np.ndarray:
    """Any Pillow image -> RGB uint8 (H, W, 3) by the rules above; raises BadSampleError for an unsupported depth."""
    # A PNG may tell its orientation after its pixels.
    image.load()
    full = _full_scale(image) if _is_deep(image) else None
    turn = _TURNS.get(orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    strip_rows = max(1, STRIP_PIXELS // max(1, image.width))
    if strip_rows >= image.height:
        return _strip_to_rgb(image, full)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, strip_rows):
        bottom = min(top + strip_rows, image.height)
        pixels[top:bottom] = _strip_to_rgb(image.crop((0, top, image.width, bottom)), full)
    return pixels


def to_rgb_image(image: Image.Image | bytes) -> Image.Image:
    """An encoded or Pillow image -> a Pillow image with mode RGB, by the same rules; raises BadSampleError."""
    return Image.fromarray(decode_image(image) if isinstance(image, bytes) else to_rgb(image))


def _is_deep(image: Image.Image) -> bool:
    """Whether values are gray with more than 8 bits, which Pillow's own conversion would clip to white."""
    return image.mode.startswith("I") or image.mode == "F"


def _full_scale(image: Image.Image) -> float:
    """The value that is white in a deep image: what its file states, else by its largest value."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS)
        return 2.0**12 - 1 if bits == (12,) else 2.0**16 - 1
    # Pillow scales these to 16 bits by the maximum in their header.
    if image.mode == "I" and image.format == "PPM":
        return 2.0**16 - 1
    lowest, highest = (float(value) for value in image.getextrema())  # pyright: ignore[reportArgumentType]
    scales = (255.0, 65535.0) if image.mode == "I" else (1.0, 255.0, 65535.0)
    found = next((scale for scale in scales if highest <= scale), None)
    # Written so that NaN is refused too.
    if found is None or not lowest >= 0:
        kind = "integers" if image.mode == "I" else "floats"
        raise BadSampleError(
            "unsupported_depth",
            f"the image has {kind} from {lowest:g} to {highest:g}, of which no file says what is white; scale them "
            "to 8 or 16 bits",
        )
    return found


def _strip_to_rgb(image: Image.Image, full: float | None) -> np.ndarray:
    """`to_rgb` of some rows; `full` is the value that is white in a deep image."""
    if full is not None:
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise BadSampleError("unsupported_depth", "the image has values that are no numbers; replace them")
        # 255 / 1 for floats to 1, 1 / 257 for 16 bits: integers are truncated, as in 16-bit RGB; floats are rounded.
        scaled = values / (full / 255)
        gray = (np.rint(scaled) if image.mode == "F" else scaled).astype(np.uint8)
        if "transparency" in image.info:
            gray[values == image.info["transparency"]] = 255
        return np.repeat(gray[..., None], 3, axis=2)
    if image.mode == "La":
        image = image.convert("LA")
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:
        # The pixels of 16-bit RGB come with 8 bits, the transparent colour with 16.
        image = image.copy()
        image.info["transparency"] = tuple(part >> 8 for part in key)
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return np.array(Image.alpha_composite(canvas, layer).convert("RGB"))
    return np.array(image.convert("RGB"))
