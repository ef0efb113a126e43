"""The manifest of a folder of shards, `shards.json`: every shard with its size, sample count and the hash of its index.

Opening a hundred thousand shards takes this one file. A local folder is indexed when it is opened, as far as it is not
indexed yet; a remote one is indexed once, by `openvision data index`.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass

import numpy as np

from openvision.data.shards.index import (
    CAPTIONS_SUFFIX,
    INDEX_SUFFIX,
    MAX_BYTES,
    ShardIndex,
    build_index,
    captions_name,
    current_reason,
    index_name,
    read_members,
)
from openvision.data.shards.store import LocalStore, Store
from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.untrusted import check_count, load_json

FILE_NAME = "shards.json"
_VERSION = 2
# Beyond this number the hashes of all keys take too much memory.
_MOST_COMPARED_KEYS = 100_000_000
# In one shard.
_MOST_SAMPLES = 2**40
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One tar of the folder."""

    name: str
    tar_bytes: int
    captions_bytes: int | None
    samples: int
    rejected: dict[str, int]
    """Number of members that are not part of a sample, by reason."""
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """All shards of a folder, in the order of their names."""

    shards: tuple[Shard, ...]
    duplicates: frozenset[int]
    """Indices of samples whose key an earlier sample has."""

    @property
    def left_out(self) -> Counter[str]:
        """Number of members and samples left out of the indices, by reason."""
        return sum((Counter(shard.rejected) for shard in self.shards), Counter())

    @property
    def rejected(self) -> Counter[str]:
        """As `left_out`, with the samples whose key an earlier shard has."""
        return self.left_out + Counter({"duplicate_key": len(self.duplicates)} if self.duplicates else {})

    def sha256(self) -> str:
        """Identity of the data: a hash over the indices, which have the hash of every member."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.name} {shard.index_sha256}\n".encode())
        return digest.hexdigest()


def manifest_name(store: Store) -> str:
    """File of the manifest: `shards.json`, and for chosen shards `shards-HASH.json` by their names."""
    if store.tars is None:
        return FILE_NAME
    return f"shards-{hashlib.sha256(chr(10).join(store.tars).encode()).hexdigest()[:12]}.json"


def open_manifest(store: Store) -> Manifest:
    """The manifest of a folder; raises OpenVisionError when it does not match the tars or a remote folder has none."""
    manifest = read_manifest(store)
    if not isinstance(store, LocalStore):
        if manifest is None:
            raise OpenVisionError(f"{store.name} has no index; build it once with `openvision data index {store.name}`")
        return manifest
    known = {shard.name: shard for shard in manifest.shards} if manifest else {}
    sizes = _tars(store)
    _check_present(store, known, sizes)
    captions, indices = store.sizes(CAPTIONS_SUFFIX), store.sizes(INDEX_SUFFIX)
    if manifest is not None and all(
        name in known
        and index_name(name) in indices
        and known[name].captions_bytes == captions.get(captions_name(name))
        for name in sizes
    ):
        return manifest
    return index_folder(store)


def index_folder(store: Store, rebuild: bool = False, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Index every shard that has no index yet (all with `rebuild`) and write the manifest.

    `progress` receives the number of shards done and their total. Finished indices are kept when it is stopped.
    """
    sizes = _tars(store)
    if not sizes:
        raise OpenVisionError(f"shard folder {store.name} holds no .tar file; name a folder of shards")
    shards = []
    for number, name in enumerate(sizes, start=1):
        shards.append(_index_shard(store, name, rebuild))
        if progress:
            progress(number, len(sizes))
    manifest = Manifest(tuple(shards), _duplicates(store, shards))
    content = {
        "version": _VERSION,
        "shards": [asdict(shard) for shard in manifest.shards],
        "duplicates": sorted(manifest.duplicates),
    }
    store.write(manifest_name(store), (json.dumps(content, separators=(",", ":")) + "\n").encode())
    return manifest


def open_index(store: Store, shard: Shard) -> ShardIndex:
    """The index of a shard; raises OpenVisionError when it is damaged, or has another number of samples."""
    index = ShardIndex(store, shard.name)
    if len(index) != shard.samples:
        raise OpenVisionError(
            f"index {store.join(index_name(shard.name))} has {len(index)} samples, but {FILE_NAME} says {shard.samples}"
            f"; rebuild both with `openvision data index {store.name} --rebuild`"
        )
    return index


def _tars(store: Store) -> dict[str, int]:
    return {name: size for name, size in store.sizes(".tar").items() if not name.endswith(CAPTIONS_SUFFIX)}


def _index_shard(store: Store, name: str, rebuild: bool) -> Shard:
    captions = captions_name(name)
    captions_bytes = store.size(captions) if store.exists(captions) else None
    if not rebuild and store.exists(index_name(name)):
        index = ShardIndex(store, name)
        _check_size(store, name, index.info.tar_bytes, store.size(name))
        if index.info.captions_bytes == captions_bytes:
            _check_age(store, name, index)
            return _shard(name, index, store.read(index_name(name)))
    data = build_index(store, name)
    store.write(index_name(name), data)
    return _shard(name, ShardIndex(store, name), data)


