"""Preprocess for evaluation and inference: any image to uint8 pixels of a model's resolution (spec section 7).

Resizing is antialiased bilinear in float32, truncated to uint8 and not rounded, because models were trained that way.
The vision tower normalises (`models/vision.py`).
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from openvision.errors import OpenVisionError
from openvision.images.decode import MAX_PIXELS, STRIP_PIXELS, BadSampleError, decode_image, to_rgb

ImageInput = bytes | Image.Image | NDArray[np.uint8]
"""An encoded image, a Pillow image, or RGB uint8 (H, W, 3)."""
Size = int | tuple[int, int]
"""Pixels of a square, or (height, width)."""
Square = Literal["crop", "squash"]
Preprocessing = Literal[Square, "native"]
"""How images are brought to the size of a model; with "native" they keep their aspect (native.py)."""


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (height, width, 3), antialiased bilinear, truncated.

    The result is a view of a (3, height, width) tensor, the layout of a batch.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    # torch resizes rows first, then columns: rows resized a strip at a time have the same bits, and a large image is
    # never there as floats.
    strips = pixels.split(max(1, STRIP_PIXELS // image.shape[1]), dim=2)
    if len(strips) > 1:
        pixels = torch.cat([_interpolate(strip, strip.shape[2], width) for strip in strips], dim=2)
    return truncated(_interpolate(pixels, height, width)[0]).permute(1, 2, 0).numpy()


def _interpolate(pixels: Tensor, height: int, width: int) -> Tensor:
    """(1, 3, H, W) -> float32 (1, 3, height, width)."""
    return F.interpolate(pixels.float(), size=(height, width), mode="bilinear", antialias=True, align_corners=False)


def truncated(pixels: Tensor) -> Tensor:
    """Floats from 0 to 255 -> uint8, truncated. Going through int16 is four times as fast in torch."""
    return pixels.to(torch.int16).to(torch.uint8)


def prepare(image: ImageInput, size: Size, mode: Square = "crop") -> NDArray[np.uint8]:
    """Bytes of an image file, a Pillow image or RGB uint8 (H, W, 3) -> uint8 (height, width, 3) of `size`.

    "crop" scales until `size` is covered and takes the centre: what models were trained and evaluated with.
    "squash" scales both sides, whatever the aspect: what the released PyTorch configurations say.
    Raises BadSampleError for bytes that cannot be decoded and for images too long to crop, OpenVisionError for an array
    of another shape or dtype.
    """
    pixels = to_pixels(image)
    return resize_center_crop(pixels, size) if mode == "crop" else squash(pixels, size)


def to_pixels(image: ImageInput) -> NDArray[np.uint8]:
    """Bytes of an image file, a Pillow image or RGB uint8 (H, W, 3) -> RGB uint8 (H, W, 3); errors as of `prepare`."""
    if isinstance(image, bytes):
        return decode_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise OpenVisionError(f"an array must be RGB uint8 (H, W, 3), not {image.dtype} {image.shape}")
    return image


def resize_center_crop(image: np.ndarray, size: Size) -> np.ndarray:
    """Scale until `size` is covered (for a square: shorter side to `size`), then crop the centre (spec section 7).

    Raises BadSampleError for a strip so long that its resized form would hold more than MAX_PIXELS.
    """
    height, width = image.shape[:2]
    rows, columns = _sides(size)
    # The original computes the ratio and the sides in float32.
    ratio = max(np.float32(rows) / np.float32(height), np.float32(columns) / np.float32(width))
    new_height, new_width = (int(np.round(np.float32(side) * ratio)) for side in (height, width))
    # An image of 1 x 20,000 pixels would become one of 224 x 4,480,000: twelve gigabytes of floats.
    if new_height * new_width > max(MAX_PIXELS, rows * columns):
        raise BadSampleError("extreme_aspect", f"an image of {width} x {height} pixels is too elongated to crop")
    resized = resize(image, new_height, new_width)
    top, left = (new_height - rows) // 2, (new_width - columns) // 2
    return resized[top : top + rows, left : left + columns].copy(order="K")


def squash(image: np.ndarray, size: Size) -> np.ndarray:
    """Resize to `size` whatever the aspect, as in the released PyTorch configurations."""
    return resize(image, *_sides(size))


def _sides(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def to_batch(images: list[np.ndarray]) -> Tensor:
    """Images of one size, uint8 (H, W, 3) each -> uint8 tensor (B, 3, H, W)."""
    return torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image in images]))
