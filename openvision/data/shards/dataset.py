"""Tar shards in the webdataset layout: a writer, and a dataset with random access.

    000000.tar     KEY.png (or .jpg, .jpeg, .webp), KEY.txt, KEY.json, one sample after the other
    000000.index   offset and hash of each member (index.py)
    shards.json    all shards of the folder (manifest.py)

By default the alt-text is the txt member, and the synthetic caption a field of the json member.
"""

import io
import json
import os
import tarfile
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import TracebackType

from openvision.data.shards.index import (
    CAPTIONS,
    IMAGE_EXTENSIONS,
    ShardIndex,
    build_index,
    index_name,
    read_members,
)
from openvision.data.shards.manifest import Shard, index_folder, open_index, open_manifest
from openvision.data.shards.store import LocalStore, ReadAheadStore, RemoteStore, Store, open_store
from openvision.errors import OpenVisionError
from openvision.files import JsonObject, atomic_write_bytes, make_folder
from openvision.images.decode import BadSampleError
from openvision.untrusted import decode_text, is_utf8, load_json, path_inside, safe_name

ALT_MEMBER = "txt"
"""Caption name of the txt member."""
# Samples read to find the names of the captions.
_PROBED_SAMPLES = 64
_OPEN_INDICES = 256
# Longest member name in the ustar format, without a folder.
_NAME_BYTES = 100


@dataclass(frozen=True)
class Sample:
    """One image with its texts."""

    key: str
    image: bytes
    """The encoded file."""
    extension: str
    """Format of the image: png, jpg, jpeg or webp."""
    alt: str | list[str]
    synthetic: str | list[str] | None
    meta: JsonObject = field(default_factory=dict)
    """Other fields of the json member and of the captions."""
    remarks: tuple[str, ...] = ()
    """What is odd about the texts although they are used: `not_utf8`, `null_in_list`."""


