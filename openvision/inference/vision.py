"""`VisionEncoder`: a vision tower with its preprocessing, as a multimodal model puts it before a language model.

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

from openvision.encoding import encode_images, evaluating
from openvision.errors import OpenVisionError
from openvision.images.decode import IMAGE_SUFFIXES, BadSampleError
from openvision.images.native import prepare_as, stacked_by_shape
from openvision.images.preprocess import Preprocessing, Size, to_batch
from openvision.models.layers import unit
from openvision.models.vision import VisionFeatures, VisionTransformer
from openvision.weights.load import Checkpoint

ImageInput = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
"""A path, a Pillow image, or RGB uint8 (H, W, 3)."""


class UnreadableImageError(OpenVisionError):
    """An image file that is missing or cannot be used."""


class VisionEncoder:
    """Images to patch tokens and, where the tower has a projection head, to unit vectors."""

    source: str | None = None
    """Where the weights were loaded from; None for a model made in memory."""

    def __init__(
        self, vision: VisionTransformer, resolution: Size | None = None, preprocessing: Preprocessing = "crop"
    ) -> None:
        """Use `vision` at `resolution` pixels, a square or (height, width); by default its trained resolution.

        Positions are computed for any grid, so no weight depends on the resolution.
        """
        self.vision = vision.eval()
        self.resolution = resolution or vision.config.image_size
        self.preprocessing: Preprocessing = preprocessing
        if min(self.grid) < 1:
            raise OpenVisionError(
                f"resolution {self.resolution} is smaller than a patch of {vision.config.patch_size} pixels"
            )

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, resolution: Size | None = None, preprocessing: Preprocessing = "crop"
    ) -> Self:
        """Wrap a checkpoint that `weights.load.load_checkpoint` returned."""
        encoder = cls(checkpoint.vision, resolution, preprocessing)
        encoder.source = checkpoint.source
        return encoder

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at this resolution; 384 px at patch 14 give 27 x 27, six pixels are dropped."""
        return self.vision.config.grid(*self._sides)

    @property
    def _sides(self) -> tuple[int, int]:
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution

    @property
    def num_patches(self) -> int:
        """Patch tokens of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def width(self) -> int:
        """Channels of a patch token."""
        return self.vision.config.width

    @property
    def embed_dim(self) -> int:
        """Width of an image embedding; raises OpenVisionError without a projection head."""
        if self.vision.head is None:
            raise OpenVisionError(
                "this vision tower has no projection head (captioning alone trains none); use forward_features"
            )
        return self.vision.head.out_features

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the weights, e.g. `encoder.to("cuda", torch.bfloat16)`; images follow."""
        self._module().to(device=device, dtype=dtype)
        return self

    def _module(self) -> torch.nn.Module:
        return self.vision

    def preprocess(self, image: ImageInput) -> Tensor:
        """One image -> uint8 (3, height, width): RGB, upright, resized and cropped or squashed, or of its own shape.

        The transform of a data set: `torch.stack` of its results is a batch for `model`, which normalises it.
        Raises UnreadableImageError for a file that is missing, cannot be decoded or is too elongated to crop,
        OpenVisionError for an array of another shape or dtype.
        """
        name = f"image {image}" if isinstance(image, (str, os.PathLike)) else "the image"
        try:
            content = Path(image).read_bytes() if isinstance(image, (str, os.PathLike)) else image
            shape = self.vision.config
            pixels = prepare_as(self.preprocessing, content, self.resolution, shape.patch_size, shape.aspects)
            return to_batch([pixels])[0]
        except FileNotFoundError:
            raise UnreadableImageError(f"{name} does not exist") from None
        except OSError as error:
            raise UnreadableImageError(f"{name} cannot be read: {error.strerror or error}") from error
        except BadSampleError as bad:
            raise UnreadableImageError(f"{name} cannot be used: {bad}") from bad

    def preprocess_all(self, images: Iterable[ImageInput]) -> Tensor:
        """n images -> uint8 (n, 3, height, width); raises OpenVisionError for native images of several shapes."""
        prepared = self._prepared(images)
        if len(shapes := {tuple(image.shape) for image in prepared}) > 1:
            raise OpenVisionError(
                f"the images have {len(shapes)} native shapes, and a batch has one; use encode_images, or give images "
                "of one shape at a time"
            )
        return torch.stack(prepared) if prepared else torch.empty(0, 3, *self._sides, dtype=torch.uint8)

    def _prepared(self, images: Iterable[ImageInput]) -> list[Tensor]:
        if isinstance(images, (str, os.PathLike, Image.Image)):
            raise OpenVisionError("expected a list of images, got a single one; put it into a list")
        return [self.preprocess(image) for image in images]

    def forward_features(
        self, images: Tensor | Iterable[ImageInput], layers: Sequence[int] = (), norm: bool = False
    ) -> VisionFeatures:
        """Patch tokens, class token, pooled vector and grid, and the tokens of `layers` (see VisionTransformer).

        `images` are B images, or a tensor (B, 3, H, W) of any resolution: uint8, or floats already normalised.
        Gradients flow; wrap the call in `torch.inference_mode()` when none are needed.
        """
        batch = images if isinstance(images, Tensor) else self.preprocess_all(images)
        return self.vision.forward_features(batch.to(self.vision.fc_norm.weight.device), layers=layers, norm=norm)

    def encode_prepared(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Images from `preprocess`, uint8 (n, 3, H, W) -> unit vectors float32 (n, E)."""
        dim = self.embed_dim
        if not len(images):
            return torch.empty(0, dim)
        return torch.from_numpy(encode_images(self.vision, images, batch_size))

    def encode_images(self, images: Iterable[ImageInput], batch_size: int = 64) -> Tensor:
        """n images -> unit vectors float32 (n, E)."""
        return self.encode_each(self._prepared(images), batch_size)

    def encode_each(self, images: Sequence[Tensor], batch_size: int = 64) -> Tensor:
        """Images from `preprocess`, uint8 (3, H, W) each, of any shapes -> unit vectors float32 (n, E)."""
        vectors = torch.empty(len(images), self.embed_dim)
        for rows, alike in stacked_by_shape(images):
            vectors[rows] = self.encode_prepared(alike, batch_size)
        return vectors

    def encode_unit(self, images: Iterable[ImageInput], batch_size: int = 64) -> Tensor:
        """`encode_images`; a tower without a head gives its pooled vectors at unit length, float32 (n, D)."""
        if self.vision.head is not None:
            return self.encode_images(images, batch_size)
        with evaluating(self.vision):
            prepared = self._prepared(images)
            vectors = torch.empty(len(prepared), self.width)
            for rows, alike in stacked_by_shape(prepared):
                parts = [self.forward_features(some).pooled.float().cpu() for some in alike.split(batch_size)]
                vectors[rows] = torch.cat(parts)
            return unit(vectors)


def image_files(folder: Path) -> list[Path]:
    """Image files below `folder` by suffix, sorted; raises OpenVisionError without the folder or images in it."""
    if not folder.is_dir():
        raise OpenVisionError(f"{folder} is not a folder; give a folder of images")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise OpenVisionError(f"{folder} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}); give another folder")
    return found