def _shard(name: str, index: ShardIndex, data: bytes) -> Shard:
    info = index.info
    return Shard(
        name=name,
        tar_bytes=info.tar_bytes,
        captions_bytes=info.captions_bytes,
        samples=info.samples,
        rejected=dict(Counter(reason for _, reason in info.rejected)),
        index_sha256=hashlib.sha256(data).hexdigest(),
    )


def _check_present(store: LocalStore, known: dict[str, Shard], sizes: dict[str, int]) -> None:
    check_gone(store, known, sizes)
    for name, shard in known.items():
        _check_size(store, name, shard.tar_bytes, sizes[name])


def check_gone(store: Store, known: Collection[str], present: Collection[str]) -> None:
    """Raise OpenVisionError for a shard of the manifest that is not present."""
    gone = sorted(set(known) - set(present))
    if gone:
        raise OpenVisionError(
            f"shard {store.join(gone[0])} is in {manifest_name(store)} but no longer exists"
            + (f", and {len(gone) - 1} more" if len(gone) > 1 else "")
            + f"; restore it, or accept the remaining shards with `openvision data index {store.name} --rebuild`"
        )


def _check_size(store: Store, name: str, indexed: int, found: int) -> None:
    if indexed != found:
        raise OpenVisionError(
            f"shard {store.join(name)} has {found} bytes but its index was built from {indexed}: it was truncated or "
            f"changed; restore it, or accept it as it is with `openvision data index {store.name} --rebuild`"
        )


def _check_age(store: Store, name: str, index: ShardIndex) -> None:
    """Check two samples of a tar newer than its index: copying changes the time only, rewriting the members too."""
    if not isinstance(store, LocalStore) or not len(index) or not store.is_newer(name, index_name(name)):
        return
    for row in {0, len(index) - 1}:
        read_members(store, name, index[row])


def _duplicates(store: Store, shards: list[Shard]) -> frozenset[int]:
    """Indices of samples whose key occurred before, found by 64-bit hashes of all keys."""
    total = sum(shard.samples for shard in shards)
    if total > _MOST_COMPARED_KEYS or len(shards) == 1:
        return frozenset()
    keys = [key for shard in shards for key in ShardIndex(store, shard.name).keys()]  # noqa: SIM118
    hashes = np.array(
        [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") for key in keys],
        dtype=np.uint64,
    )
    order = np.argsort(hashes, kind="stable")
    repeated = np.flatnonzero(np.diff(hashes[order]) == 0) + 1
    return frozenset(int(index) for index in order[repeated])


def read_manifest(store: Store) -> Manifest | None:
    """The manifest as it is stored, None without one; raises OpenVisionError when it is damaged."""
    name = manifest_name(store)
    if not store.exists(name):
        return None
    try:
        content: JsonObject = load_json(store.read(name))
        if content["version"] != _VERSION:
            return None
        return _parse(content["shards"], content["duplicates"], store.tars)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OpenVisionError(
            f"{store.join(name)} cannot be read ({error}); remove it, or rebuild it with "
            f"`openvision data index {store.name} --rebuild`"
        ) from error


def _parse(shards: list[JsonObject], duplicates: list[int], chosen: tuple[str, ...] | None) -> Manifest:
    """The manifest as `index_folder` stored it, `chosen` where the store shows some shards alone.

    Raises ValueError or an error like it for anything else.
    """
    if not isinstance(shards, list) or not isinstance(duplicates, list):
        raise ValueError("shards and duplicates are no lists")
    parsed = tuple(_parse_shard(shard, chosen) for shard in shards)
    if len({shard.name for shard in parsed}) < len(parsed):
        raise ValueError("a shard is listed twice")
    last = sum(shard.samples for shard in parsed) - 1
    return Manifest(parsed, frozenset(check_count("a duplicate", number, 0, last) for number in duplicates))


def _parse_shard(stored: JsonObject, chosen: tuple[str, ...] | None) -> Shard:
    name, captions_bytes, sha256 = stored["name"], stored["captions_bytes"], stored["index_sha256"]
    # Tars that were chosen may lie in folders below, but only where they were chosen.
    known = name in chosen if chosen is not None else isinstance(name, str) and "/" not in name
    if not known or not name.endswith(".tar"):
        raise ValueError(f"{name!r:.80} is no name of a tar in this folder")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError(f"index_sha256 of {name} is no hash")
    return Shard(
        name=name,
        tar_bytes=check_count("tar_bytes", stored["tar_bytes"], 0, MAX_BYTES),
        captions_bytes=None if captions_bytes is None else check_count("captions_bytes", captions_bytes, 0, MAX_BYTES),
        samples=check_count("samples", stored["samples"], 0, _MOST_SAMPLES),
        rejected={
            current_reason(reason): check_count(f"rejected as {reason}", count, 0, _MOST_SAMPLES)
            for reason, count in stored["rejected"].items()
        },
        index_sha256=sha256,
    )
