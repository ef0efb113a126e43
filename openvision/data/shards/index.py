"""The index of a tar shard: its samples, with offset, size and hash of every member.

    000123.tar            members KEY.jpg, KEY.txt, KEY.json, one sample after the other
    000123.captions.tar   optional: KEY.json with further captions (written by `openvision data recap`)
    000123.index          safetensors: a row for each sample, a column for each kind of member
        spans   int64 (n, c, 2)   offset and size in the tar; -1 where a sample has no such member
        hashes  uint8 (n, c, 16)  first half of the member's SHA-256
        keys    uint8             all keys joined; key_ends int64 (n,) are their ends

About 110 bytes a sample, read row by row. A tar that does not match its index raises an error: sizes are compared on
opening, and the hash of every member on reading.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NoReturn, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from openvision.data.shards.store import LocalStore, Store
from openvision.data.shards.tar import open_tar
from openvision.errors import OpenVisionError
from openvision.untrusted import check_count, is_texts, is_utf8, load_json

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
OTHER_IMAGES = frozenset(
    ("gif", "bmp", "tif", "tiff", "ppm", "avif", "heic", "heif", "jxl", "jp2", "jfif", "ico", "svg"),
)
"""Extensions of images that shards do not store; `openvision data make` converts most of them."""
CAPTIONS = "captions"
"""Column of the members in the captions tar."""
INDEX_SUFFIX = ".index"
CAPTIONS_SUFFIX = ".captions.tar"
MAX_BYTES = 2**60
_HASH_BYTES = 16
_VERSION = 2
_DTYPE_NAMES = {"<i8": "I64", "|u1": "U8"}
# The reason as it is stored: it is part of the index's hash, and so of the identity of a data set.
_STORED_NO_IMAGE, NO_IMAGE = "no_picture", "no_image"


@dataclass(frozen=True)
class Entry:
    """One sample of a shard."""

    key: str
    spans: dict[str, tuple[int, int]]
    """Kind of member -> offset and size in the tar; for `captions`, in the captions tar."""
    hashes: dict[str, bytes]


@dataclass(frozen=True)
class ShardInfo:
    """Header of an index."""

    tar_bytes: int
    captions_bytes: int | None
    """Size of the captions tar; None without one."""
    samples: int
    kinds: tuple[str, ...]
    rejected: tuple[tuple[str, str], ...] = ()
    """Key and reason of members that are not part of a sample."""
    key_bytes: int = 0
    """Length of all keys."""


@dataclass
class _Table:
    """Members of a tar by key, in order of first appearance."""

    rows: dict[str, dict[str, tuple[int, int, bytes]]] = field(default_factory=dict)
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, offset: int, data: bytes) -> None:
        key, kind = split_member_name(name)
        row = self.rows.setdefault(key, {})
        if kind == CAPTIONS:
            # It would pass for a member of the captions tar.
            self.rejected.append((key, "bad_name"))
        elif kind in row:
            self.rejected.append((key, "duplicate_key"))
        else:
            row[kind] = (offset, len(data), hashlib.sha256(data).digest()[:_HASH_BYTES])


def split_member_name(name: str) -> tuple[str, str]:
    """Key and kind of a member as in webdataset: the key keeps the folder and ends at the first dot after it."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, kind = file.partition(".")
    return folder + slash + stem, kind.lower()


def is_key(key: str) -> bool:
    """Whether a key names a sample: it is UTF-8, and not empty as that of `._000.jpg`, which macOS adds."""
    return bool(key.rpartition("/")[2]) and is_utf8(key)


def index_name(tar: str) -> str:
    """Name of the index of a shard."""
    return tar.removesuffix(".tar") + INDEX_SUFFIX


def captions_name(tar: str) -> str:
    """Name of the captions tar of a shard."""
    return tar.removesuffix(".tar") + CAPTIONS_SUFFIX


def current_reason(stored: str) -> str:
    """A reason from an index or manifest under its present name."""
    return NO_IMAGE if stored == _STORED_NO_IMAGE else stored