class ShardWriter:
    """Writes samples into `folder/000000.tar`, `000001.tar`, ... with their indices.

    A shard appears under its name when it is complete. Its bytes depend on the samples alone.
    """

    def __init__(self, folder: Path, samples_per_shard: int = 10_000) -> None:
        """Create `folder` if necessary; raises OpenVisionError when it already holds shards."""
        self.folder = make_folder(folder)
        # Leftover shards of an earlier, longer data set would be read as part of this one.
        if any(folder.glob("*.tar")):
            raise OpenVisionError(f"folder {folder} already holds shards; remove them or choose another folder")
        self.samples_per_shard = samples_per_shard
        self._shards = 0
        self._samples = 0
        self._keys: set[str] = set()
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            self._tar.close()
            self._temporary().unlink(missing_ok=True)

    def close(self) -> None:
        """Finish the last shard and write the manifest."""
        self._finish_shard()
        if self._shards:
            index_folder(LocalStore(self.folder))

    def write(self, key: str, image: bytes, extension: str, text: str, meta: JsonObject) -> None:
        """Append one sample: `text` is the alt-text, `meta` the json member, including the synthetic caption.

        Raises OpenVisionError for a repeated or invalid key.
        """
        self._check_key(key)
        with self._clear_errors():
            if self._tar is None:
                self._tar = tarfile.open(self._temporary(), "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            self._add(f"{key}.{extension}", image)
            self._add(f"{key}.txt", text.encode("utf-8"))
            # In JSON a lone surrogate stays what it was when it is spelt out.
            self._add(f"{key}.json", json.dumps(meta, ensure_ascii=False).encode("utf-8", "backslashreplace"))
        self._keys.add(key)
        self._samples += 1
        if self._samples == self.samples_per_shard:
            self._finish_shard()

    def _check_key(self, key: str) -> None:
        if not key or "/" in key or "." in key:
            raise OpenVisionError(f"key {key!r} is invalid; use a name without '/' and '.'")
        if len(f"{key}.json".encode()) > _NAME_BYTES:
            raise OpenVisionError(f"key {key!r} is too long; with its extension it may have {_NAME_BYTES} bytes")
        if key in self._keys:
            raise OpenVisionError(f"key {key!r} is written twice; give every sample its own key")

    def _add(self, name: str, data: bytes) -> None:
        assert self._tar is not None
        # A fresh TarInfo has time, user and mode fixed: the same samples give the same bytes.
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def _temporary(self) -> Path:
        return self.folder / f".{self._shards:06d}.tar.tmp"

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        path = self.folder / f"{self._shards:06d}.tar"
        with self._clear_errors():
            self._tar.close()
            # A leftover index must not pass for this shard's if the process stops between the two renames.
            (self.folder / index_name(path.name)).unlink(missing_ok=True)
            os.replace(self._temporary(), path)
        store = LocalStore(self.folder)
        store.write(index_name(path.name), build_index(store, path.name))
        self._tar, self._samples, self._shards = None, 0, self._shards + 1

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OpenVisionError(f"cannot write shards into {self.folder}: {error.strerror or error}") from error


class ShardDataset:
    """Random access to the samples of a folder of shards, ordered by shard name and member.

    The folder is local or any URL that fsspec reads. Picklable and thread-safe.
    """

    def __init__(self, folder: str | Path, synthetic_key: str = "synthetic", alt_key: str = ALT_MEMBER) -> None:
        """Open `folder`; raises OpenVisionError with the folder or shard that cannot be read.

        `alt_key` and `synthetic_key` are the names of the captions to read: "txt" is the txt member, any other name a
        field of the json member or of the captions tar.
        """
        self.store = open_store(folder)
        self.folder = self.store.name
        self.synthetic_key = synthetic_key
        self.alt_key = alt_key
        self._manifest = open_manifest(self.store)
        self._ends = list(accumulate(shard.samples for shard in self._manifest.shards))
        if not len(self):
            raise OpenVisionError(f"the shards of {self.folder} hold no sample with an image; check how they were made")
        self._indices = _Indices(self.store)

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def rejected(self) -> Counter[str]:
        """As `left_out`, with the samples whose key an earlier shard has."""
        return self._manifest.rejected

    @property
    def left_out(self) -> Counter[str]:
        """Number of members and samples left out of the index, by reason; they have no number."""
        return self._manifest.left_out

    def _locate(self, index: int) -> tuple[Shard, int]:
        """Shard of a sample, and its row in the shard's index."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect_right(self._ends, index)
        return self._manifest.shards[shard], index - (self._ends[shard - 1] if shard else 0)

    def key(self, index: int) -> str:
        """Key of a sample, without reading it."""
        shard, row = self._locate(index)
        return self._indices[shard].key(row)

    def place(self, index: int) -> tuple[str, int]:
        """Where a sample is, whatever the folder is called: SHA-256 of its shard's index, and the row there."""
        shard, row = self._locate(index)
        return shard.index_sha256, row

    def places(self) -> dict[str, range]:
        """SHA-256 of the index of each shard that has samples -> their numbers."""
        begins = [0, *self._ends]
        return {
            shard.index_sha256: range(begin, begin + shard.samples)
            for shard, begin in zip(self._manifest.shards, begins, strict=False)
            if shard.samples
        }

    def image(self, index: int) -> tuple[str, bytes]:
        """Key and encoded image of a sample, whatever its texts are; raises OpenVisionError for a broken shard."""
        shard, row = self._locate(index)
        entry = self._indices[shard][row]
        members = read_members(self.store, shard.name, entry)
        return entry.key, next(members[extension] for extension in IMAGE_EXTENSIONS if extension in members)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`; raises BadSampleError for broken json or texts, OpenVisionError for a broken shard."""
        shard, row = self._locate(index)
        entry = self._indices[shard][row]
        if index in self._manifest.duplicates:
            raise BadSampleError("duplicate_key", f"{shard.name}: an earlier shard holds the key {entry.key} too")
        members = read_members(self.store, shard.name, entry)
        extension = next(extension for extension in IMAGE_EXTENSIONS if extension in members)
        meta = parse_fields(members.get("json", b"{}"), entry.key, self.store.join(shard.name))
        if CAPTIONS in members:
            meta |= parse_fields(members[CAPTIONS], entry.key, self.store.join(shard.name))
        txt, is_plain = decode_text(members.get("txt", b""))
        remarks = [] if is_plain or ALT_MEMBER not in (self.alt_key, self.synthetic_key) else ["not_utf8"]
        alt = txt if self.alt_key == ALT_MEMBER else _pop_texts(meta, self.alt_key, entry.key, remarks) or ""
        synthetic = (
            txt if self.synthetic_key == ALT_MEMBER else _pop_texts(meta, self.synthetic_key, entry.key, remarks)
        )
        return Sample(entry.key, members[extension], extension, alt, synthetic, meta, tuple(dict.fromkeys(remarks)))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def caption_names(self) -> list[str]:
        """Names of the captions in the first samples: "txt" and fields with texts."""
        names: set[str] = set()
        for index in range(min(len(self), _PROBED_SAMPLES)):
            shard, row = self._locate(index)
            members = read_members(self.store, shard.name, self._indices[shard][row])
            names |= {ALT_MEMBER} & members.keys()
            for kind in {"json", CAPTIONS} & members.keys():
                names |= _text_fields(members[kind])
        return sorted(names)

    def require_captions(self, *names: str) -> None:
        """Raise OpenVisionError when the first samples have no caption of one of `names`."""
        known = self.caption_names()
        unknown = [name for name in names if name not in known]
        if unknown:
            raise OpenVisionError(
                f"{self.folder} holds no captions named {unknown[0]!r}; known are {', '.join(known) or 'none'}"
            )

    def read_ahead(self) -> None:
        """Read a remote folder in large blocks, for an order that keeps neighbours together."""
        if isinstance(self.store, RemoteStore):
            self.store = ReadAheadStore(self.store)

    def manifest_hash(self) -> str:
        """Identity of the data: SHA-256 over the indices, which have the hash of every member."""
        return self._manifest.sha256()

    def shard_hashes(self) -> dict[str, str]:
        """Shard -> SHA-256 of its index; `manifest_hash` is computed from these."""
        return {shard.name: shard.index_sha256 for shard in self._manifest.shards}


class _Indices:
    """LRU cache of open shard indices."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._open: OrderedDict[str, ShardIndex] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, shard: Shard) -> ShardIndex:
        with self._lock:
            index = self._open.pop(shard.name, None) or open_index(self.store, shard)
            self._open[shard.name] = index
            if len(self._open) > _OPEN_INDICES:
                self._open.popitem(last=False)
        return index

    def __reduce__(self) -> tuple[type["_Indices"], tuple[Store]]:
        return _Indices, (self.store,)


def _text_fields(data: bytes) -> set[str]:
    try:
        content = load_json(data)
    except ValueError:
        return set()
    fields = content.items() if isinstance(content, dict) else ()
    return {name for name, value in fields if isinstance(value, str) or _is_texts(value)}


def _is_texts(value: object) -> bool:
    """Whether a list holds texts, and perhaps nulls beside them."""
    texts = [text for text in value if text is not None] if isinstance(value, list) else []
    return bool(texts) and all(isinstance(text, str) for text in texts)


def all_texts(dataset: ShardDataset) -> Iterator[str]:
    """Every alt-text and synthetic caption, to learn a vocabulary from; bad samples are skipped."""
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
        except BadSampleError:
            continue
        for text in (sample.alt, sample.synthetic):
            if text is not None:
                yield from [text] if isinstance(text, str) else text


def unpack_images(dataset: ShardDataset, folder: Path, rejected: Counter[str] | None = None) -> int:
    """Write every image file into `folder`, named by the json field `name` or by its key, and return their number.

    The files are written as they are, not decoded. Of several images with the same name, the later ones get their key
    appended. Samples that cannot be used are counted in `rejected` by reason. Names come from data: `safe_name` keeps
    them inside the folder.
    """
    make_folder(folder)
    taken: set[str] = set()
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
        except BadSampleError as bad:
            if rejected is not None:
                rejected[bad.reason] += 1
            continue
        name = _free_name(sample, taken)
        taken.add(name.casefold())
        atomic_write_bytes(path_inside(folder, f"{name}.{sample.extension}"), sample.image)
    return len(taken)


def _free_name(sample: Sample, taken: set[str]) -> str:
    """A file name that no earlier image has, also where a file system ignores case."""
    own = sample.meta.get("name", "")
    name = safe_name(str(own) if isinstance(own, (str, int, float)) else "", sample.key)
    if name.casefold() in taken:
        name = safe_name(f"{name[:80]}-{sample.key[:80]}")
    base, number = name, 2
    while name.casefold() in taken:
        name, number = f"{base}-{number}", number + 1
    return name


def parse_fields(data: bytes, key: str, path: str) -> JsonObject:
    """The fields of a json member of the shard `path`; raises BadSampleError when it is not a JSON object."""
    try:
        meta = load_json(data)
    except ValueError as error:
        raise BadSampleError("bad_json", f"{path}: {key}.json is not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise BadSampleError("bad_json", f"{path}: {key}.json is not an object")
    return meta


def _pop_texts(meta: JsonObject, name: str, key: str, remarks: list[str]) -> str | list[str] | None:
    """Take a caption out of the fields; raises BadSampleError unless it is a text, texts, or null.

    Nulls and blank texts beside others in a list are left out; nulls are added to the remarks.
    """
    value = meta.pop(name, None)
    if isinstance(value, list) and None in value and any(isinstance(text, str) for text in value):
        remarks.append("null_in_list")
        value = [text for text in value if text is not None]
    if value is None or (isinstance(value, str) and is_utf8(value)):
        return value
    if isinstance(value, list) and all(isinstance(text, str) and is_utf8(text) for text in value):
        return [text for text in value if text.strip()] or value
    what = "holds half a surrogate pair" if isinstance(value, str) else "is neither a text nor a list of texts"
    raise BadSampleError("bad_text", f"{key}.json: {name!r} {what}")
