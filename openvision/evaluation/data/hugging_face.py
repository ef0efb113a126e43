"""Images with labels or captions of a Hugging Face dataset: one saved on disk, or one by name (extra `datasets`)."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from openvision.errors import OpenVisionError, require
from openvision.evaluation.data.images import Captioned, ImageSet, Labelled, captioned, labelled
from openvision.images.decode import BadSampleError, decode_image

if TYPE_CHECKING:
    from datasets import Dataset  # pyright: ignore[reportMissingImports]

PREFIX = "hf:"


def labelled_dataset(
    source: str,
    split: str,
    image: str,
    label: str,
    names: Sequence[str] | None = None,
    library: ModuleType | None = None,
) -> Labelled:
    """Class = column `label`: a ClassLabel has its names, integers need `names`, strings are names themselves."""
    data = _open(source, split, (image, label), library)
    feature = data.features[label]
    own = list(feature.names) if getattr(feature, "names", None) else None
    return labelled(_images(data, source, split, image, library), list(data[label]), names or own)


def captioned_dataset(source: str, split: str, image: str, text: str, library: ModuleType | None = None) -> Captioned:
    """Texts = column `text`: a string or a list of them."""
    data = _open(source, split, (image, text), library)
    texts = [[one for one in (own if isinstance(own, list) else [own]) if one] for own in data[text]]
    return captioned(_images(data, source, split, image, library), texts)


def _open(source: str, split: str, columns: tuple[str, ...], library: ModuleType | None) -> "Dataset":
    library = library or require("datasets", extra="datasets")
    try:
        if Path(source).exists():
            data = library.load_from_disk(source)
            data = data[split] if isinstance(data, dict) else data
        else:
            data = library.load_dataset(source, split=split)
    except Exception as error:  # The library raises many kinds, some of them its own.
        raise OpenVisionError(
            f"data set {source!r}, split {split!r}, cannot be opened: {error}; give a folder written by save_to_disk "
            "or a name on the Hub, and one of its splits"
        ) from error
    for column in columns:
        if column not in data.column_names:
            raise OpenVisionError(
                f"data set {source} has no column {column!r}; its columns are {', '.join(data.column_names)}"
            )
    return data


def _images(data: "Dataset", source: str, split: str, image: str, library: ModuleType | None) -> ImageSet:
    library = library or require("datasets", extra="datasets")
    # The files as they are: the library's own decoding is not the one the models were trained with.
    files = data.cast_column(image, library.Image(decode=False))

    def load(index: int) -> NDArray[np.uint8]:
        value = files[index][image]
        content = value.get("bytes") if isinstance(value, Mapping) else value
        if not content and isinstance(value, Mapping) and value.get("path"):
            content = Path(value["path"]).read_bytes()
        if not isinstance(content, bytes):
            raise BadSampleError("no_picture", f"{source}, row {index} holds no image")
        return decode_image(content)

    fingerprint = getattr(data, "_fingerprint", None) or f"{source} {split} {len(data)}"
    digest = hashlib.sha256(str(fingerprint).encode()).hexdigest()
    return ImageSet(f"{source} ({split})", [f"{split}-{row:08d}" for row in range(len(data))], load, digest)
