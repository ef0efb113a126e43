"""What lies in the shards, as sorted arrays on disk: 24 bytes a sample, searched in place and never held in memory.

A group of shards gives sorted runs; the runs are merged range by range of the digests, so that memory is bounded by the
range and not by the number of samples.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openvision.data.shards.index import CAPTIONS_SUFFIX, IMAGE_EXTENSIONS
from openvision.data.shards.store import Store
from openvision.errors import OpenVisionError
from openvision.files import atomic_write_bytes

# Join key of the command line -> column of the table and field of the json member.
JOIN_FIELDS = {"hash": "sha256", "key": "key", "url": "url"}
_HASH = re.compile(r"[0-9a-f]{64}")
_RANGE = 8_000_000


def shard_names(store: Store) -> list[str]:
    """The shards of a folder without its captions tars, sorted; raises OpenVisionError when there is none."""
    names = sorted(name for name in store.sizes(".tar") if not name.endswith(CAPTIONS_SUFFIX))
    if not names:
        raise OpenVisionError(f"shard folder {store.name} holds no .tar file; name the folder img2dataset wrote")
    return names


def identity(value: Any, by: str) -> str | None:
    """A value as it is compared: trimmed text, hashes in small letters; None when there is none."""
    text = "" if value is None else str(value).strip()
    return (text.lower() if by == "hash" else text) or None


def digest(value: str, by: str) -> int:
    """64 bits of an identity: of a hash its first 16 hexadecimal digits, which a report can show."""
    if by == "hash" and _HASH.fullmatch(value):
        return int(value[:16], 16)
    return int.from_bytes(hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


@dataclass
class TarSample:
    """One sample of a tar that is being read: its small members, and its picture on request."""

    key: str
    texts: dict[str, bytes]
    tar: tarfile.TarFile
    picture: tarfile.TarInfo | None = None
    extension: str = ""

    def image(self) -> bytes:
        """The encoded picture; to be asked for before the next sample is taken."""
        assert self.picture is not None
        return _read(self.tar, self.picture)

    def meta(self) -> dict[str, Any] | None:
        """The json member, empty when missing, None when it is not a JSON object."""
        try:
            meta = json.loads(self.texts.get("json", b"{}"))
        except ValueError:
            return None
        return meta if isinstance(meta, dict) else None

    def identities(self, meta: dict[str, Any]) -> dict[str, str | None]:
        """Hash, key and url of the sample.

        The hash is that of the picture as it was downloaded, which img2dataset notes before it resizes; without a
        note that of the picture as it lies here.
        """
        noted = identity(meta.get("sha256"), "hash")
        return {
            "hash": noted or hashlib.sha256(self.image()).hexdigest(),
            "key": identity(meta.get("key"), "key") or self.key,
            "url": identity(meta.get("url"), "url"),
        }


def tar_samples(store: Store, name: str) -> Iterator[TarSample]:
    """Samples with a picture, in order, of one shard; raises OpenVisionError for a tar that is cut short."""
    try:
        size = store.size(name)
        with store.open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            sample = TarSample("", {}, tar)
            for member in tar:
                if member.isfile():
                    key, extension = _split(member.name)
                    if key != sample.key:
                        if sample.picture:
                            yield sample
                        sample = TarSample(key, {}, tar)
                    _add(sample, extension, member)
            if sample.picture:
                yield sample
            if size < tar.offset + 2 * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("the end marker is missing")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise OpenVisionError(
            f"shard {store.join(name)} is truncated or not a tar: {error}; download it again"
        ) from error


def _split(name: str) -> tuple[str, str]:
    # As webdataset does it: the key ends at the first dot of the file name and keeps its folder.
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _add(sample: TarSample, extension: str, member: tarfile.TarInfo) -> None:
    if extension in IMAGE_EXTENSIONS and sample.picture is None:
        sample.picture, sample.extension = member, extension
    elif extension in ("txt", "json"):
        sample.texts.setdefault(extension, _read(sample.tar, member))


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def index_group(store: Store, names: Sequence[str], first: int, by: str, run: Path) -> None:
    """Write the sorted run of some shards, the first of them shard number `first` of all.

    Files: `run`.digests.npy and `run`.places.npy (uint64 each; a place is shard << 32 | position in it), and
    `run`.hashes.npy, the sorted digests of all pictures.
    """
    digests, places, hashes = [], [], []
    for shard, name in enumerate(names, start=first):
        for position, sample in enumerate(tar_samples(store, name)):
            meta = sample.meta()
            if meta is None:
                continue
            identities = sample.identities(meta)
            hashes.append(digest(identities["hash"] or "", "hash"))
            value = identities[by]
            if value is not None:
                digests.append(digest(value, by))
                places.append(shard << 32 | position)
    order = np.argsort(np.array(digests, dtype=np.uint64), kind="stable")
    # The last of the three to be written is the one that says that the run is complete.
    save_array(run.with_suffix(".places.npy"), np.array(places, dtype=np.uint64)[order])
    save_array(run.with_suffix(".hashes.npy"), np.sort(np.array(hashes, dtype=np.uint64)))
    save_array(run.with_suffix(".digests.npy"), np.array(digests, dtype=np.uint64)[order])


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file completely or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    atomic_write_bytes(path, buffer.getvalue())


def merge_runs(runs: Sequence[Path], target: Path, span: int = _RANGE) -> None:
    """Merge the digests and places of sorted runs into `target`.digests.npy and `target`.places.npy."""
    digests = [np.load(run.with_suffix(".digests.npy"), mmap_mode="r") for run in runs]
    places = [np.load(run.with_suffix(".places.npy"), mmap_mode="r") for run in runs]
    total, done = sum(map(len, digests)), 0
    outputs = [target.with_suffix(f".{part}.npy") for part in ("places", "digests")]
    arrays = [
        np.lib.format.open_memmap(path.with_suffix(".tmp"), mode="w+", dtype=np.uint64, shape=(total,))
        for path in outputs
    ]
    for slices in _ranges(digests, span):
        keys = np.concatenate([run[part] for run, part in zip(digests, slices, strict=True)])
        order = np.argsort(keys, kind="stable")
        arrays[0][done : done + len(keys)] = np.concatenate(
            [run[part] for run, part in zip(places, slices, strict=True)]
        )[order]
        arrays[1][done : done + len(keys)] = keys[order]
        done += len(keys)
    for array, path in zip(arrays, outputs, strict=True):
        array.flush()
        os.replace(path.with_suffix(".tmp"), path)


def repeated(runs: Sequence[Path], threshold: int, span: int = _RANGE) -> np.ndarray:
    """Digests that sorted arrays hold at least `threshold` times, with their numbers: uint64 (n, 2), sorted."""
    arrays = [np.load(run, mmap_mode="r") for run in runs]
    found = [np.zeros((0, 2), dtype=np.uint64)]
    for slices in _ranges(arrays, span):
        values = np.concatenate([run[part] for run, part in zip(arrays, slices, strict=True)])
        unique, counts = np.unique(values, return_counts=True)
        many = counts >= threshold
        found.append(np.stack([unique[many], counts[many].astype(np.uint64)], axis=1))
    return np.concatenate(found)


def _ranges(arrays: Sequence[np.ndarray], span: int) -> Iterator[list[slice]]:
    """Cut sorted arrays at the same digests into pieces of about `span` entries in all."""
    pieces = max(1, -(-sum(map(len, arrays)) // span))
    starts = [0] * len(arrays)
    for piece in range(1, pieces + 1):
        # Digests are evenly spread, so equal steps of the digest are nearly equal numbers of entries.
        ends = (
            [len(array) for array in arrays]
            if piece == pieces
            else [int(np.searchsorted(array, np.uint64((piece << 64) // pieces))) for array in arrays]
        )
        yield [slice(start, end) for start, end in zip(starts, ends, strict=True)]
        starts = ends
