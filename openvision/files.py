"""Atomic writes of files and folders (temporary name, fsync, rename), and reading of files that may be anything."""

import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openvision.errors import OpenVisionError

JsonObject = dict[str, Any]
"""An object read from JSON or TOML, not validated."""


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def make_folder(path: Path) -> Path:
    """Create `path` with its parents; raises OpenVisionError when it is not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OpenVisionError(f"cannot create folder {path}: {error.strerror}; choose another place") from error
    if not os.access(path, os.W_OK):
        raise OpenVisionError(f"folder {path} is not writable; choose another place or change its permissions")
    return path


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically; raises OpenVisionError."""
    make_folder(path.parent)
    temporary = _temporary_sibling(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OpenVisionError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically; raises OpenVisionError."""
    atomic_write_bytes(path, text.encode("utf-8"))


def append_text(path: Path, text: str) -> None:
    """Append `text` to a file in one write; after a crash its last line may be incomplete."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OpenVisionError(f"cannot write {path}: {error.strerror}") from error


def check_file(path: Path) -> None:
    """Raise OpenVisionError unless `path` is a regular file: reading a pipe or a device might never end."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if path.is_symlink():
            raise OpenVisionError(
                f"{path} is a link to a file that is not there; restore it or remove the link"
            ) from error
        if isinstance(error, FileNotFoundError):
            raise OpenVisionError(f"{path} does not exist") from error
        raise OpenVisionError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise OpenVisionError(f"{str(path)!r} is no path: {error}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise OpenVisionError(f"{path} is {kind}, not a file; name a file")


def read_text(path: Path) -> str:
    """Text of a regular file in UTF-8; raises OpenVisionError at once for anything else."""
    check_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise OpenVisionError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OpenVisionError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from error


def read_json(path: Path) -> JsonObject:
    """The object in a JSON file; raises OpenVisionError for another kind of file or of value."""
    text = read_text(path)
    try:
        content: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise OpenVisionError(f"{path} is not readable JSON: {reason}") from error
    if not isinstance(content, dict):
        raise OpenVisionError(f"{path} is not readable JSON: it holds a {type(content).__name__} instead of an object")
    return content


def read_json_lines(path: Path) -> list[JsonObject]:
    """Read JSON lines; an incomplete last line, left by a crash, is ignored. Raises OpenVisionError."""
    try:
        rows = path.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    except OSError as error:
        raise OpenVisionError(f"{path} cannot be read: {error.strerror}; train the run first") from error
    lines = []
    for number, row in enumerate(rows, start=1):
        try:
            line = json.loads(row)
            if not isinstance(line, dict):
                raise ValueError("it is no object")
            lines.append(line)
        except (ValueError, RecursionError) as error:
            if number < len(rows):
                raise OpenVisionError(f"{path}, line {number} is not JSON: {error}") from error
    return lines


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` when the block ends without an error.

    An existing folder is replaced only then.
    """
    make_folder(path.parent)
    temporary = _temporary_sibling(path)
    try:
        temporary.mkdir()
    except OSError as error:
        raise OpenVisionError(f"cannot create folder {path}: {error.strerror}; choose another place") from error
    try:
        yield temporary
        if path.exists():
            retired = _temporary_sibling(path)
            os.replace(path, retired)
            os.replace(temporary, path)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