def build_index(store: Store, tar: str) -> bytes:
    """Read a whole shard and return the bytes of its index.

    Samples without an image that is read, samples whose name is empty or not UTF-8, and repeated members are left out
    and listed. Raises OpenVisionError for a tar that is truncated or damaged.
    """
    table = _read_tar(store, tar)
    captions_bytes = None
    if store.exists(captions_name(tar)):
        captions_bytes = _add_captions(store, captions_name(tar), table)
    for key, reason in [(key, _reason(key, row)) for key, row in table.rows.items()]:
        if reason is not None:
            table.rejected.append((key, reason))
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


def _reason(key: str, kinds: Collection[str]) -> str | None:
    """Why the members of these kinds are no sample; None if they are one."""
    if not is_key(key) or not all(map(is_utf8, kinds)):
        return "bad_name"
    if any(kind in kinds for kind in IMAGE_EXTENSIONS):
        return None
    return "unsupported_image" if any(kind in kinds for kind in OTHER_IMAGES) else _STORED_NO_IMAGE


def _read_tar(store: Store, tar: str) -> _Table:
    table = _Table()
    with open_tar(store, tar) as members:
        for member in members:
            table.add(member.name, member.offset, member.read())
    return table


def _add_captions(store: Store, tar: str, table: _Table) -> int:
    """Add the members of the captions tar to their samples and return its size; those without a sample are listed."""
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


class _Column(Protocol):
    """An array, or a slice of a safetensors file that reads ranges as arrays."""

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


# What a damaged index raises where it is read.
_DAMAGES = (SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError)


class ShardIndex:
    """The index of one shard, read row by row."""

    def __init__(self, store: Store, tar: str) -> None:
        """Open the index of `tar`; raises OpenVisionError when it is missing, broken or of another version."""
        self._store, self._name = store, index_name(tar)
        self._columns: dict[str, _Column] = {}
        layout: dict[str, tuple[object, list[int]]] = {}
        try:
            if isinstance(store, LocalStore):
                file = safe_open(store.join(self._name), "np")
                head = file.metadata()
                for part in file.keys():  # noqa: SIM118
                    column = file.get_slice(part)
                    self._columns[part], layout[part] = column, (column.get_dtype(), column.get_shape())
            else:
                data = store.read(self._name)
                head = _metadata(data)
                for part, array in load(data).items():
                    self._columns[part] = array
                    layout[part] = (_DTYPE_NAMES.get(array.dtype.str), list(array.shape))
            self.info = _info(head, layout)
        except _DAMAGES as error:
            self._refuse(error)

    def _refuse(self, error: Exception) -> NoReturn:
        raise OpenVisionError(
            f"index {self._store.join(self._name)} cannot be read ({error}); rebuild it with `openvision data index "
            f"{self._store.name} --rebuild`"
        ) from error

    def __len__(self) -> int:
        return self.info.samples

    def key(self, row: int) -> str:
        """Key of a sample; this and the other readers raise OpenVisionError for an index that is damaged."""
        try:
            begin = int(self._columns["key_ends"][row - 1 : row][0]) if row else 0
            end = int(self._columns["key_ends"][row : row + 1][0])
            check_count("the end of a key", end, begin, self.info.key_bytes)
            return self._columns["keys"][check_count("the begin of a key", begin, 0, end) : end].tobytes().decode()
        except _DAMAGES as error:
            self._refuse(error)

    def keys(self) -> list[str]:
        """All keys, in order."""
        if not len(self):
            return []
        try:
            ends = self._columns["key_ends"][:].tolist()
            if ends[-1] != self.info.key_bytes or any(begin > end for begin, end in pairwise([0, *ends])):
                raise ValueError("the ends of its keys are not in order")
            joined = self._columns["keys"][:].tobytes()
            return [joined[begin:end].decode() for begin, end in pairwise([0, *ends])]
        except _DAMAGES as error:
            self._refuse(error)

    def __getitem__(self, row: int) -> Entry:
        try:
            spans = self._columns["spans"][row : row + 1][0].tolist()
            hashes = self._columns["hashes"][row : row + 1][0]
        except _DAMAGES as error:
            self._refuse(error)
        present = [(column, kind) for column, kind in enumerate(self.info.kinds) if spans[column][0] >= 0]
        entry = Entry(
            key=self.key(row),
            spans={kind: (spans[column][0], spans[column][1]) for column, kind in present},
            hashes={kind: hashes[column].tobytes() for column, kind in present},
        )
        self._check_spans(entry)
        return entry

    def _check_spans(self, entry: Entry) -> None:
        if not any(kind in entry.spans for kind in IMAGE_EXTENSIONS):
            self._refuse(ValueError(f"{entry.key} has no image"))
        for kind, (offset, size) in entry.spans.items():
            most = (self.info.captions_bytes or 0) if kind == CAPTIONS else self.info.tar_bytes
            if size < 0 or offset + size > most:
                self._refuse(ValueError(f"{entry.key}.{kind} lies outside its tar"))


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    return load_json(data[8 : 8 + length])["__metadata__"]


