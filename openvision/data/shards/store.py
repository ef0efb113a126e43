"""Where shards lie: a folder on disk, or any URL that fsspec reads (s3://, gs://, https://, memory://, ...).

A store reads whole files and ranges of them. What a network loses is tried again with growing pauses, and then told in
one sentence; what a disk loses is told at once.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from openvision.errors import OpenVisionError
from openvision.files import atomic_write_bytes

T = TypeVar("T")

# Pauses between tries, seconds: about half a minute in all, longer than the usual hiccup of an object store.
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


class Store(Protocol):
    """A folder of files, local or not; can be sent to other processes."""

    @property
    def name(self) -> str:
        """What messages call the folder."""
        ...

    def join(self, file: str) -> str:
        """Path or URL of a file in it."""
        ...

    def sizes(self, suffix: str) -> dict[str, int]:
        """Size in bytes of every file whose name ends in `suffix`, by name, sorted."""
        ...

    def exists(self, file: str) -> bool:
        """Whether the file is there."""
        ...

    def size(self, file: str) -> int:
        """Bytes of a file; raises OpenVisionError when it is not there."""
        ...

    def read(self, file: str, start: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file, to its end without `size`; fewer when it ends early. Raises OpenVisionError."""
        ...

    def open(self, file: str) -> IO[bytes]:
        """The file for one pass from beginning to end; raises what the file system raises."""
        ...

    def write(self, file: str, data: bytes) -> None:
        """Write a file completely or not at all; raises OpenVisionError."""
        ...


def open_store(folder: str | Path) -> Store:
    """The store of a folder or URL; raises OpenVisionError when a local folder does not exist."""
    text = os.fspath(folder)
    if "://" in text and not text.startswith("file://"):
        return RemoteStore(text.rstrip("/"))
    path = Path(text.removeprefix("file://"))
    if not path.is_dir():
        raise OpenVisionError(f"shard folder {path} does not exist")
    return LocalStore(path)


def join_folder(base: str | Path, name: str) -> str | Path:
    """A folder inside a folder or URL; an absolute path or a URL stays what it is."""
    if "://" in name:
        return name
    if isinstance(base, str) and "://" in base:
        return f"{base.rstrip('/')}/{name}"
    return Path(base) / name


class LocalStore:
    """A folder on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        """What messages call the folder."""
        return str(self.folder)

    def join(self, file: str) -> str:
        """Path of a file in it."""
        return str(self.folder / file)

    def sizes(self, suffix: str) -> dict[str, int]:
        """Size of every file whose name ends in `suffix`, by name, sorted; hidden files are left out."""
        with os.scandir(self.folder) as entries:
            found = {
                entry.name: entry.stat().st_size
                for entry in entries
                if entry.name.endswith(suffix) and not entry.name.startswith(".")
            }
        return dict(sorted(found.items()))

    def exists(self, file: str) -> bool:
        """Whether the file is there."""
        return (self.folder / file).is_file()

    def size(self, file: str) -> int:
        """Bytes of a file; raises OpenVisionError when it is not there."""
        try:
            return (self.folder / file).stat().st_size
        except OSError as error:
            raise OpenVisionError(f"{self.join(file)} cannot be read: {error.strerror}; restore it") from error

    def is_newer(self, file: str, other: str) -> bool:
        """Whether `file` was changed after `other`."""
        return (self.folder / file).stat().st_mtime_ns > (self.folder / other).stat().st_mtime_ns

    def read(self, file: str, start: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file, to its end without `size`; fewer when it ends early."""
        try:
            with open(self.folder / file, "rb") as opened:
                opened.seek(start)
                return opened.read(-1 if size is None else size)
        except OSError as error:
            raise OpenVisionError(f"{self.join(file)} cannot be read: {error.strerror}; restore it") from error

    def open(self, file: str) -> IO[bytes]:
        """The file for one pass from beginning to end."""
        return open(self.folder / file, "rb")

    def write(self, file: str, data: bytes) -> None:
        """Write a file completely or not at all."""
        atomic_write_bytes(self.folder / file, data)


class RemoteStore:
    """A folder behind a URL, read through fsspec."""

    def __init__(self, url: str, pauses: tuple[float, ...] = _PAUSES, sleep: Callable[[float], None] = time.sleep):
        """Open `url`; raises OpenVisionError when fsspec does not know its scheme or lacks the package for it."""
        self.url = url
        self.pauses = pauses
        self._sleep = sleep
        self._connect()

    def _connect(self) -> None:
        import fsspec

        try:
            filesystem, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise OpenVisionError(f"{self.url} cannot be opened: {error}") from error
        self._files: Any = filesystem

    def __getstate__(self) -> dict[str, Any]:
        # Connections do not survive a fork: every process makes its own.
        return {"url": self.url, "pauses": self.pauses, "_sleep": self._sleep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()

    @property
    def name(self) -> str:
        """What messages call the folder."""
        return self.url

    def join(self, file: str) -> str:
        """URL of a file in it."""
        return f"{self.url}/{file}"

    def _path(self, file: str) -> str:
        return f"{self._root.rstrip('/')}/{file}"

    def sizes(self, suffix: str) -> dict[str, int]:
        """Size of every file whose name ends in `suffix`, by name, sorted."""
        entries = self._again("", lambda: self._files.ls(self._root, detail=True, refresh=True))
        named = {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] for entry in entries}
        return {name: named[name] for name in sorted(named) if name.endswith(suffix)}

    def exists(self, file: str) -> bool:
        """Whether the file is there."""
        return bool(self._again(file, lambda: self._files.exists(self._path(file))))

    def size(self, file: str) -> int:
        """Bytes of a file."""
        return int(self._again(file, lambda: self._files.info(self._path(file))["size"]))

    def read(self, file: str, start: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file, to its end without `size`; tried again while the network loses them."""
        end = None if size is None else start + size
        return self._again(file, lambda: self._files.cat_file(self._path(file), start=start, end=end))

    def open(self, file: str) -> IO[bytes]:
        """The file for one pass from beginning to end, read ahead in large pieces."""
        return self._again(file, lambda: self._files.open(self._path(file), "rb", block_size=8 * 2**20))

    def write(self, file: str, data: bytes) -> None:
        """Write a file; object stores show it when it is complete."""
        self._again(file, lambda: self._files.pipe_file(self._path(file), data))

    def _again(self, file: str, action: Callable[[], T]) -> T:
        """Try `action` until it works or the pauses run out; a file that is not there may come back, too."""
        for pause in (*self.pauses, None):
            try:
                return action()
            except Exception as error:  # Every file system of fsspec raises its own.
                if pause is None:
                    tries = len(self.pauses) + 1
                    reason = str(error) or type(error).__name__
                    raise OpenVisionError(
                        f"{self.join(file)} cannot be read or written after {tries} tries: {reason}; "
                        "look at the network and the rights, then run the same command again"
                    ) from error
                self._sleep(pause)
        raise AssertionError("the last try returns or raises")
