"""`Encoder`: images and texts to unit vectors of one space, zero-shot classification, image search.

import openvision
encoder = openvision.load("runs/quickstart/model")
encoder.classify("cat.png", ["a cat", "a dog"])
"""

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from openvision.encoding import PLAIN, class_embeddings, encode_texts
from openvision.errors import OpenVisionError
from openvision.images.preprocess import Preprocessing, Size
from openvision.inference.vision import ImageInput, UnreadableImageError, VisionEncoder, image_files
from openvision.models.openvision import OpenVision
from openvision.models.openvision3 import OpenVision3
from openvision.text.tokenizer import Tokenizer
from openvision.weights.folder import save_folder
from openvision.weights.load import Checkpoint, load_checkpoint


@dataclass(frozen=True)
class SearchResult:
    """Images nearest to a query, and the files that could not be searched."""

    hits: list[tuple[Path, float]]
    """Path and cosine, nearest first."""
    skipped: list[tuple[Path, str]]
    """Image files that could not be read, and why."""


class Encoder(VisionEncoder):
    """Images and texts to unit vectors of one space."""

    def __init__(
        self,
        model: OpenVision | OpenVision3,
        tokenizer: Tokenizer | None,
        resolution: Size | None = None,
        preprocessing: Preprocessing = "crop",
    ) -> None:
        """Use `model` at `resolution` pixels, by default its trained one; `tokenizer` None encodes images only."""
        super().__init__(model.vision, resolution, preprocessing)
        self.model = model.eval()
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: str | os.PathLike[str], resolution: Size | None = None) -> Self:
        """Load a model folder or any other source of `load_checkpoint`."""
        return cls.from_checkpoint(load_checkpoint(os.fspath(path)), resolution)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, resolution: Size | None = None, preprocessing: Preprocessing = "crop"
    ) -> Self:
        """Wrap a checkpoint; raises OpenVisionError when it has no text tower."""
        model = checkpoint.model or checkpoint.unified
        if model is None:
            captioner = ", or caption with openvision.load_captioner" if checkpoint.captioner is not None else ""
            raise OpenVisionError(
                f"{checkpoint.source} is a vision tower without a text tower; "
                f"load it with openvision.load_vision{captioner}, or give a model with both towers"
            )
        encoder = cls(model, checkpoint.tokenizer, resolution, preprocessing)
        encoder.source = checkpoint.source
        return encoder

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
        """Factor on cosines before the softmax: exp(logit_scale)."""
        return float(self.model.logit_scale.detach().exp())

    @property
    def bias(self) -> float | None:
        """Of a model trained with the sigmoid loss, by which sigmoid(scale * cosine + bias) is the probability that an
        image and a text belong together; None with the softmax."""
        bias = self.model.logit_bias
        return None if bias is None else float(bias.detach())

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """n texts -> unit vectors float32 (n, E)."""
        if isinstance(texts, str):
            raise OpenVisionError("encode_texts expects a list of texts, got a single one; put it into a list")
        if not texts:
            return torch.empty(0, self.model.config.embed_dim)
        return torch.from_numpy(encode_texts(self.model, self.tokenizer, texts, batch_size))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """n texts -> ids int64 (n, L) as `model` takes them, for a training loop of one's own."""
        if isinstance(texts, str):
            raise OpenVisionError("tokenize expects a list of texts, got a single one; put it into a list")
        return torch.from_numpy(self.tokenizer.encode(list(texts), self.model.config.text.context_length)).long()

    def similarity(self, images: Tensor | Iterable[ImageInput], texts: Tensor | Sequence[str]) -> Tensor:
        """Cosines of n images with m texts, float32 (n, m), from -1 to 1.

        Either may be vectors of `encode_images` or `encode_texts`, which are not encoded again.
        """
        rows = images if isinstance(images, Tensor) else self.encode_images(images)
        columns = texts if isinstance(texts, Tensor) else self.encode_texts(texts)
        return rows @ columns.T

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model with its tokenizer as a folder that `openvision.load` reads, e.g. after a fine-tuning.

        Weights are stored as float32. Raises OpenVisionError without a tokenizer, or when the folder has files.
        """
        path = Path(folder)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OpenVisionError(f"{path} exists and is not empty; choose another folder")
        save_folder(path, copy.deepcopy(self.model).float(), self.tokenizer, "", {"saved_from": self.source})

    def classify(
        self, image: ImageInput, labels: Sequence[str], templates: Sequence[str] = PLAIN
    ) -> list[tuple[str, float]]:
        """Labels with probabilities, most probable first; ties keep the order of the labels.

        Probabilities are the softmax of scaled cosines over the given labels and sum to 1: they say which label fits
        best, not whether any does.
        """
        names = distinct_labels(labels)
        classes = class_embeddings(lambda texts: self.encode_texts(texts).numpy(), names, templates)
        logits = self.scale * (classes.astype(np.float64) @ self.encode_images([image])[0].numpy().astype(np.float64))
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        return [(names[i], float(probabilities[i])) for i in np.argsort(-probabilities, kind="stable")]

    def search(self, folder: str | os.PathLike[str], query: str, top: int = 5) -> list[tuple[Path, float]]:
        """The `top` images below `folder` nearest to `query`, as path and cosine; unreadable files are skipped.

        Encodes the whole folder; `inference.vector_folder` keeps the vectors, `inference.index` searches in them.
        """
        return self.search_folder(Path(folder), query, top).hits

    def search_folder(
        self,
        folder: Path,
        query: str,
        top: int = 5,
        batch_size: int = 64,
        progress: Callable[[int, float], None] | None = None,
    ) -> SearchResult:
        """`search`, with the files that were skipped; `progress` receives the images done and their share, 0 to 1.

        Raises OpenVisionError for an empty query, `top` below 1, or a folder without a readable image.
        """
        if not query.strip():
            raise OpenVisionError('the query is empty; give a text, e.g. "a red car"')
        if top < 1:
            raise OpenVisionError(f"top must be at least 1, not {top}")
        text = self.encode_texts([query])[0]
        files = image_files(folder)
        paths: list[Path] = []
        found: list[Tensor] = []
        skipped: list[tuple[Path, str]] = []
        for start in range(0, len(files), batch_size):
            images: list[Tensor] = []
            for path in files[start : start + batch_size]:
                try:
                    images.append(self.preprocess(path))
                    paths.append(path)
                except UnreadableImageError as error:
                    skipped.append((path, str(error)))
            if images:
                found.append(self.encode_each(images, batch_size) @ text)
            if progress is not None:
                done = len(paths) + len(skipped)
                progress(done, done / len(files))
        if not paths:
            raise OpenVisionError(f"none of the {len(skipped)} images in {folder} can be read; first: {skipped[0][1]}")
        cosines = torch.cat(found).numpy()
        order = np.argsort(-cosines, kind="stable")[:top]
        return SearchResult([(paths[i], float(cosines[i])) for i in order], skipped)


def distinct_labels(labels: Sequence[str]) -> list[str]:
    """Labels stripped, without empty ones and duplicates; raises OpenVisionError when none is left."""
    if isinstance(labels, str):
        raise OpenVisionError(f"labels must be a list of texts, not the single text {labels!r}; split it first")
    distinct = list(dict.fromkeys(label.strip() for label in labels if label.strip()))
    if not distinct:
        raise OpenVisionError('there are no labels to choose from; give some, e.g. --labels "a cat,a dog,a car"')
    return distinct
