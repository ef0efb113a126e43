"""One image of its own shape in the place of a square: its pixels, its tokens, and batches of several shapes.

An image keeps its aspect within a budget of patches (images/native.py). The language model reads its grid row by row,
a line break of its own vocabulary behind each row, which tells it where rows end and needs no training. A batch holds
images padded to the largest, with their sizes: the tower (own_tower.py) encodes each shape alone, and no padding.
"""

from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from openvision.errors import OpenVisionError
from openvision.images.decode import BadSampleError
from openvision.images.native import ASPECTS, NativeShapes
from openvision.multimodal.model.huggingface import ImageProcessor, Tokenizer

LEAST_TOKENS = 16
"""Smallest budget: two rows of eight patches of an image of 4 to 1."""


def native_shapes(patch_size: int, max_tokens: int, aspects: Sequence[float] = ()) -> NativeShapes:
    """The shapes of a budget, in the buckets that the tower was trained on, else the default ones.

    Raises OpenVisionError for a budget that is too small.
    """
    if max_tokens < LEAST_TOKENS:
        raise OpenVisionError(
            f"a budget of {max_tokens} tokens is too small for an image of 4 to 1; set max_tokens to {LEAST_TOKENS} or "
            "more, e.g. 256"
        )
    return NativeShapes(patch_size, max_tokens, tuple(aspects) or ASPECTS)


def row_break(tokenizer: Tokenizer) -> int:
    """Id of the line break behind a row of patches; raises OpenVisionError for a tokenizer that has none."""
    ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    # Some tokenizers put a space of their own before it.
    if not ids or tokenizer.decode([ids[-1]]).strip(" ") != "\n":
        raise OpenVisionError(
            "the language model's tokenizer has no token for a line break, which ends each row of patches; use the "
            "framework llava-1.5 with it"
        )
    return int(ids[-1])


def prepare(image: Image.Image, shapes: NativeShapes, processor: ImageProcessor) -> Tensor:
    """An RGB image -> float32 (3, H, W) of its shape, normalised as the tower expects.

    Raises BadSampleError for an aspect beyond the largest bucket.
    """
    pixels = torch.from_numpy(shapes.prepare(image)).permute(2, 0, 1).float() / 255
    mean, deviation = (
        torch.tensor(list(values))[:, None, None] for values in (processor.image_mean, processor.image_std)
    )
    return (pixels - mean) / deviation


def prepare_or_refuse(image: Image.Image, shapes: NativeShapes, processor: ImageProcessor) -> Tensor:
    """The same for an image that a person gave: raises OpenVisionError."""
    try:
        return prepare(image, shapes, processor)
    except BadSampleError as error:
        raise OpenVisionError(str(error)) from error


def pad_images(images: Sequence[Tensor]) -> Tensor:
    """Images (3, H, W) -> (n, 3, largest H, largest W), zeros beyond each."""
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    padded = images[0].new_zeros(len(images), 3, height, width)
    for row, image in zip(padded, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return padded


def expand_images(ids: Sequence[int], image_token_id: int, images: Iterator[Sequence[int]]) -> list[int]:
    """`ids` with the next of `images` in the place of each image token."""
    expanded: list[int] = []
    for token in ids:
        expanded.extend(next(images) if token == image_token_id else [token])
    return expanded
