"""Where the images of a conversation come from: files in a folder, or rows of a Hugging Face data set."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.images.decode import BadSampleError, to_rgb_image

PIXEL_RULES = 2
"""Version of the rules by which a file becomes pixels, which cached features depend on: 2 turns images upright,
composites transparency on white and scales 16 bits."""


class ImageSourceError(OpenVisionError):
    """An image is missing or broken."""


class ImageSource(Protocol):
    """One image of a conversation, decoded when it is needed."""

    def exists(self) -> bool:
        """Whether the image exists; it may still be broken."""
        ...

    def open(self) -> Image.Image:
        """The image in RGB, upright, transparency on white (images/decode.py); raises ImageSourceError."""
        ...

    def digest(self) -> str:
        """SHA-256 of the content, in hexadecimal; raises ImageSourceError."""
        ...


@dataclass(frozen=True)
class ImageFile:
    """An image file."""

    path: Path

    def exists(self) -> bool:
        """Whether the file exists."""
        return self.path.is_file()

    def open(self) -> Image.Image:
        """The image in RGB; raises ImageSourceError."""
        try:
            return to_rgb_image(self.path.read_bytes())
        except (OSError, BadSampleError) as error:
            raise ImageSourceError(f"{self.path} is not a readable image: {error}") from error

    def digest(self) -> str:
        """SHA-256 of the file's bytes; raises ImageSourceError."""
        try:
            with open(self.path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ImageSourceError(f"{self.path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class RowImage:
    """An image in a row of a Hugging Face data set."""

    rows: Sequence[JsonObject]
    row: int
    column: str
    position: int | None
    """Index in the list, when the column holds lists."""

    def exists(self) -> bool:
        """Always true: rows contain their images."""
        return True

    def open(self) -> Image.Image:
        """The image in RGB; raises ImageSourceError."""
        place = f"row {self.row}, column {self.column}"
        try:
            value = self.rows[self.row][self.column]
            value = value if self.position is None else value[self.position]
            if isinstance(value, Image.Image):
                return to_rgb_image(value)
        # The library decodes when a row is read, and decoders raise nearly everything.
        except Exception as error:
            raise ImageSourceError(f"{place} holds no readable image: {error}") from error
        raise ImageSourceError(f"{place} holds {type(value).__name__}, not an image")

    def digest(self) -> str:
        """SHA-256 of the decoded pixels and their size; raises ImageSourceError."""
        image = self.open()
        return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
