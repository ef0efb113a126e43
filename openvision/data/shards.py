"""Tar shards in the webdataset layout, written and read at random without unpacking.

    000000.tar          KEY.png (or .jpg, .jpeg, .webp), KEY.txt, KEY.json, one after the other
    000000.index.json   where each member lies; made anew when missing

The alt-text is the txt member; the synthetic caption is a field of the json member. The index names the size of the
tar it was made from: a tar that was changed or cut is an error, not wrong bytes.
"""

import functools
import hashlib
import io
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

from openvision.errors import OpenVisionError
from openvision.files import atomic_write_text, make_folder

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
_INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class Sample:
    """One picture with its texts; `image` is the encoded file."""

    key: str
    image: bytes
    alt: str | list[str]
    synthetic: str | list[str] | None
    meta: dict[str, Any] = field(default_factory=dict)


class ShardWriter:
    """Writes samples into `folder/000000.tar`, `000001.tar`, ... with their indices.

    A shard appears under its name when it is complete. The bytes depend on the samples alone.
    """

    def __init__(self, folder: Path, samples_per_shard: int = 10_000) -> None:
        self.folder = make_folder(folder)
        self.samples_per_shard = samples_per_shard
        self._shards = 0
        self._samples = 0
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
        """Append one sample; `meta` is the json member and holds the synthetic caption among its fields."""
        if not key or "/" in key or "." in key:
            raise ValueError(f"key {key!r} must be a name without '/' and '.'")
        if self._tar is None:
            self._tar = tarfile.open(self._temporary(), "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._add(f"{key}.{extension}", image)
        self._add(f"{key}.txt", text.encode("utf-8"))
        self._add(f"{key}.json", json.dumps(meta, ensure_ascii=False).encode("utf-8"))
        self._samples += 1
        if self._samples == self.samples_per_shard:
            self._finish_shard()

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
        self._tar.close()
        path = self.folder / f"{self._shards:06d}.tar"
        os.replace(self._temporary(), path)
        _write_index(path)
        self._tar, self._samples, self._shards = None, 0, self._shards + 1


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
        self._entries = [_load_index(path) for path in self._paths]
        self._ends = list(accumulate(len(entries) for entries in self._entries))
        if not len(self):
            raise OpenVisionError(f"the shards of {folder} hold no sample")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect_right(self._ends, index)
        entry = self._entries[shard][index - (self._ends[shard - 1] if shard else 0)]
        with open(self._paths[shard], "rb") as file:
            members = {
                name: _read_member(file, offset, size, self._paths[shard])
                for name, (offset, size) in entry["members"].items()
            }
        image = next(members[extension] for extension in IMAGE_EXTENSIONS if extension in members)
        meta = self._parse_meta(members.get("json", b"{}"), entry["key"], self._paths[shard])
        alt = members.get("txt", b"").decode("utf-8", errors="replace")
        return Sample(entry["key"], image, alt, meta.pop(self.synthetic_key, None), meta)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    @functools.cached_property
    def _manifest(self) -> str:
        digest = hashlib.sha256()
        for path in self._paths:
            digest.update(_index_path(path).read_bytes())
        return digest.hexdigest()

    def manifest_hash(self) -> str:
        """SHA-256 over the indices, which hold the hash of every member: the identity of the data."""
        return self._manifest

    @staticmethod
    def _parse_meta(data: bytes, key: str, path: Path) -> dict[str, Any]:
        try:
            meta = json.loads(data)
        except ValueError as error:
            raise OpenVisionError(f"{path}: {key}.json is not JSON: {error}") from error
        if not isinstance(meta, dict):
            raise OpenVisionError(f"{path}: {key}.json is not an object")
        return meta


def all_texts(dataset: ShardDataset) -> Iterator[str]:
    """Every alt-text and synthetic caption, for learning a vocabulary."""
    for sample in dataset:
        for text in (sample.alt, sample.synthetic):
            if text is not None:
                yield from [text] if isinstance(text, str) else text


def _index_path(path: Path) -> Path:
    return path.with_name(path.stem + _INDEX_SUFFIX)


def _read_member(file: io.BufferedReader, offset: int, size: int, path: Path) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise OpenVisionError(f"shard {path} ends early: it was cut while in use; restore it and run again")
    return data


def _load_index(path: Path) -> list[dict[str, Any]]:
    """Read the index of a shard, or build it; refuse one that was made from another tar."""
    index = _index_path(path)
    if not index.exists():
        _write_index(path)
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        size, samples = content["tar_bytes"], content["samples"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OpenVisionError(f"index {index} cannot be read; remove it and it is built anew ({error})") from error
    if size != path.stat().st_size:
        raise OpenVisionError(
            f"shard {path} has {path.stat().st_size} bytes but its index was made from {size}: the shard was cut or "
            f"changed; restore it, or remove {index.name} to index it as it is"
        )
    return samples


def _write_index(path: Path) -> None:
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, _, extension = member.name.rpartition("/")[2].partition(".")
                sample = samples.setdefault(key, {"key": key, "members": {}, "sha256": {}})
                file = tar.extractfile(member)
                data = file.read() if file else b""
                if len(data) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                sample["members"][extension.lower()] = [member.offset_data, member.size]
                sample["sha256"][extension.lower()] = hashlib.sha256(data).hexdigest()
            if path.stat().st_size < tar.offset + 2 * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("the end marker is missing")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise OpenVisionError(f"shard {path} is truncated or not a tar: {error}; download or write it again") from error
    pictured = [sample for sample in samples.values() if any(name in sample["members"] for name in IMAGE_EXTENSIONS)]
    content = {"tar_bytes": path.stat().st_size, "samples": pictured}
    atomic_write_text(_index_path(path), json.dumps(content, separators=(",", ":")) + "\n")
