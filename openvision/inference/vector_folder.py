"""A folder of image vectors that `openvision encode` writes and `openvision search` reads; a stopped job resumes.

    manifest.json     what was encoded by which weights, and, when the job is complete, the vectors in each shard
    000000.npy        float32 (n, E), unit vectors; or
    000000.parquet    columns key and embedding (fixed-size list); needs the extra `parquet`
    000000.json       names of the vectors of a npy shard, and the images that could not be read

Each file is written under a temporary name and renamed. The names of a shard come before its vectors, so that a shard
is either there as a whole or encoded again: a kill costs one shard at most, and no image is in two.
"""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from openvision.errors import OpenVisionError, require
from openvision.files import JsonObject, atomic_write_bytes, atomic_write_text, check_file, make_folder, read_json
from openvision.images.preprocess import Preprocessing
from openvision.inference.embed import EmbedResult, Images, encode_rows, hash_names, images_of, weights_hash
from openvision.inference.vision import VisionEncoder
from openvision.untrusted import check_count, is_texts, json_text

VERSION = "openvision-vectors/1"
MANIFEST = "manifest.json"
SHARD = 16384
"""Vectors a shard."""
FORMATS = ("npy", "parquet")
_MOST_SHARDS, _MOST_VECTORS, _MOST_WIDTH = 10**6, 10**9, 2**16


@dataclass(frozen=True)
class Job:
    """What identifies the vectors of a folder."""

    source: str
    """Folder of the images or shards, absolute."""
    images: str
    """SHA-256 of the names of all images."""
    weights: str
    """SHA-256 of the vision tower."""
    model: str
    """Where the weights were loaded from, for messages."""
    resolution: list[int]
    """Height and width in pixels."""
    preprocessing: Preprocessing
    shard: int
    """Images a shard, readable or not."""
    format: str


def is_vector_folder(path: Path) -> bool:
    """Whether `path` is a folder that `encode_folder` wrote or began to write."""
    return (path / MANIFEST).is_file()


