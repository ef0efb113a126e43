"""A batch as a training step takes it, and the arrays that loader workers send in its place."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Reject:
    """A sample that was skipped."""

    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Batch:
    """B samples as a training step takes them."""

    images: Tensor
    """uint8 (B, 3, H, W); with `shapes` (B, 3, P), the pixels of each image first in its row."""
    alt_ids: Tensor
    """int64 (B, context_length), the alt-text; (B, 0) without a text tower."""
    sentence_ids: Tensor
    """int64 (B, context_length), one sentence of the synthetic caption; (B, 0) without a text tower."""
    labels: Tensor
    """int64 (B, caption_length), the whole synthetic caption, shifted; (B, 0) without a decoder."""
    label_mask: Tensor
    """bool (B, caption_length), True where a label counts."""
    positions: Tensor
    """int64 (B,), positions in the global stream; they key all further randomness of a sample."""
    keys: list[str]
    rejects: tuple[Reject, ...]
    """Samples skipped while this batch was built."""
    texts_cut: int
    """Alt-texts and sentences truncated to the context length."""
    captions_missing: int
    """Samples without a synthetic caption, whose alt-text takes its place (spec section 4)."""
    remarks: tuple[tuple[str, str], ...] = ()
    """Reason and key of samples that are used although their texts are odd: `not_utf8`, `null_in_list`,
    `unknown_words` (no word of a text is in the vocabulary)."""
    shapes: Tensor | None = None
    """Height and width of each image, int64 (B, 2), on the CPU; None when all are alike."""
    text_lengths: Tensor | None = None
    """Ids of alt-text and sentence before their padding, int64 (B, 2), on the CPU, where texts are to be trimmed."""
    features: tuple[Tensor, ...] = ()
    """(B, ...) what is stored of the view of each sample (stored_features.py), in the order of the input's files."""

    @property
    def rejected(self) -> Counter[str]:
        """Skipped samples by reason."""
        return Counter(reject.reason for reject in self.rejects)


# Workers send batches as arrays, and Grain puts large ones into shared memory. Tensors would go as descriptors that die
# with the worker that made them, and a loader with batches in flight could not be closed.
ArrayBatch = tuple[dict[str, np.ndarray], list[str], tuple[Reject, ...], int, int, tuple[tuple[str, str], ...]]
_TENSORS = ("images", "alt_ids", "sentence_ids", "labels", "label_mask", "positions")
_OPTIONAL = ("shapes", "text_lengths")
_FEATURES = "features."


def to_arrays(batch: Batch) -> ArrayBatch:
    """A batch as a worker sends it."""
    names = (*_TENSORS, *(name for name in _OPTIONAL if getattr(batch, name) is not None))
    arrays: dict[str, np.ndarray] = {name: getattr(batch, name).numpy() for name in names}
    arrays |= {f"{_FEATURES}{number}": feature.numpy() for number, feature in enumerate(batch.features)}
    return arrays, batch.keys, batch.rejects, batch.texts_cut, batch.captions_missing, batch.remarks


def from_arrays(sent: ArrayBatch) -> Batch:
    """The batch that `to_arrays` has sent."""
    arrays, keys, rejects, texts_cut, captions_missing, remarks = sent
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    stored = [name for name in tensors if name.startswith(_FEATURES)]
    features = tuple(tensors.pop(name) for name in stored)
    return Batch(
        **tensors,
        keys=keys,
        rejects=rejects,
        texts_cut=texts_cut,
        captions_missing=captions_missing,
        remarks=remarks,
        features=features,
    )
