"""A checkpoint as the demo uses it: what it can do, and one sentence for what it cannot."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from openvision.encoding import generate_captions, write_captions
from openvision.errors import OpenVisionError
from openvision.images.preprocess import Preprocessing
from openvision.inference.captioner import Captioner
from openvision.inference.encoder import Encoder
from openvision.inference.patch_maps import overlay, patch_pca, shown, text_map
from openvision.inference.vision import VisionEncoder
from openvision.models.openvision3 import OpenVision3
from openvision.weights.load import Request, load_checkpoint

_LARGE = 384
"""Pixels of the longer side of maps; patches are enlarged to it."""


@dataclass(frozen=True)
class DemoCheckpoint:
    """A loaded checkpoint and its name on the page."""

    name: str
    encoder: VisionEncoder

    def classify(self, image: Path, labels: list[str]) -> dict[str, float]:
        """Probabilities by label."""
        return dict(self._encoder("classify").classify(image, labels))

    def text_vector(self, text: str) -> NDArray[np.float32]:
        """Unit vector (E,) of a query."""
        if not text.strip():
            raise OpenVisionError('the query is empty; give a text, e.g. "a red car"')
        return self._encoder("search by text").encode_texts([text])[0].numpy()

    def image_vector(self, image: Path) -> NDArray[np.float32]:
        """Unit vector (E,) of an image."""
        return self.encoder.encode_unit([image])[0].numpy()

    def caption(self, image: Path, alt: str) -> str:
        """A caption; version 1 also reads an alt-text, OpenVision 2 and 3 do not."""
        if isinstance(self.encoder, Captioner):
            return self.encoder.caption([image])[0]
        cannot = f"{self.name} cannot caption: it has no caption decoder; give a model that was trained with captions"
        if not isinstance(self.encoder, Encoder) or self.encoder.model.decoder is None:
            raise OpenVisionError(cannot)
        model, tokenizer = self.encoder.model, self.encoder.tokenizer
        if isinstance(model, OpenVision3):
            return write_captions(model, tokenizer, self.encoder.preprocess_all([image]))[0]
        if not alt.strip():
            raise OpenVisionError(f"{self.name} captions from an image and an alt-text; write a few words about it")
        return generate_captions(model, tokenizer, self.encoder.preprocess_all([image]), [alt])[0]

    def text_map(self, image: Path, text: str) -> NDArray[np.uint8]:
        """The image with the patches bright that fit the text, RGB uint8 (H, W, 3)."""
        encoder = self._encoder("compare patches with a text")
        return _enlarged(overlay(shown(encoder, image), text_map(encoder, image, text)))

    def patch_pca(self, image: Path) -> NDArray[np.uint8]:
        """Main components of the patches as colours, RGB uint8 (H, W, 3)."""
        return _enlarged(patch_pca(self.encoder, image))

    def _encoder(self, what: str) -> Encoder:
        if not isinstance(self.encoder, Encoder):
            raise OpenVisionError(f"{self.name} has no text tower, so it cannot {what}; give a model with both towers")
        return self.encoder


def _enlarged(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    times = max(1, _LARGE // max(pixels.shape[:2]))
    return pixels.repeat(times, 0).repeat(times, 1)


def load_demo(
    source: str, device: torch.device, offline: bool = False, preprocessing: Preprocessing = "crop"
) -> DemoCheckpoint:
    """Load any source of `openvision.load`: encoders, captioners and vision towers."""
    found = load_checkpoint(source, Request(offline=offline))
    if found.model is not None or found.unified is not None:
        encoder: VisionEncoder = Encoder.from_checkpoint(found, None, preprocessing)
    elif found.captioner is not None:
        encoder = Captioner.from_checkpoint(found, None, preprocessing)
    else:
        encoder = VisionEncoder.from_checkpoint(found, None, preprocessing)
    path = Path(source)
    name = path.parent.name if path.name == "model" and path.parent.name else path.name
    return DemoCheckpoint(name, encoder.to(device))


def distinct_names(checkpoints: list[DemoCheckpoint]) -> list[DemoCheckpoint]:
    """The same checkpoints; those that share a name get numbers."""
    named: list[DemoCheckpoint] = []
    for one in checkpoints:
        name, number = one.name, 2
        while name in {other.name for other in named}:
            name, number = f"{one.name} ({number})", number + 1
        named.append(DemoCheckpoint(name, one.encoder))
    return named
