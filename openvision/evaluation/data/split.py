"""."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from openvision.data.shards.dataset import Sample, ShardDataset
from openvision.errors import OpenVisionError
from openvision.images.decode import BadSampleError
from openvision.images.preprocess import prepare, to_batch
from openvision.text.captions import sentences


@dataclass(frozen=True)
class Split:
    """The pictures of a split, prepared as spec section 7 says, with their texts; row i is one sample."""

    images: Tensor
    """uint8 (n, 3, R, R): shorter side to R pixels, central crop."""
    keys: list[str]
    indices: list[int]
    """Number of the sample in its data set; bad samples leave gaps."""
    names: list[str]
    """Clean unique names (json field `name`); the alt-texts when no sample has one."""
    alts: list[str]
    captions: list[str]
    """The whole synthetic caption, one string; empty when there is none."""
    categories: list[str] | None
    """Json field `category`; None unless every sample has one."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Samples left out because the picture is bad, by reason."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def first_sentences(self) -> list[str] | None:
        """First sentence of every synthetic caption; None unless every sample has one."""
        if not all(self.captions):
            return None
        return [(sentences(caption) or [caption])[0] for caption in self.captions]


def read_split(dataset: ShardDataset, resolution: int) -> Split:
    """Decode every sample of `dataset`; bad pictures are counted and left out.

    Raises OpenVisionError when nothing is left or when only some samples have a name.
    """
    samples: list[Sample] = []
    indices: list[int] = []
    images: list[NDArray[np.uint8]] = []
    rejected: Counter[str] = Counter()
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
            images.append(prepare(sample.image, resolution))
            samples.append(sample)
            indices.append(index)
        except BadSampleError as bad:
            rejected[bad.reason] += 1
    if not samples:
        raise OpenVisionError(f"none of the {len(dataset)} pictures of the split can be decoded: {dict(rejected)}")
    alts = [_one(sample.alt) for sample in samples]
    return Split(
        images=to_batch(images),
        keys=[sample.key for sample in samples],
        indices=indices,
        names=_field(samples, "name") or alts,
        alts=alts,
        captions=[_joined(sample.synthetic) for sample in samples],
        categories=_field(samples, "category"),
        rejected=rejected,
    )


def _field(samples: Sequence[Sample], name: str) -> list[str] | None:
    """The json field of every sample, None when no sample has it."""
    values = [sample.meta.get(name) for sample in samples]
    if all(value is None for value in values):
        return None
    for sample, value in zip(samples, values, strict=True):
        if not isinstance(value, str) or not value.strip():
            raise OpenVisionError(f"sample {sample.key} has no {name!r} in its json while others have one; add it")
    return [str(value) for value in values]


def _one(text: str | Sequence[str] | None) -> str:
    return text if isinstance(text, str) else (text[0] if text else "")


def _joined(text: str | Sequence[str] | None) -> str:
    return text if isinstance(text, str) else " ".join(text or ())