def _info(metadata: dict[str, str], layout: dict[str, tuple[object, list[int]]]) -> ShardInfo:
    """The header and the shapes of an index; raises one of `_DAMAGES` unless `build_index` may have written them."""
    head = load_json(metadata["openvision"])
    if head["version"] != _VERSION:
        raise ValueError(f"version {head['version']} instead of {_VERSION}")
    kinds, rejected, captions_bytes = head["kinds"], head["rejected"], head["captions_bytes"]
    if not is_texts(kinds) or len(set(kinds)) < len(kinds):
        raise ValueError("kinds are no list of different names")
    if not isinstance(rejected, list) or not all(is_texts(each) and len(each) == 2 for each in rejected):
        raise ValueError("rejected is no list of keys and reasons")
    samples, keys = layout["key_ends"][1][0], layout["keys"][1][0]
    expected = {
        "spans": ("I64", [samples, len(kinds), 2]),
        "hashes": ("U8", [samples, len(kinds), _HASH_BYTES]),
        "keys": ("U8", [keys]),
        "key_ends": ("I64", [samples]),
    }
    for part, (dtype, shape) in expected.items():
        if layout[part] != (dtype, shape):
            raise ValueError(f"{part} is {layout[part][0]} {layout[part][1]} instead of {dtype} {shape}")
    return ShardInfo(
        tar_bytes=check_count("tar_bytes", head["tar_bytes"], 0, MAX_BYTES),
        captions_bytes=None if captions_bytes is None else check_count("captions_bytes", captions_bytes, 0, MAX_BYTES),
        samples=samples,
        kinds=tuple(kinds),
        rejected=tuple((key, current_reason(reason)) for key, reason in rejected),
        key_bytes=keys,
    )


# Members of a sample are adjacent: they are read in one request, including gaps up to this size.
_GAP = 64 * 1024


def read_members(store: Store, tar: str, entry: Entry) -> dict[str, bytes]:
    """Kind -> bytes of the members of one sample, verified against their hashes in the index."""
    inside = {kind: span for kind, span in entry.spans.items() if kind != CAPTIONS}
    members = _read_spans(store, tar, inside)
    if CAPTIONS in entry.spans:
        members |= _read_spans(store, captions_name(tar), {CAPTIONS: entry.spans[CAPTIONS]})
    for kind, data in members.items():
        if len(data) != entry.spans[kind][1]:
            raise OpenVisionError(
                f"shard {store.join(tar)} ends early: it was truncated while in use; restore it and run again"
            )
        if hashlib.sha256(data).digest()[:_HASH_BYTES] != entry.hashes[kind]:
            raise OpenVisionError(
                f"shard {store.join(tar)}: {entry.key}.{kind} does not match its index: the shard was changed or "
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
