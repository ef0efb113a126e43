"""The index beside a tar shard: which samples it holds, where each member lies, and its hash.

    000123.tar            members KEY.jpg, KEY.txt, KEY.json, one after the other
    000123.captions.tar   optional: KEY.json with further captions (written by `openvision data recap`)
    000123.index          safetensors: a row a sample, a column a kind of member
        spans   int64 (n, c, 2)   offset and size in the tar; -1 where a sample has no such member
        hashes  uint8 (n, c, 16)  first half of the member's SHA-256
        keys    uint8             all keys joined; key_ends int64 (n,) says where each ends

About 110 bytes a sample, read a row at a time without loading the rest. A tar that does not fit its index is an error,
not wrong bytes: sizes are compared on opening and every member's hash on reading.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from openvision.data.shards.store import LocalStore, Store
from openvision.errors import OpenVisionError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
CAPTIONS = "captions"
"""Column of the members that lie in the captions tar."""
INDEX_SUFFIX = ".index"
CAPTIONS_SUFFIX = ".captions.tar"
_HASH_BYTES = 16
_VERSION = 2


@dataclass(frozen=True)
class Entry:
    """One sample of a shard."""

    key: str
    spans: dict[str, tuple[int, int]]
    """Kind of member -> offset and size, in the tar or (for `captions`) in the captions tar."""
    hashes: dict[str, bytes]


@dataclass(frozen=True)
class ShardInfo:
    """What the head of an index says."""

    tar_bytes: int
    captions_bytes: int | None
    """Size of the captions tar; None without one."""
    samples: int
    kinds: tuple[str, ...]
    rejected: tuple[tuple[str, str], ...] = ()
    """Key and reason of what the tar holds and no sample is made of."""


@dataclass
class _Table:
    """Members of a tar while it is read, by key in order of first appearance."""

    rows: dict[str, dict[str, tuple[int, int, bytes]]] = field(default_factory=dict)
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, offset: int, data: bytes) -> None:
        # As webdataset does it: the key ends at the first dot of the file name and keeps its folder.
        folder, slash, file = name.removeprefix("./").rpartition("/")
        stem, _, kind = file.partition(".")
        key, kind = folder + slash + stem, kind.lower()
        row = self.rows.setdefault(key, {})
        if kind in row:
            self.rejected.append((key, "duplicate_key"))
        else:
            row[kind] = (offset, len(data), hashlib.sha256(data).digest()[:_HASH_BYTES])


def index_name(tar: str) -> str:
    """Name of the index of a shard."""
    return tar.removesuffix(".tar") + INDEX_SUFFIX


def captions_name(tar: str) -> str:
    """Name of the captions tar of a shard."""
    return tar.removesuffix(".tar") + CAPTIONS_SUFFIX


def build_index(store: Store, tar: str) -> bytes:
    """Read a whole shard and give the bytes of its index.

    Samples without a picture and members that come twice are kept out and listed. Raises OpenVisionError for a tar
    that is cut short.
    """
    table = _read_tar(store, tar)
    captions_bytes = None
    if store.exists(captions_name(tar)):
        captions_bytes = _add_captions(store, captions_name(tar), table)
    for key in [key for key, row in table.rows.items() if not any(kind in row for kind in IMAGE_EXTENSIONS)]:
        table.rejected.append((key, "no_picture"))
        del table.rows[key]
    kinds = tuple(sorted({kind for row in table.rows.values() for kind in row}))
    head = {
        "version": _VERSION,
        "tar_bytes": store.size(tar),
        "captions_bytes": captions_bytes,
        "kinds": kinds,
        "rejected": table.rejected,
    }
    return save(_tensors(table.rows, kinds), metadata={"openvision": json.dumps(head)})


def _read_tar(store: Store, tar: str) -> _Table:
    table = _Table()
    size = store.size(tar)
    try:
        with store.open(tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for name, offset, data in _members(archive):
                table.add(name, offset, data)
            if size < archive.offset + 2 * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("the end marker is missing")
    except (tarfile.TarError, OSError, EOFError) as error:
        where = store.join(tar)
        raise OpenVisionError(
            f"shard {where} is truncated or not a tar: {error}; download or write it again"
        ) from error
    return table


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, int, bytes]]:
    for member in archive:
        if member.isfile():
            opened = archive.extractfile(member)
            data = opened.read() if opened else b""
            if len(data) != member.size:
                raise tarfile.ReadError("unexpected end of data")
            yield member.name, member.offset_data, data


def _add_captions(store: Store, tar: str, table: _Table) -> int:
    """Put the members of the captions tar beside those of their samples; one of an unknown sample is listed."""
    for key, row in _read_tar(store, tar).rows.items():
        if key in table.rows and "json" in row:
            table.rows[key][CAPTIONS] = row["json"]
        else:
            table.rejected.append((key, "caption_without_sample"))
    return store.size(tar)


def _tensors(rows: dict[str, dict[str, tuple[int, int, bytes]]], kinds: tuple[str, ...]) -> dict[str, np.ndarray]:
    spans = np.full((len(rows), len(kinds), 2), -1, dtype=np.int64)
    hashes = np.zeros((len(rows), len(kinds), _HASH_BYTES), dtype=np.uint8)
    for number, row in enumerate(rows.values()):
        for column, kind in enumerate(kinds):
            if kind in row:
                offset, size, digest = row[kind]
                spans[number, column] = offset, size
                hashes[number, column] = np.frombuffer(digest, dtype=np.uint8)
    names = [key.encode() for key in rows]
    return {
        "spans": spans,
        "hashes": hashes,
        "keys": np.frombuffer(b"".join(names), dtype=np.uint8),
        "key_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
    }


class ShardIndex:
    """The index of one shard, read a row at a time."""

    def __init__(self, store: Store, tar: str) -> None:
        """Open the index of `tar`; raises OpenVisionError when it is missing, broken or of another version."""
        name = index_name(tar)
        try:
            if isinstance(store, LocalStore):
                file: Any = safe_open(store.join(name), "np")
                head = file.metadata()
                self._slices: dict[str, Any] = {part: file.get_slice(part) for part in file.keys()}  # noqa: SIM118
            else:
                data = store.read(name)
                head = _metadata(data)
                self._slices = dict(load(data))
            self.info = _info(head, self._slices)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise OpenVisionError(
                f"index {store.join(name)} cannot be read ({error}); make it again with `openvision data index "
                f"{store.name} --rebuild`"
            ) from error

    def __len__(self) -> int:
        return self.info.samples

    def key(self, row: int) -> str:
        """Key of a sample."""
        begin = int(self._slices["key_ends"][row - 1 : row][0]) if row else 0
        end = int(self._slices["key_ends"][row : row + 1][0])
        return self._slices["keys"][begin:end].tobytes().decode()

    def keys(self) -> list[str]:
        """All keys, in order."""
        ends = self._slices["key_ends"][:].tolist()
        joined = self._slices["keys"][:].tobytes()
        return [joined[begin:end].decode() for begin, end in zip([0, *ends], ends, strict=False)]

    def __getitem__(self, row: int) -> Entry:
        spans = self._slices["spans"][row : row + 1][0].tolist()
        hashes = self._slices["hashes"][row : row + 1][0]
        present = [(column, kind) for column, kind in enumerate(self.info.kinds) if spans[column][0] >= 0]
        return Entry(
            key=self.key(row),
            spans={kind: (spans[column][0], spans[column][1]) for column, kind in present},
            hashes={kind: hashes[column].tobytes() for column, kind in present},
        )


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]


def _info(metadata: dict[str, str], parts: dict[str, Any]) -> ShardInfo:
    head = json.loads(metadata["openvision"])
    if head["version"] != _VERSION:
        raise ValueError(f"version {head['version']} instead of {_VERSION}")
    ends = parts["key_ends"]
    count = (ends.get_shape() if hasattr(ends, "get_shape") else ends.shape)[0]
    return ShardInfo(
        tar_bytes=head["tar_bytes"],
        captions_bytes=head["captions_bytes"],
        samples=count,
        kinds=tuple(head["kinds"]),
        rejected=tuple((key, reason) for key, reason in head["rejected"]),
    )


# Members of a sample lie side by side: they are read at once, with whatever small gaps there are.
_GAP = 64 * 1024


def read_members(store: Store, tar: str, entry: Entry) -> dict[str, bytes]:
    """The members of one sample by kind, each compared with its hash in the index."""
    inside = {kind: span for kind, span in entry.spans.items() if kind != CAPTIONS}
    members = _read_spans(store, tar, inside)
    if CAPTIONS in entry.spans:
        members |= _read_spans(store, captions_name(tar), {CAPTIONS: entry.spans[CAPTIONS]})
    for kind, data in members.items():
        if len(data) != entry.spans[kind][1]:
            raise OpenVisionError(f"shard {store.join(tar)} ends early: it was cut while in use; restore it, run again")
        if hashlib.sha256(data).digest()[:_HASH_BYTES] != entry.hashes[kind]:
            raise OpenVisionError(
                f"shard {store.join(tar)}: {entry.key}.{kind} is not what its index says: the shard was changed or "
                f"damaged; restore it, or accept it as it is with `openvision data index {store.name} --rebuild`"
            )
    return members


def _read_spans(store: Store, file: str, spans: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    begin = min(offset for offset, _ in spans.values())
    end = max(offset + size for offset, size in spans.values())
    if end - begin > sum(size for _, size in spans.values()) + _GAP:
        return {kind: store.read(file, offset, size) for kind, (offset, size) in spans.items()}
    data = store.read(file, begin, end - begin)
    return {kind: data[offset - begin : offset - begin + size] for kind, (offset, size) in spans.items()}
