"""The index beside a tar shard: which samples it holds, where each member lies, and its hash.

    {"tar_bytes": size, "samples": [{"key", "members": {extension: [offset, size]}, "sha256": {extension: hex}}]}

A tar that does not fit its index is an error, not wrong bytes: the size is compared on opening and every member's
hash on reading. The size alone would not do, tars are padded to blocks of 10 KiB.
"""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

from openvision.errors import OpenVisionError
from openvision.files import atomic_write_text

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
_INDEX_SUFFIX = ".index.json"


def index_path(path: Path) -> Path:
    """Where the index of the shard `path` lies."""
    return path.with_name(path.stem + _INDEX_SUFFIX)


def load_index(path: Path) -> list[dict[str, Any]]:
    """Entries of the index of the shard `path`, built when missing; refuses one that was made from another tar."""
    index = index_path(path)
    if not index.exists():
        write_index(path)
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


def write_index(path: Path) -> None:
    """Read the whole shard once and write its index; raises OpenVisionError for a tar cut short or a repeated key."""
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                file = tar.extractfile(member)
                data = file.read() if file else b""
                if len(data) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                _add_member(samples, member, data, path)
            if path.stat().st_size < tar.offset + 2 * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("the end marker is missing")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise OpenVisionError(f"shard {path} is truncated or not a tar: {error}; download or write it again") from error
    pictured = [sample for sample in samples.values() if any(name in sample["members"] for name in IMAGE_EXTENSIONS)]
    content = {"tar_bytes": path.stat().st_size, "samples": pictured}
    atomic_write_text(index_path(path), json.dumps(content, separators=(",", ":")) + "\n")


def read_members(path: Path, entry: dict[str, Any]) -> dict[str, bytes]:
    """The members of one sample by extension, each compared with its hash in the index."""
    members = {}
    try:
        with open(path, "rb") as file:
            for extension, (offset, size) in entry["members"].items():
                file.seek(offset)
                members[extension] = file.read(size)
    except OSError as error:
        raise OpenVisionError(f"shard {path} cannot be read: {error.strerror}; restore it and run again") from error
    for extension, data in members.items():
        if len(data) != entry["members"][extension][1]:
            raise OpenVisionError(f"shard {path} ends early: it was cut while in use; restore it and run again")
        if hashlib.sha256(data).hexdigest() != entry["sha256"][extension]:
            raise OpenVisionError(
                f"shard {path}: {entry['key']}.{extension} is not what its index says: the shard was changed or "
                f"damaged; restore it, or remove {index_path(path).name} to index it as it is"
            )
    return members


def _add_member(samples: dict[str, dict[str, Any]], member: tarfile.TarInfo, data: bytes, path: Path) -> None:
    # As webdataset does it: the key ends at the first dot of the file name and keeps its folder.
    folder, slash, name = member.name.removeprefix("./").rpartition("/")
    stem, _, extension = name.partition(".")
    key, extension = folder + slash + stem, extension.lower()
    sample = samples.setdefault(key, {"key": key, "members": {}, "sha256": {}})
    if extension in sample["members"]:
        raise OpenVisionError(f"shard {path} holds {key}.{extension} twice; keys must be unique, write it again")
    sample["members"][extension] = [member.offset_data, member.size]
    sample["sha256"][extension] = hashlib.sha256(data).hexdigest()
