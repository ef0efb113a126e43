"""Native shapes: an image keeps its aspect and has a budget of patches (as NaFlex in SigLIP 2, arXiv 2502.14786).

An aspect falls into the nearest of a few buckets, and each bucket has one grid of patches within the budget. Images of
one bucket form a batch without padding or mask; the rest of the difference between an image and its bucket is cropped,
as a square crop would be. The bucket of a square has the grid of the square model.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openvision.images.augment import Augment, random_box
from openvision.images.decode import BadSampleError, SourceImage
from openvision.images.preprocess import ImageInput, Preprocessing, Size, prepare, resize, resize_center_crop, to_pixels

ASPECTS = (1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 2.0, 3.0, 4.0)
"""Width over height of the buckets, by default."""
# An image may be so much longer than the longest bucket: 401 x 100 pixels are meant as 4 to 1.
_TOLERANCE = 1.1


@dataclass(frozen=True)
class NativeShapes:
    """The shapes that images may have."""

    patch_size: int
    max_tokens: int
    """Patches of an image, at most."""
    aspects: tuple[float, ...] = ASPECTS

    @cached_property
    def _buckets(self) -> list[tuple[float, int, int]]:
        return [(aspect, *grid_of(aspect, self.max_tokens)) for aspect in sorted(self.aspects)]

    @property
    def pixels(self) -> int:
        """Pixels of the largest shape."""
        return max(rows * columns for _, rows, columns in self._buckets) * self.patch_size**2

    @property
    def shortest_side(self) -> int:
        """Pixels of the shortest side of any shape."""
        return min(min(rows, columns) for _, rows, columns in self._buckets) * self.patch_size

    def shape_of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels that an image of the given size is resized to.

        Raises BadSampleError for an aspect beyond the largest bucket.
        """
        aspect = width / height
        least, greatest = self._buckets[0][0], self._buckets[-1][0]
        if not least / _TOLERANCE <= aspect <= greatest * _TOLERANCE:
            raise BadSampleError(
                "extreme_aspect",
                f"an image of {width} x {height} pixels is beyond the largest bucket, whose sides are "
                f"{_written(greatest if aspect > 1 else least)}; crop it, or train with a bucket for it",
            )
        _, rows, columns = min(self._buckets, key=lambda bucket: abs(math.log(bucket[0] / aspect)))
        return rows * self.patch_size, columns * self.patch_size

    def prepare(self, image: ImageInput) -> NDArray[np.uint8]:
        """Any image -> uint8 (height, width, 3) of its bucket, covered and cropped at the centre; for evaluation."""
        pixels = to_pixels(image)
        return resize_center_crop(pixels, self.shape_of(*pixels.shape[:2]))

    def random_crop(self, image: SourceImage, rng: np.random.Generator, augment: Augment) -> NDArray[np.uint8]:
        """A random crop resized to the bucket of the whole image, uint8 (height, width, 3).

        Its aspect is drawn around that of the bucket; for a square it is the crop of `augment.random_crop`.
        """
        height, width = self.shape_of(image.height, image.width)
        low, high = augment.crop_aspect
        aspect = width / height
        box = random_box(rng, image, augment.model_copy(update={"crop_aspect": (low * aspect, high * aspect)}))
        side = height
        if height != width:
            # A JPEG is decoded at a scale that covers `side` with the shorter side of the crop.
            side = math.ceil(min(box[2:]) / min(Fraction(box[2], height), Fraction(box[3], width)))
        return resize(image.crop(box, side), height, width)


def prepare_as(
    mode: Preprocessing, image: ImageInput, size: Size, patch_size: int, aspects: tuple[float, ...] = ()
) -> NDArray[np.uint8]:
    """Any image -> uint8 (height, width, 3) as `mode` says: with "native" of its own shape, else of `size`.

    The budget of a native shape is that of `size`, its buckets are `aspects`, the default ones where there are none.
    Raises as `preprocess.prepare`, and BadSampleError for an aspect beyond the largest bucket.
    """
    if mode != "native":
        return prepare(image, size, mode)
    height, width = (size, size) if isinstance(size, int) else size
    budget = (height // patch_size) * (width // patch_size)
    return NativeShapes(patch_size, budget, aspects or ASPECTS).prepare(image)


def grid_of(aspect: float, max_tokens: int) -> tuple[int, int]:
    """Rows and columns of the grid of at most `max_tokens` patches that shows most of an image of `aspect`.

    The patches count as far as the image fills them: a grid of another aspect crops the rest.
    """
    if aspect > 1:
        columns, rows = grid_of(1 / aspect, max_tokens)
        return rows, columns
    narrow = max(1, math.isqrt(math.floor(max_tokens * aspect + 1e-6)))
    grids = [(max(1, min(round(c / aspect), max_tokens // c)), c) for c in (narrow, min(narrow + 1, max_tokens))]

    def shown(grid: tuple[int, int]) -> float:
        rows, columns = grid
        # Of two that show as much the narrower one, whichever way the last digits fall.
        return round(rows * columns * min(columns / rows / aspect, aspect * rows / columns), 6)

    return max(grids, key=shown)


def pack(images: Sequence[Tensor], pixels: int) -> tuple[Tensor, Tensor]:
    """Images (3, H, W) of several shapes -> uint8 (B, 3, pixels), each row's pixels first, and shapes int64 (B, 2)."""
    packed = torch.zeros(len(images), 3, pixels, dtype=torch.uint8)
    for row, image in zip(packed, images, strict=True):
        row[:, : image[0].numel()] = image.flatten(1)
    return packed, torch.tensor([image.shape[-2:] for image in images], dtype=torch.int64).reshape(-1, 2)


def unpack(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows of `pack` that have the same shape -> images (B, 3, H, W)."""
    height, width = shape
    return packed[:, :, : height * width].unflatten(2, (height, width))


def rows_by_shape(shapes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """Shape -> the rows that have it, ascending; shapes in the order of their sizes."""
    rows: dict[tuple[int, int], list[int]] = {}
    for row, shape in enumerate(shapes):
        rows.setdefault(shape, []).append(row)
    return dict(sorted(rows.items()))


def stacked_by_shape(images: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Images (3, H, W) of several shapes -> for each shape the places of its images and their batch (n, 3, H, W)."""
    for rows in rows_by_shape([(image.shape[1], image.shape[2]) for image in images]).values():
        yield rows, torch.stack([images[row] for row in rows])


def remark_on_shapes(aspects: Sequence[float], mode: Preprocessing) -> str | None:
    """What to say where a model that was trained on native shapes of `aspects` reads others; None elsewhere."""
    if not aspects or mode == "native":
        return None
    return "this model was trained on native shapes and reads squares here; --native keeps the aspect"


def _written(aspect: float) -> str:
    return f"{aspect:.3g} to 1" if aspect >= 1 else f"1 to {1 / aspect:.3g}"
