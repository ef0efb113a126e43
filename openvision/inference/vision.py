"""A vision tower with its preprocessing: what a builder of multimodal models puts before a language model.

import openvision
vision = openvision.load_vision("openvision-vit-large-patch14-336")
tokens = vision.forward_features(["cat.png"], layers=[-2]).layers[0].patch_tokens    # (1, 576, 1024)
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from openvision.encoding import encode_images
from openvision.errors import OpenVisionError
from openvision.images.preprocess import (
    BadSampleError,
    Preprocessing,
    Size,
    decode_image,
    normalize,
    prepare,
    to_batch,
    to_rgb,
)
from openvision.models.vision import VisionFeatures, VisionTransformer
from openvision.weights.load import Checkpoint

ImageInput = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]


class UnreadableImageError(OpenVisionError):
    """A file that is missing or not a picture."""


class VisionEncoder:
    """Pictures to patch tokens and, where a head was trained, to unit vectors."""

    def __init__(
        self, vision: VisionTransformer, resolution: Size | None = None, preprocessing: Preprocessing = "crop"
    ) -> None:
        """Use `vision` at `resolution` pixels, a square or (height, width); its own by default.

        Positions are computed for whatever grid the resolution gives: no weight depends on it.
        """
        self.vision = vision.eval()
        self.resolution = resolution or vision.config.image_size
        self.preprocessing: Preprocessing = preprocessing
        if min(self.grid) < 1:
            raise OpenVisionError(
                f"a resolution of {self.resolution} holds no patch of {vision.config.patch_size} pixels"
            )

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, resolution: Size | None = None, preprocessing: Preprocessing = "crop"
    ) -> Self:
        """Wrap what `weights.load.load_checkpoint` read."""
        return cls(checkpoint.vision, resolution, preprocessing)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at this resolution; 384 px at patch 14 give 27 x 27, six pixels are dropped."""
        sides = (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution
        return self.vision.config.grid(*sides)

    @property
    def num_patches(self) -> int:
        """Patch tokens of a picture."""
        return self.grid[0] * self.grid[1]

    @property
    def width(self) -> int:
        """Channels of a patch token."""
        return self.vision.config.width

    @property
    def embed_dim(self) -> int:
        """Channels of a picture's unit vector; raises OpenVisionError without a trained head."""
        if self.vision.head is None:
            raise OpenVisionError(
                "this vision tower has no projection head (OpenVision 2 trains none); use forward_features"
            )
        return self.vision.head.out_features

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the weights, e.g. `encoder.to("cuda", torch.bfloat16)`; pictures follow by themselves."""
        self._module().to(device=device, dtype=dtype)
        return self

    def _module(self) -> torch.nn.Module:
        return self.vision

    def prepare(self, image: ImageInput) -> Tensor:
        """One picture as uint8 (3, height, width): RGB, upright, scaled and cropped or squashed.

        Raises UnreadableImageError for a missing or undecodable file or one too long to be cropped, OpenVisionError
        for an array of another layout.
        """
        try:
            return to_batch([prepare(_pixels(image), self.resolution, self.preprocessing)])[0]
        except BadSampleError as bad:
            raise UnreadableImageError(f"{_named(image)} cannot be used: {bad}") from bad

    def prepare_all(self, images: Iterable[ImageInput]) -> Tensor:
        """Several pictures as uint8 (n, 3, height, width)."""
        if isinstance(images, (str, os.PathLike, Image.Image)):
            raise OpenVisionError("this takes a list of pictures; put the one picture into a list")
        prepared = [self.prepare(image) for image in images]
        rows, columns = (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution
        return torch.stack(prepared) if prepared else torch.empty(0, 3, rows, columns, dtype=torch.uint8)

    def forward_features(
        self, images: Tensor | Iterable[ImageInput], layers: Sequence[int] = (), norm: bool = False
    ) -> VisionFeatures:
        """Patch tokens, class token, pooled vector and grid, and the tokens of `layers` (see VisionTransformer).

        `images` are pictures, or uint8 (B, 3, H, W), or floats (B, 3, H, W) that are already normalised; tensors may
        have any resolution. Gradients flow: wrap it in `torch.inference_mode()` when none are needed.
        """
        batch = images if isinstance(images, Tensor) else self.prepare_all(images)
        batch = batch.to(self.vision.cls_token.device)
        pixels = normalize(batch) if batch.dtype == torch.uint8 else batch
        return self.vision.forward_features(pixels, layers=layers, norm=norm)

    def encode_prepared(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Pictures as `prepare` makes them, uint8 (n, 3, H, W) -> unit vectors float32 (n, E)."""
        dim = self.embed_dim
        if not len(images):
            return torch.empty(0, dim)
        return torch.from_numpy(encode_images(self.vision, images, batch_size))

    def encode_images(self, images: Iterable[ImageInput], batch_size: int = 64) -> Tensor:
        """Paths, Pillow images or RGB arrays uint8 (H, W, 3) -> unit vectors float32 (n, E)."""
        return self.encode_prepared(self.prepare_all(images), batch_size)


def _pixels(image: ImageInput) -> NDArray[np.uint8]:
    """RGB uint8 (H, W, 3)."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise OpenVisionError(f"an array must be RGB uint8 (H, W, 3), not {image.dtype} {image.shape}")
        return image
    if isinstance(image, Image.Image):
        return to_rgb(image)
    try:
        return decode_image(Path(image).read_bytes())
    except FileNotFoundError:
        raise UnreadableImageError(f"picture {image} does not exist") from None
    except OSError as error:
        raise UnreadableImageError(f"picture {image} cannot be read: {error.strerror}") from error


def _named(image: ImageInput) -> str:
    return f"picture {image}" if isinstance(image, (str, os.PathLike)) else "the picture"
