"""A trained or released encoder in three lines:

import openvision
encoder = openvision.load("runs/quickstart/model")
encoder.classify("cat.png", ["a cat", "a dog"])
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from openvision.data.images import Preprocessing, Size
from openvision.errors import OpenVisionError
from openvision.evaluation.features import encode_texts
from openvision.inference.vision import ImageInput, VisionEncoder
from openvision.models.openvision import OpenVision
from openvision.text.tokenizer import Tokenizer
from openvision.weights.load import Checkpoint, load_checkpoint


class Encoder(VisionEncoder):
    """Pictures and texts to unit vectors of one space."""

    def __init__(
        self,
        model: OpenVision,
        tokenizer: Tokenizer | None,
        resolution: Size | None = None,
        preprocessing: Preprocessing = "crop",
    ) -> None:
        """Use `model` at `resolution` pixels (its own by default); without a tokenizer texts cannot be encoded."""
        super().__init__(model.vision, resolution, preprocessing)
        self.model = model.eval()
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: str | os.PathLike[str], resolution: Size | None = None) -> Self:
        """Read a model folder or whatever else `load_checkpoint` knows."""
        return cls.from_checkpoint(load_checkpoint(os.fspath(path)), resolution)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, resolution: Size | None = None, preprocessing: Preprocessing = "crop"
    ) -> Self:
        """Wrap a checkpoint; raises OpenVisionError when it has no text tower."""
        if checkpoint.model is None:
            captioner = ", or caption with openvision.load_captioner" if checkpoint.captioner is not None else ""
            raise OpenVisionError(
                f"{checkpoint.source} is a vision tower without a text tower; "
                f"load it with openvision.load_vision{captioner}, or give a model with both"
            )
        return cls(checkpoint.model, checkpoint.tokenizer, resolution, preprocessing)

    def _module(self) -> torch.nn.Module:
        return self.model

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises OpenVisionError when the checkpoint came without a vocabulary."""
        if self._tokenizer is None:
            raise OpenVisionError(
                "this checkpoint came without its vocabulary; give bert-base-uncased's vocab.txt: "
                'openvision.load(..., vocabulary="vocab.txt"), or --vocabulary on the command line'
            )
        return self._tokenizer

    @property
    def scale(self) -> float:
        """What cosines are multiplied by before the softmax: exp(logit_scale)."""
        return float(self.model.logit_scale.detach().exp())

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
