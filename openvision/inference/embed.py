"""Encode a folder of images or of shards into one file of vectors; a stopped job resumes.

Finished parts are kept beside the output in `.OUTPUT.parts` until the last one is written, and the same command resumes
from them. Each part is written under a temporary name and renamed, so a kill costs one part at most.

    feats.safetensors   features (n, E), keys (uint8: names joined by newlines); read by `read_features`
    feats.parquet       columns key, embedding (fixed-size list), one row group a part; needs the extra `parquet`
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from openvision.data.shards.dataset import ShardDataset
from openvision.data.shards.selection import names_tars
from openvision.encoding import evaluating
from openvision.errors import OpenVisionError, require
from openvision.files import atomic_write_bytes, atomic_write_text, make_folder
from openvision.images.decode import BadSampleError, decode_image
from openvision.images.native import stacked_by_shape
from openvision.inference.vision import ImageInput, UnreadableImageError, VisionEncoder, image_files
from openvision.untrusted import one_line

PART = 2048
_FORMATS = (".safetensors", ".parquet")


@dataclass(frozen=True)
class Images:
    """Images of a folder or of shards: names, and a function that loads one."""

    keys: list[str]
    load: Callable[[int], ImageInput]
    """Index of an image -> the input of `VisionEncoder.preprocess`; raises UnreadableImageError or BadSampleError."""


@dataclass
class EmbedResult:
    """How many images were encoded, and which were not."""

    encoded: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of each image that could not be read."""


def images_of(source: Path) -> Images:
    """Images of a folder and its subfolders, or of the shards in it; raises OpenVisionError when there are none."""
    if names_tars(source) or (source.is_dir() and any(source.glob("*.tar"))):
        dataset = ShardDataset(source)
        # Names are stored one a line.
        keys = [one_line(dataset.key(index)) for index in range(len(dataset))]
        return Images(keys, lambda index: decode_image(dataset[index].image))
    paths = image_files(source)
    return Images([one_line(path.relative_to(source).as_posix()) for path in paths], lambda index: paths[index])


def embed(
    encoder: VisionEncoder,
    source: Path,
    output: Path,
    batch_size: int = 64,
    threads: int = 2,
    part: int = PART,
    progress: Callable[[int, int], None] | None = None,
) -> EmbedResult:
    """Encode every image of `source` into `output`; `progress` receives the images done and their total number.

    Vectors have unit length; a tower without a head gives its pooled vector instead. Raises OpenVisionError when the
    output exists, its suffix is unknown, or the parts beside it belong to other images or another model.
    """
    if output.suffix not in _FORMATS:
        raise OpenVisionError(
            f"{output} must end in {' or '.join(_FORMATS)}; for a folder of vectors give a name without a suffix"
        )
    if output.exists():
        raise OpenVisionError(f"{output} exists; remove it or choose another name")
    if output.suffix == ".parquet":
        require("pyarrow", extra="parquet")
    images = images_of(source)
    parts = _open_parts(output, encoder, images, part)
    total = len(images.keys)
    for number, start in enumerate(range(0, total, part)):
        file = parts / f"{number:06d}.safetensors"
        if not file.is_file():
            rows = range(start, min(start + part, total))
            _write_part(file, encoder, images, rows, batch_size, threads, progress)
        elif progress:
            progress(min(start + part, total), total)
    files = sorted(parts.glob("*.safetensors"))
    result = _result(files, images)
    if not result.encoded:
        raise OpenVisionError(f"none of the {total} images in {source} can be read; first: {result.skipped[0][1]}")
    _merge(files, images, output)
    shutil.rmtree(parts)
    return result


def _open_parts(output: Path, encoder: VisionEncoder, images: Images, part: int) -> Path:
    """The folder of parts, new or from the same job; raises OpenVisionError when it is from another."""
    folder = make_folder(output.parent / f".{output.name}.parts")
    job = {
        "pictures": hash_names(images),
        "weights": weights_hash(encoder),
        "resolution": encoder.resolution,
        "preprocessing": encoder.preprocessing,
        "part": part,
    }
    note = folder / "job.json"
    if not note.is_file():
        atomic_write_text(note, json.dumps(job) + "\n")
    elif json.loads(note.read_text()) != json.loads(json.dumps(job)):
        raise OpenVisionError(
            f"{folder} has parts of another job (other images, weights or resolution); remove it or choose another "
            "output"
        )
    return folder


def hash_names(images: Images) -> str:
    """SHA-256 of the names of all images, hexadecimal."""
    return hashlib.sha256("\n".join(images.keys).encode()).hexdigest()