def encode_folder(
    encoder: VisionEncoder,
    source: Path,
    output: Path,
    batch_size: int = 64,
    threads: int = 2,
    shard: int = SHARD,
    kind: str = "npy",
    progress: Callable[[int, int], None] | None = None,
) -> EmbedResult:
    """Encode every image of `source` into the folder `output`; `progress` receives the images done and their total.

    Vectors have unit length; those of a tower without a head are its pooled vectors. Raises OpenVisionError when
    `output` holds other files, or the shards of another job.
    """
    images = images_of(source)
    job = begin(encoder, source, images, output, shard, kind)
    for number in range(-(-len(images.keys) // shard)):
        encode_shard(encoder, images, output, job, number, batch_size, threads, progress)
    return finish(output, job, images)


def begin(encoder: VisionEncoder, source: Path, images: Images, output: Path, shard: int, kind: str) -> Job:
    """Begin the job in `output`, or find it there; raises OpenVisionError when something else is in it."""
    if kind not in FORMATS:
        raise OpenVisionError(f"format {kind!r} is unknown; use {' or '.join(FORMATS)}")
    if kind == "parquet":
        require("pyarrow", extra="parquet")
    job = _job(encoder, source, images, shard, kind)
    _open(output, job)
    return job


def shard_file(output: Path, job: Job, number: int) -> Path:
    """The vectors of a shard."""
    return output / f"{number:06d}.{job.format}"


def shard_rows(images: Images, job: Job, number: int) -> range:
    """The images of a shard, readable or not."""
    return range(number * job.shard, min((number + 1) * job.shard, len(images.keys)))


def encode_shard(
    encoder: VisionEncoder,
    images: Images,
    output: Path,
    job: Job,
    number: int,
    batch_size: int,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Encode a shard that is not there yet."""
    file, rows = shard_file(output, job, number), shard_rows(images, job, number)
    if not file.is_file():
        kept, features, bad = encode_rows(encoder, images, rows, batch_size, threads, progress)
        write_shard(file, [images.keys[row] for row in kept], unit_rows(features), bad)
    elif progress:
        progress(rows.stop, len(images.keys))


def finish(output: Path, job: Job, images: Images) -> EmbedResult:
    """Read what all shards hold and complete the manifest; raises OpenVisionError when no image could be read."""
    total, skipped, counts, width = len(images.keys), {}, [], 0
    for number in range(-(-total // job.shard)):
        vectors, _, bad = _read_shard(shard_file(output, job, number))
        counts.append(len(vectors))
        width = max(width, vectors.shape[1])
        skipped |= bad
    if not sum(counts):
        reason = next(iter(skipped.values()))
        # Nothing is left: the same command must read the images again once they are fixed.
        for number in range(len(counts)):
            file = shard_file(output, job, number)
            file.unlink()
            file.with_suffix(".json").unlink(missing_ok=True)
        (output / MANIFEST).unlink()
        raise OpenVisionError(f"none of the {total} images in {job.source} can be read; first: {reason}")
    write_manifest(output, job, width, counts)
    return EmbedResult(sum(counts), list(skipped.items()))


def write_manifest(folder: Path, job: Job, width: int = 0, counts: list[int] | None = None) -> None:
    """Write manifest.json; without the vectors of each shard the folder is not complete."""
    content = {"version": VERSION, **asdict(job), "width": width, "shards": counts}
    atomic_write_text(folder / MANIFEST, json_text(content, indent=2) + "\n")


def _job(encoder: VisionEncoder, source: Path, images: Images, shard: int, kind: str) -> Job:
    side = encoder.resolution
    return Job(
        source=str(source.resolve()),
        images=hash_names(images),
        weights=weights_hash(encoder),
        model=encoder.source or "a model in memory",
        resolution=[side, side] if isinstance(side, int) else list(side),
        preprocessing=encoder.preprocessing,
        shard=shard,
        format=kind,
    )


def _open(folder: Path, job: Job) -> None:
    """Begin the job in `folder`, or find it there; raises OpenVisionError when something else is in it."""
    if not is_vector_folder(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OpenVisionError(f"{folder} exists and is no folder of vectors; choose another output")
        make_folder(folder)
        write_manifest(folder, job)
        return
    found = read_json(folder / MANIFEST)
    # The same weights may have been loaded from another place.
    if other := [key for key, value in asdict(job).items() if key != "model" and found.get(key) != value]:
        raise OpenVisionError(
            f"{folder} has vectors of another job ({', '.join(other)} differ); remove it or choose another output"
        )


def unit_rows(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors (n, E) at unit length."""
    return (features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def write_shard(file: Path, names: list[str], vectors: NDArray[np.float32], skipped: dict[str, str]) -> None:
    """Write unit vectors (n, E) with their names, atomically, as npy or Parquet by the suffix of `file`."""
    buffer = io.BytesIO()
    if file.suffix == ".parquet":
        arrow, parquet = require("pyarrow", extra="parquet"), require("pyarrow.parquet", extra="parquet")
        width = max(vectors.shape[1], 1)
        schema = arrow.schema(
            [("key", arrow.string()), ("embedding", arrow.list_(arrow.float32(), width))],
            metadata={"skipped": json.dumps(skipped)},
        )
        column = arrow.FixedSizeListArray.from_arrays(arrow.array(vectors.reshape(-1)), width)
        parquet.write_table(
            arrow.Table.from_arrays([arrow.array(names, arrow.string()), column], schema=schema), buffer
        )
    else:
        atomic_write_text(file.with_suffix(".json"), json_text({"names": names, "skipped": skipped}) + "\n")
        np.save(buffer, vectors, allow_pickle=False)
    atomic_write_bytes(file, buffer.getvalue())


def _read_shard(file: Path) -> tuple[NDArray[np.float32], list[str], dict[str, str]]:
    """Vectors (n, E), memory-mapped from npy, their names, and the images left out; raises OpenVisionError."""
    try:
        vectors, names, skipped = _read_parquet(file) if file.suffix == ".parquet" else _read_npy(file)
        sound = vectors.ndim == 2 and vectors.dtype == np.float32 and len(vectors) == len(names)
        if not sound or not is_texts(names) or not isinstance(skipped, dict):
            raise ValueError("its vectors and names do not belong together")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise OpenVisionError(f"{file} is no shard of vectors: {error}; remove it and encode again") from error
    return vectors, names, skipped


def _read_npy(file: Path) -> tuple[NDArray[np.float32], Any, Any]:
    texts = read_json(file.with_suffix(".json"))
    return np.load(file, mmap_mode="r", allow_pickle=False), texts["names"], texts["skipped"]


def _read_parquet(file: Path) -> tuple[NDArray[np.float32], Any, Any]:
    table = require("pyarrow.parquet", extra="parquet").read_table(file)
    column = table.column("embedding").combine_chunks()
    vectors = column.flatten().to_numpy().reshape(len(table), column.type.list_size)
    return vectors, table.column("key").to_pylist(), json.loads((table.schema.metadata or {})[b"skipped"])


@dataclass(frozen=True)
class VectorFolder:
    """A complete folder of vectors."""

    folder: Path
    job: Job
    width: int
    """Width E of a vector."""
    counts: tuple[int, ...]
    """Vectors in each shard."""

    @property
    def total(self) -> int:
        """Vectors in all shards."""
        return sum(self.counts)

    @property
    def starts(self) -> NDArray[np.int64]:
        """Number of the first vector of each shard."""
        return np.cumsum([0, *self.counts[:-1]], dtype=np.int64)

    def vectors(self, shard: int) -> NDArray[np.float32]:
        """Unit vectors (n, E) of a shard."""
        return self._shard(shard)[0]

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Vectors (n, E) of every shard in order."""
        return (self.vectors(shard) for shard in range(len(self.counts)))

    def name(self, number: int) -> str:
        """Name of the image of vector `number`."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self._shard(shard)[1][number - int(self.starts[shard])]

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors (k, E) by number."""
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        found = np.empty((len(numbers), self.width), dtype=np.float32)
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self.vectors(int(shard))[numbers[here] - self.starts[shard]]
        return found

    def _shard(self, shard: int) -> tuple[NDArray[np.float32], list[str], dict[str, str]]:
        file = self.folder / f"{shard:06d}.{self.job.format}"
        vectors, names, skipped = _cached_shard(file, check_file(file).st_mtime_ns)
        if vectors.shape != (self.counts[shard], self.width):
            raise OpenVisionError(f"{file} has vectors of another shape than {MANIFEST} says; encode again")
        return vectors, names, skipped


# Names of a million images take a hundred megabytes; vectors are mapped, not read.
@lru_cache(maxsize=256)
def _cached_shard(file: Path, changed: int) -> tuple[NDArray[np.float32], list[str], dict[str, str]]:
    return _read_shard(file)


def open_vector_folder(folder: Path) -> VectorFolder:
    """Read the manifest; raises OpenVisionError when the job is not complete, or the manifest is broken."""
    if not is_vector_folder(folder):
        raise OpenVisionError(f"{folder} is no folder of vectors; `openvision encode IMAGES -o {folder}` writes one")
    content = read_json(folder / MANIFEST)
    if content.get("version") != VERSION:
        raise OpenVisionError(f"{folder / MANIFEST} is not of version {VERSION}; encode the images again")
    if content.get("shards") is None:
        raise OpenVisionError(f"{folder} is not complete; run the same `openvision encode` again, which resumes")
    try:
        return _parse(folder, content)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise OpenVisionError(f"{folder / MANIFEST} is broken: {reason}; encode the images again") from error


def _parse(folder: Path, content: JsonObject) -> VectorFolder:
    texts = {key: content[key] for key in ("source", "images", "weights", "model", "preprocessing", "format")}
    if not is_texts(list(texts.values())):
        raise ValueError("one of its texts is none")
    if texts["format"] not in FORMATS or texts["preprocessing"] not in get_args(Preprocessing):
        raise ValueError("the format of its shards or the preprocessing of its images is unknown")
    height, width = (check_count("resolution", side, 1, 2**20) for side in content["resolution"])
    shard = check_count("shard", content["shard"], 1, _MOST_VECTORS)
    job = Job(**texts, resolution=[height, width], shard=shard)
    counts = [check_count("a number of vectors", count, 0, _MOST_VECTORS) for count in content["shards"]]
    check_count("the number of shards", len(counts), 1, _MOST_SHARDS)
    return VectorFolder(folder, job, check_count("width", content["width"], 1, _MOST_WIDTH), tuple(counts))
