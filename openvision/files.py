"""Atomic writes of files and folders (temporary name, fsync, rename), JSON lines that outlive crash and full disk, and
reading of files that may be anything."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from openvision.errors import OpenVisionError

JsonObject = dict[str, Any]
"""An object read from JSON or TOML, not validated."""
_BLOCK = 2**16
# Errors of writing alone: no space, over quota, file too large, read-only file system.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def no_room(error: BaseException) -> str | None:
    """What the operating system says when an error means that nothing can be written here; None for other errors."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _NO_ROOM else None
    # Libraries in Rust, safetensors for one, have errors of their own.
    return next((os.strerror(number) for number in _NO_ROOM if f"(os error {number})" in str(error)), None)


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
    """Write `text` as UTF-8 to `path` atomically, lone surrogates spelt out; raises OpenVisionError."""
    atomic_write_bytes(path, text.encode("utf-8", "backslashreplace"))


def append_lines(path: Path, text: str) -> None:
    """Append whole lines to a file; raises OpenVisionError, and then nothing of `text` was written.

    A last line that a crash cut short is removed first.
    """
    try:
        # The line that another process is writing now is not torn.
        with open(path, "a+b", buffering=0) as file, locked(file.fileno()):
            _append(file, memoryview(text.encode("utf-8", "backslashreplace")))
    except OSError as error:
        raise OpenVisionError(f"cannot write {path}: {error.strerror}") from error


def _append(file: FileIO, rest: memoryview) -> None:
    end = _end_whole_lines(file)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        # Where even that fails, the next append removes the torn line.
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise


@contextmanager
def locked(descriptor: int) -> Iterator[None]:
    """Wait for the lock of an open file or folder, and hold it; where the file system has no locks, go on without."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        # Closing is not enough: a process that was forked meanwhile has the file open, too.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """`locked` for a folder; where it cannot even be opened, go on without."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with locked(descriptor):
            yield
    finally:
        os.close(descriptor)


def _end_whole_lines(file: FileIO) -> int:
    """Complete or remove the last line of a file of JSON lines; returns the size."""
    end = file.seek(0, os.SEEK_END)
    start, tail = end, b""
    while start and b"\n" not in tail:
        begin = max(0, start - _BLOCK)
        file.seek(begin)
        tail, start = file.read(start - begin) + tail, begin
    tail = tail.rpartition(b"\n")[2]
    if not tail:
        return end
    try:
        json.loads(tail)
    except ValueError:
        file.truncate(end - len(tail))
        return end - len(tail)
    file.write(b"\n")
    return end + 1


class PatientLines:
    """Appends lines to a file; those that cannot be written, as on a full disk, are kept and written later."""

    def __init__(self, path: Path, most: int = 100_000) -> None:
        """Keep at most `most` lines, and drop older ones."""
        self.path = path
        self.problem: str | None = None
        """Why the newest lines are not in the file."""
        self._waiting: deque[str] = deque(maxlen=most)

    def write(self, lines: Iterable[str]) -> bool:
        """Append lines, each with its line feed; returns whether `problem` has changed from or to None."""
        before = self.problem
        self._waiting.extend(lines)
        try:
            append_lines(self.path, "".join(self._waiting))
        except OpenVisionError as error:
            self.problem = str(error)
        else:
            self.problem = None
            self._waiting.clear()
        return (before is None) != (self.problem is None)


def check_file(path: Path) -> os.stat_result:
    """Status of a regular file; raises OpenVisionError for anything else: reading a pipe might never end."""
    try:
        status = os.stat(path)
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
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
        raise OpenVisionError(f"{path} is {kind}, not a file; name a file, or restore this one")
    return status


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
        *rows, last = path.read_bytes().split(b"\n")
    except OSError as error:
        raise OpenVisionError(f"{path} cannot be read: {error.strerror}; train the run first") from error
    lines = [_json_line(path, number, row) for number, row in enumerate(rows, start=1)]
    with contextlib.suppress(OpenVisionError):
        lines.append(_json_line(path, len(rows) + 1, last))
    return lines


def _json_line(path: Path, number: int, row: bytes) -> JsonObject:
    try:
        value = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise OpenVisionError(f"{path}, line {number} is not JSON: {error}; remove this line") from error
    if not isinstance(value, dict):
        raise OpenVisionError(f"{path}, line {number} is no JSON object; remove this line")
    return value


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
    except Exception as error:
        if (reason := no_room(error)) is None:
            raise
        raise OpenVisionError(
            f"cannot write folder {path}: {reason}; make room or choose another place, then run the same command"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
