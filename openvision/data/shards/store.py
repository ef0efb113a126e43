"""Storage of shards: a folder on disk, or any URL that fsspec reads (s3://, gs://, https://, memory://, ...).

A store reads whole files and byte ranges. Network failures are retried with growing pauses, then raised as one
OpenVisionError; disk failures are raised at once.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol, TypeVar, cast

from openvision.errors import OpenVisionError
from openvision.files import JsonObject, atomic_write_bytes, check_file

T = TypeVar("T")

# Seconds between retries: half a minute in all, longer than the usual hiccup of an object store.
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


class Store(Protocol):
    """A folder of files, local or remote; picklable."""

    @property
    def name(self) -> str:
        """Path or URL of the folder."""
        ...

    def join(self, file: str) -> str:
        """Path or URL of a file in it."""
        ...

    def sizes(self, suffix: str) -> dict[str, int]:
        """Size in bytes of every file whose name ends in `suffix`, by name, sorted."""
        ...

    def exists(self, file: str) -> bool:
        """Whether the file exists."""
        ...

    def size(self, file: str) -> int:
        """Size of a file in bytes; raises OpenVisionError when it does not exist."""
        ...

    def read(self, file: str, start: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file, to its end without `size`; fewer when it ends early. Raises OpenVisionError."""
        ...

    def open(self, file: str) -> IO[bytes]:
        """Open a file for sequential reading; raises the exceptions of the file system."""
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
        raise OpenVisionError(f"shard folder {path} does not exist; check the path")
    return LocalStore(path)


def join_folder(base: str | Path, name: str) -> str | Path:
    """Folder `name` inside a folder or URL; an absolute path or a URL is returned as it is."""
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
        """Path or URL of the folder."""
        return str(self.folder)

    def join(self, file: str) -> str:
        """Path of a file in it."""
        return str(self.folder / file)

    def sizes(self, suffix: str) -> dict[str, int]:
        """Size of every file whose name ends in `suffix`, by name, sorted; without hidden files.

        Raises OpenVisionError for a pipe, a folder or a dangling link of such a name.
        """
        with os.scandir(self.folder) as entries:
            names = [each.name for each in entries if each.name.endswith(suffix) and not each.name.startswith(".")]
        return {name: self.size(name) for name in sorted(names)}

    def exists(self, file: str) -> bool:
        """Whether the file exists; raises OpenVisionError for a pipe, a folder or a dangling link of that name."""
        return os.path.lexists(self.folder / file) and self.size(file) >= 0

    def size(self, file: str) -> int:
        """Size of a file in bytes; raises OpenVisionError when it does not exist or is no regular file."""
        return check_file(self.folder / file).st_size

    def is_newer(self, file: str, other: str) -> bool:
        """Whether `file` was modified after `other`."""
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
        """Open a file for sequential reading."""
        return open(self.folder / file, "rb")

    def write(self, file: str, data: bytes) -> None:
        """Write a file completely or not at all."""
        atomic_write_bytes(self.folder / file, data)


