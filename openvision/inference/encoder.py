"""A trained encoder in three lines:

from openvision.inference.encoder import Encoder
encoder = Encoder.load("runs/quickstart/model")
encoder.classify("cat.png", ["a cat", "a dog"])
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from openvision.data.images import BadSampleError, decode_image, resize_center_crop, to_batch, to_rgb
from openvision.errors import OpenVisionError
from openvision.evaluation.features import encode_images, encode_texts
from openvision.models.openvision import OpenVision
from openvision.text.tokenizer import Tokenizer
from openvision.weights.folder import load_folder

ImageInput = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]


class UnreadableImageError(OpenVisionError):
    """A file that is missing or not a picture."""


class Encoder:
    """Pictures and texts to unit vectors of one space."""

    def __init__(self, model: OpenVision, tokenizer: Tokenizer, resolution: int | None = None) -> None:
        """Use `model` at `resolution` pixels (its own by default)."""
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.resolution = resolution or model.config.vision.image_size

    @classmethod
    def load(cls, path: str | os.PathLike[str], resolution: int | None = None) -> "Encoder":
        """Read a model folder; raises OpenVisionError when it is missing, incomplete or broken."""
        model, tokenizer, _ = load_folder(Path(path))
        return cls(model, tokenizer, resolution)

    @property
    def scale(self) -> float:
        """What cosines are multiplied by before the softmax: exp(logit_scale)."""
        return float(self.model.logit_scale.detach().exp())

    def prepare(self, image: ImageInput) -> Tensor:
        """One picture as uint8 (3, R, R): RGB, shorter side to R pixels, central crop.

        Raises UnreadableImageError for a missing or undecodable file or one too long for a square, OpenVisionError for
        an array of another layout.
        """
        try:
            return to_batch([resize_center_crop(_pixels(image), self.resolution)])[0]
        except BadSampleError as bad:
            raise UnreadableImageError(f"{_named(image)} cannot be used: {bad}") from bad

    def encode_prepared(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Pictures as `prepare` makes them, uint8 (n, 3, R, R) -> unit vectors float32 (n, E)."""
        return torch.from_numpy(encode_images(self.model, images, batch_size))

    def encode_images(self, images: Iterable[ImageInput], batch_size: int = 64) -> Tensor:
        """Paths, Pillow images or RGB arrays uint8 (H, W, 3) -> unit vectors float32 (n, E)."""
        if isinstance(images, (str, os.PathLike, Image.Image)):
            raise OpenVisionError("encode_images takes a list of pictures; put the one picture into a list")
        prepared = [self.prepare(image) for image in images]
        if not prepared:
            return torch.empty(0, self.model.config.embed_dim)
        return self.encode_prepared(torch.stack(prepared), batch_size)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Texts -> unit vectors float32 (n, E)."""
        if isinstance(texts, str):
            raise OpenVisionError("encode_texts takes a list of texts; put the one text into a list")
        if not texts:
            return torch.empty(0, self.model.config.embed_dim)
        return torch.from_numpy(encode_texts(self.model, self.tokenizer, texts, batch_size))

    def classify(self, image: ImageInput, labels: Sequence[str]) -> list[tuple[str, float]]:
        """Labels with probabilities (softmax over the labels of the scaled cosine), most probable first."""
        from openvision.inference.classify import classify

        return classify(self, image, labels)

    def search(self, folder: str | os.PathLike[str], query: str, top: int = 5) -> list[tuple[Path, float]]:
        """The `top` pictures below `folder` nearest to `query`: path and cosine; unreadable files are skipped."""
        from openvision.inference.search import search

        return search(self, Path(folder), query, top).hits


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