def weights_hash(encoder: VisionEncoder) -> str:
    """SHA-256 of the names and bytes of the vision tower's tensors, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in encoder.vision.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _write_part(
    file: Path,
    encoder: VisionEncoder,
    images: Images,
    rows: range,
    batch_size: int,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    kept, features, skipped = encode_rows(encoder, images, rows, batch_size, threads, progress)
    state = {"rows": torch.tensor(kept, dtype=torch.int64)}
    if kept:
        state["features"] = torch.from_numpy(features)
    atomic_write_bytes(file, save(state, metadata={"skipped": json.dumps(skipped)}))


def encode_rows(
    encoder: VisionEncoder,
    images: Images,
    rows: range,
    batch_size: int,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[int], NDArray[np.float32], dict[str, str]]:
    """Rows that could be read, their vectors float32 (n, E), and name and reason of those that could not."""
    kept: list[int] = []
    skipped: dict[str, str] = {}
    features: list[Tensor] = []
    for batch in _prepared(encoder, images, rows, batch_size, threads):
        good = [(row, image) for row, image in batch if isinstance(image, Tensor)]
        skipped |= {images.keys[row]: str(reason) for row, reason in batch if not isinstance(reason, Tensor)}
        if good:
            features.append(_vectors(encoder, [image for _, image in good]))
            kept += [row for row, _ in good]
        if progress:
            progress(batch[-1][0] + 1, len(images.keys))
    vectors = torch.cat(features).numpy() if features else np.empty((0, _vector_width(encoder)), dtype=np.float32)
    return kept, vectors, skipped


def _vector_width(encoder: VisionEncoder) -> int:
    return encoder.embed_dim if encoder.vision.head is not None else encoder.width


def _prepared(
    encoder: VisionEncoder, images: Images, rows: range, batch_size: int, threads: int
) -> Iterator[list[tuple[int, Tensor | Exception]]]:
    """Batches of prepared images, or of the error of each, prefetched by threads while the model computes."""

    def prepare(row: int) -> tuple[int, Tensor | Exception]:
        try:
            return row, encoder.preprocess(images.load(row))
        except (UnreadableImageError, BadSampleError) as error:
            return row, error

    with ThreadPoolExecutor(threads) as pool:
        starts = range(rows.start, rows.stop, batch_size)
        ahead = None
        for start in starts:
            batch = [pool.submit(prepare, row) for row in range(start, min(start + batch_size, rows.stop))]
            if ahead is not None:
                yield [future.result() for future in ahead]
            ahead = batch
        if ahead is not None:
            yield [future.result() for future in ahead]


def _vectors(encoder: VisionEncoder, images: list[Tensor]) -> Tensor:
    if encoder.vision.head is not None:
        return encoder.encode_each(images, len(images))
    vectors = torch.empty(len(images), encoder.width)
    with evaluating(encoder.vision):
        for rows, alike in stacked_by_shape(images):
            vectors[rows] = encoder.forward_features(alike).pooled.float().cpu()
    return vectors


def _result(files: list[Path], images: Images) -> EmbedResult:
    result = EmbedResult()
    for file in files:
        with safe_open(file, "pt") as content:
            result.encoded += content.get_slice("rows").get_shape()[0]
            result.skipped += json.loads(content.metadata()["skipped"]).items()
    return result


def _merge(files: list[Path], images: Images, output: Path) -> None:
    parts = [part for part in map(load_file, files) if "features" in part]
    names = [[images.keys[row] for row in part["rows"].tolist()] for part in parts]
    temporary = output.with_name(f".{output.name}.tmp")
    if output.suffix == ".parquet":
        _write_parquet(names, [part["features"] for part in parts], temporary)
    else:
        joined = "\n".join(name for group in names for name in group).encode()
        keys = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
        save_file({"features": torch.cat([part["features"] for part in parts]), "keys": keys}, temporary)
    temporary.replace(output)


def _write_parquet(names: list[list[str]], features: list[Tensor], path: Path) -> None:
    arrow, parquet = require("pyarrow", extra="parquet"), require("pyarrow.parquet", extra="parquet")
    width = features[0].shape[1]
    schema = arrow.schema([("key", arrow.string()), ("embedding", arrow.list_(arrow.float32(), width))])
    with parquet.ParquetWriter(path, schema) as writer:
        for group, rows in zip(names, features, strict=True):
            flat = arrow.array(rows.float().numpy().reshape(-1))
            columns = [arrow.array(group), arrow.FixedSizeListArray.from_arrays(flat, width)]
            writer.write_table(arrow.Table.from_arrays(columns, schema=schema))


def read_features(path: Path) -> tuple[list[str], Tensor]:
    """Names and vectors float32 (n, E) of a file that `embed` wrote as safetensors."""
    content = load_file(path)
    return bytes(content["keys"].numpy()).decode().split("\n"), content["features"]
