"""Index of the samples on disk by hash, key or url: sorted arrays of 24 bytes a sample, searched in place.

Each group of shards gives a sorted run; runs are merged one range of digests at a time, so that memory is bounded by
the range, not by the number of samples.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from openvision.data.shards.index import CAPTIONS_SUFFIX, IMAGE_EXTENSIONS, split_member_name
from openvision.data.shards.store import Store
from openvision.data.shards.tar import TarMember, open_tar
from openvision.errors import OpenVisionError
from openvision.files import JsonObject, atomic_write_bytes
from openvision.untrusted import load_json

# Join key on the command line -> column of the table and field of the json member.
JOIN_FIELDS = {"hash": "sha256", "key": "key", "url": "url"}
_HASH = re.compile(r"[0-9a-f]{64}")
_RANGE = 8_000_000


def shard_names(store: Store) -> list[str]:
    """The shards of a folder, sorted, without captions tars; raises OpenVisionError when there is none."""
    names = sorted(name for name in store.sizes(".tar") if not name.endswith(CAPTIONS_SUFFIX))
    if not names:
        raise OpenVisionError(f"shard folder {store.name} holds no .tar file; name the folder that img2dataset wrote")
    return names


def identity(value: object, by: str) -> str | None:
    """Normalised join value: stripped text, hashes in lower case; None when it is empty, or neither text nor number."""
    text = str(value).strip() if isinstance(value, (str, int, float)) else ""
    return (text.lower() if by == "hash" else text) or None


def digest(value: str, by: str) -> int:
    """64 bits of a join value; of a SHA-256 its first 16 hexadecimal digits, which reports show."""
    if by == "hash" and _HASH.fullmatch(value):
        return int(value[:16], 16)
    return int.from_bytes(hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


@dataclass
class TarSample:
    """One sample of a tar being read: its small members, and its image on request."""

    key: str
    texts: dict[str, bytes] = field(default_factory=dict)
    image_member: TarMember | None = None
    extension: str = ""

    def image(self) -> bytes:
        """The encoded image; call it before reading the next sample."""
        assert self.image_member is not None
        return self.image_member.read()

    def meta(self) -> JsonObject | None:
        """The json member, empty when missing, None when it is not a JSON object."""
        try:
            meta = load_json(self.texts.get("json", b"{}"))
        except ValueError:
            return None
        return meta if isinstance(meta, dict) else None

    def identities(self, meta: JsonObject) -> dict[str, str | None]:
        """Hash, key and url of the sample.

        The hash is that of the downloaded image, which img2dataset records before it resizes; if it is not recorded,
        that of the image in the shard.
        """
        recorded = identity(meta.get("sha256"), "hash")
        return {
            "hash": recorded or hashlib.sha256(self.image()).hexdigest(),
            "key": identity(meta.get("key"), "key") or self.key,
            "url": identity(meta.get("url"), "url"),
        }


def tar_samples(store: Store, name: str) -> Iterator[TarSample]:
    """Samples with an image of one shard, in order; raises OpenVisionError for a tar that is truncated or damaged."""
    with open_tar(store, name) as members:
        sample = TarSample("")
        for member in members:
            key, extension = split_member_name(member.name)
            if key != sample.key:
                if sample.image_member:
                    yield sample
                sample = TarSample(key)
            if extension in IMAGE_EXTENSIONS and sample.image_member is None:
                sample.image_member, sample.extension = member, extension
            elif extension in ("txt", "json"):
                sample.texts.setdefault(extension, member.read())
        if sample.image_member:
            yield sample


def index_group(store: Store, names: Sequence[str], first: int, by: str, run: Path) -> None:
    """Write the sorted run of a group of shards, which begins with shard number `first`.

    Files: `run`.digests.npy and `run`.places.npy (uint64 each; a place is shard << 32 | position in it), and
    `run`.hashes.npy, the sorted digests of all image hashes.
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
    # Written last: its existence marks a complete run.
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
    """Digests that occur at least `threshold` times in sorted arrays, with their counts: uint64 (n, 2), sorted."""
    arrays = [np.load(run, mmap_mode="r") for run in runs]
    found = [np.zeros((0, 2), dtype=np.uint64)]
    for slices in _ranges(arrays, span):
        values = np.concatenate([run[part] for run, part in zip(arrays, slices, strict=True)])
        unique, counts = np.unique(values, return_counts=True)
        many = counts >= threshold
        found.append(np.stack([unique[many], counts[many].astype(np.uint64)], axis=1))
    return np.concatenate(found)


def _ranges(arrays: Sequence[np.ndarray], span: int) -> Iterator[list[slice]]:
    """Cut sorted arrays at the same digests into ranges of about `span` entries in all."""
    pieces = max(1, -(-sum(map(len, arrays)) // span))
    starts = [0] * len(arrays)
    for piece in range(1, pieces + 1):
        # Digests are uniform, so equal steps hold nearly equal numbers of entries.
        ends = (
            [len(array) for array in arrays]
            if piece == pieces
            else [int(np.searchsorted(array, np.uint64((piece << 64) // pieces))) for array in arrays]
        )
        yield [slice(start, end) for start, end in zip(starts, ends, strict=True)]
        starts = ends