class _FileSystem(Protocol):
    """The part of an fsspec file system that is used here."""

    def ls(self, path: str, detail: bool, refresh: bool) -> list[JsonObject]: ...
    def exists(self, path: str) -> bool: ...
    def info(self, path: str) -> JsonObject: ...
    def cat_file(self, path: str, start: int, end: int | None) -> bytes: ...
    def open(self, path: str, mode: str, block_size: int) -> IO[bytes]: ...
    def pipe_file(self, path: str, value: bytes) -> None: ...


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
        self._files = cast(_FileSystem, filesystem)

    def __getstate__(self) -> dict[str, object]:
        # Connections do not survive a fork: every process opens its own.
        return {"url": self.url, "pauses": self.pauses, "_sleep": self._sleep}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._connect()

    @property
    def name(self) -> str:
        """Path or URL of the folder."""
        return self.url

    def join(self, file: str) -> str:
        """URL of a file in it."""
        return f"{self.url}/{file}"

    def _path(self, file: str) -> str:
        return f"{self._root.rstrip('/')}/{file}"

    def sizes(self, suffix: str) -> dict[str, int]:
        """Size of every file whose name ends in `suffix`, by name, sorted."""
        entries = self._retry("", lambda: self._files.ls(self._root, detail=True, refresh=True))
        named = {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] for entry in entries}
        return {name: named[name] for name in sorted(named) if name.endswith(suffix)}

    def exists(self, file: str) -> bool:
        """Whether the file exists."""
        return bool(self._retry(file, lambda: self._files.exists(self._path(file))))

    def size(self, file: str) -> int:
        """Size of a file in bytes; raises OpenVisionError when it does not exist."""
        return int(self._retry(file, lambda: self._files.info(self._path(file))["size"]))

    def read(self, file: str, start: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file, to its end without `size`; retried after network failures."""
        end = None if size is None else start + size
        return self._retry(file, lambda: self._files.cat_file(self._path(file), start=start, end=end))

    def open(self, file: str) -> IO[bytes]:
        """Open a file for sequential reading in large blocks."""
        return self._retry(file, lambda: self._files.open(self._path(file), "rb", block_size=8 * 2**20))

    def write(self, file: str, data: bytes) -> None:
        """Write a file; in object stores it appears when it is complete."""
        self._retry(file, lambda: self._files.pipe_file(self._path(file), data))

    def _retry(self, file: str, action: Callable[[], T]) -> T:
        """Retry `action` until it succeeds or the pauses run out; missing files too, which may come back."""
        for pause in (*self.pauses, None):
            try:
                return action()
            except Exception as error:  # Every file system of fsspec raises its own.
                if pause is None:
                    attempts = len(self.pauses) + 1
                    reason = str(error) or type(error).__name__
                    raise OpenVisionError(
                        f"{self.join(file)} cannot be read or written after {attempts} attempts: {reason}; "
                        "check the network and permissions, then run the same command again"
                    ) from error
                self._sleep(pause)
        raise AssertionError("the last attempt returns or raises")


class ReadAheadStore:
    """Wraps a store: reads ranges in blocks of 8 MiB and caches the 32 most recent, so that samples next to each other
    cost few requests."""

    def __init__(self, store: Store, block: int = 8 * 2**20, blocks: int = 32) -> None:
        self.store = store
        self.block = block
        self.blocks = blocks
        self._cached: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> "tuple[type[ReadAheadStore], tuple[Store, int, int]]":
        return ReadAheadStore, (self.store, self.block, self.blocks)

    @property
    def name(self) -> str:
        """As in the store."""
        return self.store.name

    def join(self, file: str) -> str:
        """As in the store."""
        return self.store.join(file)

    def sizes(self, suffix: str) -> dict[str, int]:
        """As in the store."""
        return self.store.sizes(suffix)

    def exists(self, file: str) -> bool:
        """As in the store."""
        return self.store.exists(file)

    def size(self, file: str) -> int:
        """As in the store."""
        return self.store.size(file)

    def open(self, file: str) -> IO[bytes]:
        """As in the store."""
        return self.store.open(file)

    def write(self, file: str, data: bytes) -> None:
        """As in the store."""
        self.store.write(file, data)

    def read(self, file: str, start: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file; a read without `size` bypasses the cache."""
        if size is None:
            return self.store.read(file, start)
        first, last = start // self.block, (start + size - 1) // self.block
        joined = b"".join(self._read_block(file, number) for number in range(first, last + 1))
        begin = start - first * self.block
        return joined[begin : begin + size]

    def _read_block(self, file: str, number: int) -> bytes:
        # Fetched under the lock: threads that want the same block wait for one request instead of making several.
        with self._lock:
            data = self._cached.pop((file, number), None)
            if data is None:
                data = self.store.read(file, number * self.block, self.block)
            self._cached[file, number] = data
            if len(self._cached) > self.blocks:
                self._cached.popitem(last=False)
            return data
