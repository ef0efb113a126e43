"""Pixels: resizing as the original's evaluation does it, crops, normalisation (spec sections 4 and 7).

Resizing is antialiased bilinear in float32 and then truncated, not rounded, to uint8: so were the models trained.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openvision.images.decode import MAX_PIXELS as MAX_PIXELS
from openvision.images.decode import BadSampleError as BadSampleError
from openvision.images.decode import decode_image as decode_image
from openvision.images.decode import to_rgb as to_rgb

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (height, width, 3), antialiased bilinear, truncated.

    The result is a view of planes (3, height, width), as a batch holds them.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return truncated(resized[0]).permute(1, 2, 0).numpy()


def truncated(pixels: Tensor) -> Tensor:
    """Floats of 0 to 255 as uint8, cut and not rounded. By way of int16, which torch converts four times as fast."""
    return pixels.to(torch.int16).to(torch.uint8)


Size = int | tuple[int, int]
Preprocessing = Literal["crop", "squash"]


def prepare(image: np.ndarray, size: Size, mode: Preprocessing = "crop") -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 of `size` pixels, a square or (height, width), ready to be normalised.

    "crop" is what the models were trained and evaluated with: scale until `size` is covered, take the middle.
    "squash" is what the released PyTorch configurations say: scale both sides, whatever the aspect.
    """
    return resize_center_crop(image, size) if mode == "crop" else squash(image, size)


def resize_center_crop(image: np.ndarray, size: Size) -> np.ndarray:
    """Scale until `size` is covered (for a square: shorter side to `size`), then the middle of it.

    The evaluation the models were made for (spec section 7). Raises BadSampleError for a strip so long that its
    resized form would hold more than MAX_PIXELS.
    """
    height, width = image.shape[:2]
    rows, columns = _sides(size)
    # The original computes the ratio and the sides in float32.
    ratio = max(np.float32(rows) / np.float32(height), np.float32(columns) / np.float32(width))
    new_height, new_width = (int(np.round(np.float32(side) * ratio)) for side in (height, width))
    # A picture of 1 x 20,000 pixels would become one of 224 x 4,480,000: twelve gigabytes of floats.
    if new_height * new_width > max(MAX_PIXELS, rows * columns):
        raise BadSampleError("extreme_aspect", f"the picture of {width} x {height} pixels is too long to be cropped")
    resized = resize(image, new_height, new_width)
    top, left = (new_height - rows) // 2, (new_width - columns) // 2
    return resized[top : top + rows, left : left + columns].copy(order="K")


def squash(image: np.ndarray, size: Size) -> np.ndarray:
    """Resize to `size` whatever the aspect, as the released PyTorch configurations say."""
    return resize(image, *_sides(size))


def _sides(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 with ImageNet mean and deviation, on the tensor's own device."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1) * 255
    deviation = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1) * 255
    return (images.float() - mean) / deviation


def to_batch(images: list[np.ndarray]) -> Tensor:
    """Pictures of one size, uint8 (H, W, 3) each -> uint8 tensor (B, 3, H, W)."""
    return torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image in images]))
