"""Fashion-MNIST: the 10,000 test images, 28 px, grey on black, for zero-shot tests far from any drawing."""

import gzip
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from openvision.data.sources.openmoji.captions import pick
from openvision.data.sources.picto.captions import photograph_caption
from openvision.data.sources.picto.packages import Packages
from openvision.errors import OpenVisionError

_FOLDER = "usr/share/datasets/fashion-mnist/"
_IMAGES, _LABELS = f"{_FOLDER}t10k-images-idx3-ubyte.gz", f"{_FOLDER}t10k-labels-idx1-ubyte.gz"
_IDX_UBYTE = 8
_ALT_FORMS = ("{name}", "{name} product photo", "{title} | shop", "{name}.jpg", "buy {name} online")


@dataclass(frozen=True)
class Garment:
    """One of the ten classes."""

    name: str
    article: str
    noun: str
    """The word for it in a sentence."""
    kind: str


GARMENTS = (
    Garment("t-shirt", "a", "t-shirt", "a garment for the upper body"),
    Garment("trousers", "a pair of", "trousers", "a garment for the legs"),
    Garment("pullover", "a", "pullover", "a garment for the upper body"),
    Garment("dress", "a", "dress", "a garment for the whole body"),
    Garment("coat", "a", "coat", "a garment worn over others"),
    Garment("sandal", "a", "sandal", "an open shoe"),
    Garment("shirt", "a", "shirt", "a garment for the upper body"),
    Garment("sneaker", "a", "sneaker", "a low shoe for sports"),
    Garment("bag", "a", "bag", "a thing to carry other things in"),
    Garment("ankle boot", "an", "ankle boot", "a shoe that covers the ankle"),
)


@dataclass(frozen=True)
class Photograph:
    """One test photograph, uint8 (28, 28), with its texts."""

    key: str
    pixels: np.ndarray
    garment: Garment
    alt: str
    synthetic: str


def photographs(packages: Packages) -> Iterator[Photograph]:
    """The test split in its order; raises OpenVisionError when the files of the package are malformed."""
    found = dict(packages.members("fashion-mnist", lambda name: name in (_IMAGES, _LABELS)))
    path = packages.path("fashion-mnist")
    images, labels = (_read_idx(found.get(name), name, str(path)) for name in (_IMAGES, _LABELS))
    if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max(initial=0) >= len(GARMENTS):
        raise OpenVisionError(f"{path}: images {images.shape} and labels {labels.shape} do not match; remove the file")
    for index, (pixels, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        yield _photograph(f"fashion-{index:05d}", pixels, GARMENTS[label])


def _photograph(key: str, pixels: np.ndarray, garment: Garment) -> Photograph:
    inked = pixels > 32
    height, width = int(inked.any(axis=1).sum()), int(inked.any(axis=0).sum())
    bright = bool(inked.any() and pixels[inked].mean() > 128)
    form = pick(key, "alt", _ALT_FORMS)
    caption = photograph_caption(
        noun=garment.noun,
        article=garment.article,
        kind=garment.kind,
        plural=garment.noun.endswith("trousers"),
        bright=bright,
        ratio=width / max(1, height),
    )
    return Photograph(key, pixels, garment, form.format(name=garment.name, title=garment.name.title()), caption)


def _read_idx(data: bytes | None, name: str, path: str) -> np.ndarray:
    """An array in the IDX format: two zeros, a type, the number of axes, the shape, the values."""
    if data is None:
        raise OpenVisionError(f"{path} has no {name}; remove the file to fetch it again")
    try:
        content = gzip.decompress(data)
        zeros, kind, axes = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{axes}I", content, 4)
        if zeros or kind != _IDX_UBYTE:
            raise ValueError(f"type {kind}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise OpenVisionError(f"{path}: {name} is not an IDX file of bytes: {error}; remove {path}") from error
