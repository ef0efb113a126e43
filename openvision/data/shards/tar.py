"""Members of a tar shard, in order, and whether the tar is whole: the one reader of tars, for data from strangers.

`tarfile` takes the first header that it cannot read, and the first block of zeros, for the end of the archive, so a
single damaged header would hide every sample behind it. Here what follows the last member must be zeros to the end of
the file; anything else raises an error that says where the tar broke and how much lies behind.
"""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from openvision.data.shards.store import Store
from openvision.errors import OpenVisionError

_BLOCK = tarfile.BLOCKSIZE
# The end marker.
_END_BLOCKS = 2
_READ_AT_ONCE = 2**20
_MAGIC, _MAGIC_AT = b"ustar", 257


@dataclass(frozen=True)
class TarMember:
    """One file in a tar; its data can be read while the tar is open."""

    name: str
    """As stored; bytes that are not UTF-8 are lone surrogates, as in file names."""
    offset: int
    """Where the data begin, bytes."""
    size: int
    _store: Store
    _tar: str
    _file: IO[bytes]

    def read(self) -> bytes:
        """The data; raises OpenVisionError where the tar ends early."""
        with _said(self._store, self._tar):
            self._file.seek(self.offset)
            data = self._file.read(self.size)
            if len(data) != self.size:
                raise tarfile.ReadError("unexpected end of data")
        return data


@contextmanager
def open_tar(store: Store, name: str) -> Iterator[Iterator[TarMember]]:
    """The files in a tar, in order, to be read within the block.

    Iterating raises OpenVisionError at the end of a tar that is truncated, damaged or not a tar.
    """
    size = store.size(name)
    with _said(store, name):
        file = store.open(name)
    with file:
        yield _members(store, name, file, size)


def _members(store: Store, name: str, file: IO[bytes], size: int) -> Iterator[TarMember]:
    with _said(store, name), tarfile.open(fileobj=file, mode="r:") as archive:
        start = -1
        while (member := archive.next()) is not None:
            # Old versions of tarfile follow a negative size backwards, for ever.
            if member.offset <= start or member.size < 0:
                raise tarfile.ReadError(f"the header at byte {member.offset} has an impossible size")
            start = member.offset
            # A sparse file of a few bytes can claim any size.
            if member.isfile() and not member.issparse():
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                yield TarMember(member.name, member.offset_data, member.size, store, name, file)
        _check_end(file, archive.offset, size)


def check_whole(store: Store, name: str) -> None:
    """Read every header and the end of a tar; raises OpenVisionError as `open_tar` does."""
    with open_tar(store, name) as members:
        for _ in members:
            pass


@contextmanager
def _said(store: Store, name: str) -> Iterator[None]:
    try:
        yield
    except OpenVisionError:
        raise
    # Headers from strangers make tarfile raise more than its own errors: ValueError, OverflowError, struct.error.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise OpenVisionError(
            f"shard {store.join(name)} is truncated or not a tar: {reason}; download or write it again"
        ) from error


def _check_end(file: IO[bytes], end: int, size: int) -> None:
    """Raise ReadError unless the end marker begins at byte `end` and zeros follow it to the end of the file."""
    if size < end + _END_BLOCKS * _BLOCK:
        raise tarfile.ReadError("the end marker is missing")
    file.seek(end)
    place = end
    while data := file.read(_READ_AT_ONCE):
        if data.count(0) < len(data):
            first = place + len(data) - len(data.lstrip(b"\0"))
            broken = first // _BLOCK * _BLOCK
            lost = f"{size - broken} bytes with {_count_headers(file, broken, size)} readable members follow"
            what = "the header is damaged" if broken == end else "a block of zeros ends it"
            raise tarfile.ReadError(f"{what} at byte {end}, but {lost}")
        place += len(data)


def _count_headers(file: IO[bytes], start: int, size: int) -> int:
    """Members whose headers can be read from byte `start` on, a multiple of the block."""
    found = 0
    for begin in range(start, size, _READ_AT_ONCE):
        file.seek(begin)
        data = file.read(_READ_AT_ONCE)
        place = data.find(_MAGIC)
        while place >= 0:
            block = place - _MAGIC_AT
            if block >= 0 and block % _BLOCK == 0 and _is_header(data[block : block + _BLOCK]):
                found += 1
            place = data.find(_MAGIC, place + 1)
    return found


def _is_header(block: bytes) -> bool:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").isfile()
    except (tarfile.TarError, ValueError):
        return False
