"""Pictures of conversations: files in a folder or images in rows of a data set."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from openvision.errors import OpenVisionError


class UnreadableImageError(OpenVisionError):
    """A picture that is missing or broken."""


class Picture(Protocol):
    """Where a picture is."""

    def exists(self) -> bool:
        """Whether it is there; it may still be broken."""
        ...

    def open(self) -> Image.Image:
        """The picture in RGB; raises UnreadableImageError."""
        ...

    def digest(self) -> str:
        """A hash of its content."""
        ...


@dataclass(frozen=True)
class ImageFile:
    """A file."""

    path: Path

    def exists(self) -> bool:
        """Whether the file is there."""
        return self.path.is_file()

    def open(self) -> Image.Image:
        """The picture in RGB; raises UnreadableImageError."""
        try:
            with Image.open(self.path) as image:
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UnreadableImageError(f"{self.path} is no readable picture: {error}") from error

    def digest(self) -> str:
        """Hash of the file's bytes."""
        try:
            with open(self.path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UnreadableImageError(f"{self.path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class RowImage:
    """A picture in a row of a Hugging Face data set, decoded when it is read."""

    rows: Sequence[dict[str, Any]]
    row: int
    column: str
    position: int | None
    """Its place when the column holds a list."""

    def exists(self) -> bool:
        """Rows hold their pictures."""
        return True

    def open(self) -> Image.Image:
        """The picture in RGB; raises UnreadableImageError."""
        value = self.rows[self.row][self.column]
        value = value if self.position is None else value[self.position]
        if not isinstance(value, Image.Image):
            raise UnreadableImageError(
                f"row {self.row}, column {self.column} holds no picture but {type(value).__name__}"
            )
        return value.convert("RGB")

    def digest(self) -> str:
        """Hash of the decoded pixels."""
        image = self.open()
        return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
