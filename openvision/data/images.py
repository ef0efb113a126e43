"""Pictures: bytes to pixels, resizing as the original's evaluation does it, normalisation (spec sections 4 and 7).

Resizing is antialiased bilinear in float32 and then truncated, not rounded, to uint8: so were the models trained.
"""

import io
import warnings
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from openvision.data.bad_sample import BadSampleError as BadSampleError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# A picture of more pixels is refused before it is decoded: a small file can unfold to gigabytes.
MAX_PIXELS = 50_000_000


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Encoded picture -> RGB uint8 (H, W, 3), upright, transparency on white.

    Raises BadSampleError for bytes that are no picture, are cut short, or hold more than `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns above its own limit; ours is checked here, before any pixel is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > max_pixels:
                    size = f"{image.width} x {image.height}"
                    raise BadSampleError("too_large", f"the picture has {size} pixels, more than {max_pixels}")
                return to_rgb(image)
    except BadSampleError:
        raise
    except Image.DecompressionBombError as error:
        raise BadSampleError("too_large", str(error)) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise BadSampleError("undecodable", f"the picture cannot be decoded: {error}") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """Any Pillow image -> RGB uint8 (H, W, 3): EXIF rotation applied, transparency on white, 16 bits scaled."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        # 16-bit grey: Pillow's own conversion would clip it to white. Other modes do not say how many bits they use.
        sixteen = image.mode.startswith("I;16") or values.max(initial=0) > 255
        scaled = values / 257 if sixteen else values
        return np.repeat(scaled.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(canvas, layer).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (height, width, 3), antialiased bilinear, truncated."""
    pixels = torch.tensor(image).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).to(torch.uint8).contiguous().numpy()


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
    return np.ascontiguousarray(resized[top : top + rows, left : left + columns])


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
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
