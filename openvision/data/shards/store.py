"""Storage of shards: a folder on disk, or any URL that fsspec reads (s3://, gs://, https://, memory://, ...).

A store reads whole files and byte ranges. Network failures are retried with growing pauses, then raised as one
OpenVisionError; disk failures are raised at once.
"""

import os
import posixpath
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Protocol, TypeVar, cast

from openvision.data.shards.selection import SEPARATOR, names_tars, select
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

    @property
    def tars(self) -> tuple[str, ...] | None:
        """The shards that were chosen; None for a whole folder."""
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
    """The store of a folder, of a URL, or of tars that are named (selection.py).

    Raises OpenVisionError when a local folder, or one of the named tars, does not exist.
    """
    text = os.fspath(folder).removeprefix("file://")
    if names_tars(text):
        return _open_selection(text)
    if "://" in text:
        return RemoteStore(text.rstrip("/"))
    if not Path(text).is_dir():
        if Path(text).exists():
            raise OpenVisionError(f"{text} is a file and no shard; name a folder of shards, or .tar files")
        raise OpenVisionError(f"shard folder {text} does not exist; check the path")
    return LocalStore(Path(text))


def _open_selection(source: str) -> Store:
    chosen = select(source)
    store: LocalStore | RemoteStore
    if "://" in chosen.base:
        store = RemoteStore(chosen.base)
        store.select(source, chosen.tars)
    else:
        if not Path(chosen.base).is_dir():
            raise OpenVisionError(f"data source {source!r}: folder {chosen.base} does not exist; check the path")
        store = LocalStore(Path(chosen.base))
        store.select(source, chosen.tars)
    missing = sorted(set(chosen.tars) - store.sizes(".tar").keys())
    if missing:
        more = f", and {len(missing) - 1} more of {len(chosen.tars)}" if len(missing) > 1 else ""
        raise OpenVisionError(
            f"shard {store.join(missing[0])} does not exist{more}; correct the data source {source!r}"
        )
    return store


def join_folder(base: str | Path, name: str) -> str | Path:
    """Folder `name` inside a folder or URL; an absolute path or a URL is returned as it is.

    A list of tars is joined one by one.
    """
    if SEPARATOR in name:
        return SEPARATOR.join(str(join_folder(base, one.strip())) for one in name.split(SEPARATOR))
    if "://" in name:
        return name
    if isinstance(base, str) and "://" in base:
        return f"{base.rstrip('/')}/{name}"
    return Path(base) / name


class _Selecting:
    """A folder of which some shards were chosen; without a choice it is the whole folder."""

    source: str | None = None
    tars: tuple[str, ...] | None = None

    def select(self, source: str, tars: tuple[str, ...]) -> None:
        """Show these shards alone, which `source` names, and the files beside them."""
        self.source, self.tars = source, tars

    def _folders(self) -> list[str]:
        """Folders to list, relative to the store: "" for its own."""
        return sorted({tar.rpartition("/")[0] for tar in self.tars}) if self.tars is not None else [""]

    def _chosen(self, names: Iterable[str]) -> list[str]:
        """The files that are shown, sorted by name: `KEY.tar` with `KEY.index` and `KEY.captions.tar`."""
        if self.tars is not None:
            stems = {tar.removesuffix(".tar") for tar in self.tars}
            names = [name for name in names if _BESIDE.sub("", name) in stems]
        return sorted(names)


_BESIDE = re.compile(r"(\.captions)?\.tar$|\.index$")


class LocalStore(_Selecting):
    """A folder on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        """Path of the folder, or the source that chose shards of it."""
        return self.source or str(self.folder)

    def join(self, file: str) -> str:
        """Path of a file in it."""
        return str(self.folder / file)

    def sizes(self, suffix: str) -> dict[str, int]:
        """Size of every file whose name ends in `suffix`, by name, sorted; without hidden files.

        Raises OpenVisionError for a pipe, a folder or a dangling link of such a name.
        """
        found: list[str] = []
        for part in self._folders():
            place = self.folder / part
            with os.scandir(place) if place.is_dir() else nullcontext(()) as entries:
                found += [
                    posixpath.join(part, entry.name)
                    for entry in entries
                    if entry.name.endswith(suffix) and not entry.name.startswith(".")
                ]
        return {name: self.size(name) for name in self._chosen(found)}

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


class RemoteStore(_Selecting):
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
        return {"url": self.url, "pauses": self.pauses, "_sleep": self._sleep, "source": self.source, "tars": self.tars}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._connect()

    @property
    def name(self) -> str:
        """URL of the folder, or the source that chose shards of it."""
        return self.source or self.url

    def join(self, file: str) -> str:
        """URL of a file in it."""
        return f"{self.url}/{file}"

    def _path(self, file: str) -> str:
        return f"{self._root.rstrip('/')}/{file}"

    def sizes(self, suffix: str) -> dict[str, int]:
        """Size of every file whose name ends in `suffix`, by name, sorted."""
        found: dict[str, int] = {}
        for part in self._folders():
            place = self._path(part).rstrip("/")
            entries = self._retry(part, lambda place=place: self._files.ls(place, detail=True, refresh=True))
            named = {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] for entry in entries}
            found |= {posixpath.join(part, name): size for name, size in named.items() if name.endswith(suffix)}
        return {name: found[name] for name in self._chosen(found)}

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

    @property
    def tars(self) -> tuple[str, ...] | None:
        """As in the store."""
        return self.store.tars

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
