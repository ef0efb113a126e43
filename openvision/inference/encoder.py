"""A trained or released encoder in three lines:

import openvision
encoder = openvision.load("runs/quickstart/model")
encoder.classify("cat.png", ["a cat", "a dog"])
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from openvision.encoding import PLAIN, class_embeddings, encode_texts
from openvision.errors import OpenVisionError
from openvision.images.preprocess import Preprocessing, Size
from openvision.inference.vision import ImageInput, UnreadableImageError, VisionEncoder
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
        from openvision.inference.encoder import classify

        return classify(self, image, labels)

    def search(self, folder: str | os.PathLike[str], query: str, top: int = 5) -> list[tuple[Path, float]]:
        """The `top` pictures below `folder` nearest to `query`: path and cosine; unreadable files are skipped."""
        from openvision.inference.encoder import search

        return search(self, Path(folder), query, top).hits


def classify(
    encoder: Encoder, image: ImageInput, labels: Sequence[str], templates: Sequence[str] = PLAIN
) -> list[tuple[str, float]]:
    """Labels with their probabilities, most probable first; of equal ones the earlier label first.

    The probabilities sum to 1 over the given labels: they say which label fits best, not whether any does.
    """
    distinct = clean_labels(labels)
    classes = class_embeddings(lambda texts: encoder.encode_texts(texts).numpy(), distinct, templates)
    cosines = classes.astype(np.float64) @ encoder.encode_images([image])[0].numpy().astype(np.float64)
    logits = encoder.scale * cosines
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    return [(distinct[i], float(shares[i])) for i in order]


def clean_labels(labels: Sequence[str]) -> list[str]:
    """Labels stripped, without empty ones and repetitions; raises OpenVisionError when none is left."""
    if isinstance(labels, str):
        raise OpenVisionError(f"labels must be a list of texts, not the one text {labels!r}; split it first")
    distinct = list(dict.fromkeys(label.strip() for label in labels if label.strip()))
    if not distinct:
        raise OpenVisionError('there are no labels to choose from; give some, e.g. --labels "a cat,a dog,a car"')
    return distinct


SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class SearchResult:
    """Pictures that fit best, and what could not be searched."""

    hits: list[tuple[Path, float]]
    """Path and cosine, best first."""
    skipped: list[tuple[Path, str]]
    """Files with a picture's suffix that could not be read, and why."""


def pictures_in(folder: Path) -> list[Path]:
    """Pictures below `folder` by suffix, sorted; raises OpenVisionError when the folder or pictures are missing."""
    if not folder.is_dir():
        raise OpenVisionError(f"{folder} is not a folder; give a folder of pictures")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise OpenVisionError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}); give another folder")
    return found


def search(encoder: Encoder, folder: Path, query: str, top: int = 5, batch_size: int = 64) -> SearchResult:
    """The `top` pictures below `folder` nearest to the text `query`.

    Unreadable pictures are skipped and listed; OpenVisionError when none can be read or the query is empty.
    """
    if not query.strip():
        raise OpenVisionError('the query is empty; say what to look for, e.g. "a red car"')
    if top < 1:
        raise OpenVisionError(f"top must be at least 1, not {top}")
    paths, images, skipped = _read(encoder, pictures_in(folder))
    if not paths:
        raise OpenVisionError(f"none of the {len(skipped)} pictures in {folder} can be read; first: {skipped[0][1]}")
    text = encoder.encode_texts([query])[0]
    vectors = encoder.encode_prepared(torch.stack(images), batch_size)
    scores = (vectors @ text).numpy()
    order = np.argsort(-scores, kind="stable")[:top]
    return SearchResult([(paths[i], float(scores[i])) for i in order], skipped)


def _read(
    encoder: Encoder, candidates: Sequence[Path]
) -> tuple[list[Path], list[torch.Tensor], list[tuple[Path, str]]]:
    """Paths and prepared pictures that could be read, and the rest with reasons."""
    paths: list[Path] = []
    images: list[torch.Tensor] = []
    skipped: list[tuple[Path, str]] = []
    for path in candidates:
        try:
            images.append(encoder.prepare(path))
            paths.append(path)
        except UnreadableImageError as error:
            skipped.append((path, str(error)))
    return paths, images, skipped
