"""What the demo searches: a folder, shards, or vectors by `openvision encode`, encoded once for each checkpoint."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from openvision.demo.checkpoint import DemoCheckpoint
from openvision.errors import OpenVisionError
from openvision.images.decode import BadSampleError
from openvision.images.preprocess import to_pixels
from openvision.inference.embed import Images, hash_names, images_of, weights_hash
from openvision.inference.index import Hit, VectorIndex
from openvision.inference.vector_folder import encode_folder, is_vector_folder

_THUMBNAIL = 256
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Collection:
    """Images with an index for each checkpoint."""

    source: Path
    """Folder of the images or shards."""
    images: Images
    indices: tuple[VectorIndex, ...]
    """In the order of the checkpoints."""

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.images.keys)}

    def search(self, checkpoint: int, vector: NDArray[np.float32], top: int) -> list[tuple[Image.Image, Hit]]:
        """The nearest images as thumbnails; those that have gone since are left out."""
        found = []
        for hit in self.indices[checkpoint].search(vector, top):
            # Never a path made of the name: the index may be a stranger's.
            row = self._rows.get(hit.name)
            image = self._thumbnail(row) if row is not None else None
            if image is not None:
                found.append((image, hit))
        return found

    def first(self, count: int) -> list[Image.Image]:
        """Thumbnails of a few images, spread over the collection."""
        rows = np.linspace(0, len(self.images.keys) - 1, min(count, len(self.images.keys))).astype(int)
        return [image for row in rows if (image := self._thumbnail(int(row))) is not None]

    def _thumbnail(self, row: int) -> Image.Image | None:
        try:
            loaded = self.images.load(row)
            content = Path(loaded).read_bytes() if isinstance(loaded, (str, os.PathLike)) else loaded
            image = Image.fromarray(to_pixels(content))
        except (OSError, BadSampleError):
            return None
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        return image


def open_collection(
    source: Path, checkpoints: list[DemoCheckpoint], progress: Progress | None = None, cache: Path | None = None
) -> Collection:
    """Open images or vectors; what is not encoded yet is, into `cache`, and is found there the next time.

    Raises OpenVisionError for a folder without images, and for vectors of another checkpoint.
    """
    if is_vector_folder(source):
        index = VectorIndex.open(source)
        for one in checkpoints:
            index.check_encoder(one.encoder)
        images = Path(index.vectors.job.source)
        if not images.is_dir():
            raise OpenVisionError(f"{source} has vectors of {images}, which is not there; put the images back")
        return Collection(images, images_of(images), tuple(index for _ in checkpoints))
    images = images_of(source)
    indices = tuple(
        VectorIndex.open(_encoded(one, source, images, progress, cache or default_cache())) for one in checkpoints
    )
    return Collection(source, images, indices)


def default_cache() -> Path:
    """Where vectors are kept: $XDG_CACHE_HOME/openvision, by default ~/.cache/openvision."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openvision" / "demo"


def _encoded(one: DemoCheckpoint, source: Path, images: Images, progress: Progress | None, cache: Path) -> Path:
    what = (str(source.resolve()), hash_names(images), weights_hash(one.encoder), one.encoder.resolution)
    if one.encoder.preprocessing != "crop":
        what = (*what, one.encoder.preprocessing)
    folder = cache / hashlib.sha256(repr(what).encode()).hexdigest()[:32]
    encode_folder(one.encoder, source, folder, progress=progress)
    return folder
