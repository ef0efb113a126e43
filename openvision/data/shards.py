"""Tar shards in the webdataset layout, written and read at random without unpacking.

    000000.tar          KEY.png (or .jpg, .jpeg, .webp), KEY.txt, KEY.json, one after the other
    000000.index.json   where each member lies and its hash (shard_index.py); made anew when missing

The alt-text is the txt member; the synthetic caption is a field of the json member.
"""

import functools
import hashlib
import io
import json
import os
import re
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

from openvision.data.bad_sample import BadSampleError
from openvision.data.shard_index import IMAGE_EXTENSIONS, index_path, load_index, read_members, write_index
from openvision.errors import OpenVisionError
from openvision.files import atomic_write_bytes, make_folder

# The longest name that the plain tar format holds without a folder.
_NAME_BYTES = 100


@dataclass(frozen=True)
class Sample:
    """One picture with its texts; `image` is the encoded file."""

    key: str
    image: bytes
    extension: str
    """Of the picture, which names its format: png, jpg, jpeg or webp."""
    alt: str | list[str]
    synthetic: str | list[str] | None
    meta: dict[str, Any] = field(default_factory=dict)


class ShardWriter:
    """Writes samples into `folder/000000.tar`, `000001.tar`, ... with their indices.

    A shard appears under its name when it is complete. The bytes depend on the samples alone.
    """

    def __init__(self, folder: Path, samples_per_shard: int = 10_000) -> None:
        """Open `folder`, made when missing; raises OpenVisionError when it already holds shards."""
        self.folder = make_folder(folder)
        # Shards of an earlier and longer writing would stay behind and be read as part of this one.
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
        """Finish the last shard."""
        self._finish_shard()

    def write(self, key: str, image: bytes, extension: str, text: str, meta: dict[str, Any]) -> None:
        """Append one sample; `meta` is the json member and holds the synthetic caption among its fields.

        Raises OpenVisionError for a key that was written before or that a shard cannot hold.
        """
        self._check_key(key)
        with self._clear_errors():
            if self._tar is None:
                self._tar = tarfile.open(self._temporary(), "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            self._add(f"{key}.{extension}", image)
            self._add(f"{key}.txt", text.encode("utf-8"))
            self._add(f"{key}.json", json.dumps(meta, ensure_ascii=False).encode("utf-8"))
        self._keys.add(key)
        self._samples += 1
        if self._samples == self.samples_per_shard:
            self._finish_shard()

    def _check_key(self, key: str) -> None:
        if not key or "/" in key or "." in key:
            raise OpenVisionError(f"key {key!r} must be a name without '/' and '.'")
        if len(f"{key}.json".encode()) > _NAME_BYTES:
            raise OpenVisionError(f"key {key!r} is too long: with its extension it may have {_NAME_BYTES} bytes")
        if key in self._keys:
            raise OpenVisionError(f"key {key!r} is written twice; every sample needs its own")

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
            # One left by an earlier writing must not pass for this shard's if we are stopped between the two.
            index_path(path).unlink(missing_ok=True)
            os.replace(self._temporary(), path)
        write_index(path)
        self._tar, self._samples, self._shards = None, 0, self._shards + 1

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OpenVisionError(f"cannot write shards into {self.folder}: {error.strerror or error}") from error


class ShardDataset:
    """Random access to the samples of a folder of shards, in the order of shard names and members.

    Holds no open file: it can be sent to other processes and read from many threads.
    """

    def __init__(self, folder: Path, synthetic_key: str = "synthetic") -> None:
        """Open `folder`; raises OpenVisionError naming the folder or the shard that cannot be read."""
        self.folder = folder
        self.synthetic_key = synthetic_key
        if not folder.is_dir():
            raise OpenVisionError(f"shard folder {folder} does not exist")
        self._paths = sorted(folder.glob("*.tar"))
        if not self._paths:
            raise OpenVisionError(f"shard folder {folder} holds no .tar file")
        self._entries = [load_index(path) for path in self._paths]
        self._ends = list(accumulate(len(entries) for entries in self._entries))
        if not len(self):
            raise OpenVisionError(f"the shards of {folder} hold no sample")

    def __len__(self) -> int:
        return self._ends[-1]

    def _locate(self, index: int) -> tuple[int, Any]:
        """Shard and index entry of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect_right(self._ends, index)
        return shard, self._entries[shard][index - (self._ends[shard - 1] if shard else 0)]

    def key(self, index: int) -> str:
        """Key of a sample, without reading it."""
        return self._locate(index)[1]["key"]

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`; raises BadSampleError when its json is broken, OpenVisionError when its shard is."""
        shard, entry = self._locate(index)
        members = read_members(self._paths[shard], entry)
        extension = next(extension for extension in IMAGE_EXTENSIONS if extension in members)
        meta = _parse_meta(members.get("json", b"{}"), entry["key"], self._paths[shard])
        alt = members.get("txt", b"").decode("utf-8", errors="replace")
        return Sample(entry["key"], members[extension], extension, alt, meta.pop(self.synthetic_key, None), meta)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    @functools.cached_property
    def _manifest(self) -> str:
        digest = hashlib.sha256()
        for path in self._paths:
            digest.update(index_path(path).read_bytes())
        return digest.hexdigest()

    def manifest_hash(self) -> str:
        """SHA-256 over the indices, which hold the hash of every member: the identity of the data."""
        return self._manifest


def all_texts(dataset: ShardDataset) -> Iterator[str]:
    """Every alt-text and synthetic caption, for learning a vocabulary; the loader counts the bad samples."""
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
        except BadSampleError:
            continue
        for text in (sample.alt, sample.synthetic):
            if text is not None:
                yield from [text] if isinstance(text, str) else text


def unpack_pictures(dataset: ShardDataset, folder: Path) -> int:
    """Write every picture into `folder` as the file it is, named by the field `name` of its json or by its key.

    Returns the number of pictures; of several of one name the later ones carry their key too.
    """
    make_folder(folder)
    taken: set[str] = set()
    for sample in dataset:
        name = re.sub(r"[^\w.-]+", "-", str(sample.meta.get("name", sample.key))).strip("-.") or sample.key
        name = f"{name}-{sample.key}" if name in taken else name
        taken.add(name)
        atomic_write_bytes(folder / f"{name}.{sample.extension}", sample.image)
    return len(taken)


def _parse_meta(data: bytes, key: str, path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(data)
    except ValueError as error:
        raise BadSampleError("bad_json", f"{path}: {key}.json is not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise BadSampleError("bad_json", f"{path}: {key}.json is not an object")
    return meta
