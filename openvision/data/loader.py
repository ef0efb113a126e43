"""Batches of pictures and ids whose order is a pure function of (seed, position).

- Position p of a run is sample `order(p)`: a new shuffle of all samples every epoch, computed and not stored, so a
  run continues anywhere at once.
- Crops, colours and the choice of captions come from a generator keyed by (seed, p): the same whatever the number of
  threads and however often the run was stopped.
- Samples that cannot be used are replaced by the next one, counted by reason, and end the run when they are many.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import grain
import numpy as np
import torch
from torch import Tensor

from openvision.data.augment import Augment, apply_jitter, draw_jitter, random_crop
from openvision.data.images import BadSampleError, decode_image, to_batch
from openvision.data.shards import Sample, ShardDataset
from openvision.errors import OpenVisionError
from openvision.text.captions import Captions, sample_captions
from openvision.text.tokenizer import Tokenizer

# A run that loses more than this share of its samples trains on something else than it was told to.
REJECTED_BUDGET = 0.01
_BUDGET_COUNTS_FROM = 1000
_REPLACEMENTS = 100
_CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Batch:
    """B samples as a training step takes them."""

    images: Tensor
    """uint8 (B, 3, H, W)."""
    alt_ids: Tensor
    """int64 (B, context_length), the alt-text."""
    sentence_ids: Tensor
    """int64 (B, context_length), one sentence of the synthetic caption."""
    labels: Tensor
    """int64 (B, caption_length), the whole synthetic caption, shifted; no column without a caption length."""
    label_mask: Tensor
    """bool (B, caption_length), True where a label counts."""
    keys: list[str]
    rejected: Counter[str]
    """Samples passed over while this batch was made, by reason."""
    texts_cut: int
    """Alt-texts and sentences longer than the context, which lost their end."""


class Loader:
    """Iterates batches without end, from sample position `start` on."""

    def __init__(
        self,
        dataset: ShardDataset,
        tokenizer: Tokenizer,
        *,
        resolution: int,
        batch_size: int,
        context_length: int,
        caption_length: int | None,
        augment: Augment,
        seed: int,
        start: int = 0,
        threads: int = 1,
    ) -> None:
        """Open the stream. Data sets smaller than a batch are repeated within it, epoch after epoch."""
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.resolution = resolution
        self.batch_size = batch_size
        self.context_length = context_length
        self.caption_length = caption_length
        self.augment = augment
        self.seed = seed
        self.start = start
        self.position = start
        self.rejected: Counter[str] = Counter()
        self.texts_cut = 0
        self._decoded = _DecodedSamples(dataset)
        self._order: Any = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat()
        # As many batches as 64-bit positions allow: the stream has no end, its state is one number.
        batches = grain.MapDataset.range(2**40).map(self._batch)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        self._iterator: Any = iter(batches.to_iter_dataset(options))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch: Batch = next(self._iterator)
        self.position += self.batch_size
        self.rejected.update(batch.rejected)
        self.texts_cut += batch.texts_cut
        self._check_budget()
        return batch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads."""
        self._iterator.close()

    def sample_at(self, position: int) -> int:
        """Index of the sample at `position` of the stream."""
        return int(self._order[position])

    def _batch(self, number: int) -> Batch:
        first = self.start + number * self.batch_size
        rejected: Counter[str] = Counter()
        images, jitters, captions, keys = [], [], [], []
        for position in range(first, first + self.batch_size):
            sample, pixels = self._usable(self.sample_at(position), rejected)
            # A counter-based generator: any position's numbers without drawing those before it.
            rng = np.random.Generator(np.random.Philox(key=[self.seed, position]))
            images.append(random_crop(pixels, rng, self.resolution, self.augment))
            jitters.append(draw_jitter(rng, self.augment))
            captions.append(sample_captions(sample.alt, sample.synthetic, rng))
            keys.append(sample.key)
        pixels = apply_jitter(to_batch(images), jitters)
        return self._with_texts(pixels, captions, keys, rejected)

    def _with_texts(self, images: Tensor, captions: list[Captions], keys: list[str], rejected: Counter[str]) -> Batch:
        alt, alt_cut = self.tokenizer.encode_counting([caption.alt for caption in captions], self.context_length)
        sentence, cut = self.tokenizer.encode_counting([caption.sentence for caption in captions], self.context_length)
        if self.caption_length is None:
            labels, mask = np.zeros((len(captions), 0), np.int64), np.zeros((len(captions), 0), bool)
        else:
            labels, mask = self.tokenizer.encode_target([caption.full for caption in captions], self.caption_length)
        return Batch(
            images=images,
            alt_ids=torch.from_numpy(alt),
            sentence_ids=torch.from_numpy(sentence),
            labels=torch.from_numpy(labels),
            label_mask=torch.from_numpy(mask),
            keys=keys,
            rejected=rejected,
            texts_cut=alt_cut + cut,
        )

    def _usable(self, index: int, rejected: Counter[str]) -> tuple[Sample, np.ndarray]:
        """Sample `index`, or the first usable one after it."""
        for offset in range(_REPLACEMENTS):
            try:
                return self._decoded[(index + offset) % len(self.dataset)]
            except BadSampleError as error:
                rejected[error.reason] += 1
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(rejected.items()))
        raise OpenVisionError(f"{self.dataset.folder}: {_REPLACEMENTS} samples in a row cannot be used ({reasons})")

    def _check_budget(self) -> None:
        bad = self.rejected.total()
        seen = self.position - self.start + bad
        if seen >= _BUDGET_COUNTS_FROM and bad > REJECTED_BUDGET * seen:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.rejected.items()))
            raise OpenVisionError(
                f"{self.dataset.folder}: {bad} of {seen} samples cannot be used ({reasons}), more than "
                f"{REJECTED_BUDGET:.0%}; mend the shards"
            )


class _DecodedSamples:
    """Samples with their pixels, kept in memory while they fit: a small data set is decoded once. For many threads."""

    def __init__(self, dataset: ShardDataset) -> None:
        self.dataset = dataset
        self.bytes_left = _CACHE_BYTES
        self.kept: dict[int, tuple[Sample, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> tuple[Sample, np.ndarray]:
        """Raises BadSampleError for a sample that cannot be used."""
        found = self.kept.get(index)
        if found is not None:
            return found
        sample = self.dataset[index]
        texts = [sample.alt] if isinstance(sample.alt, str) else sample.alt
        if not any(text.strip() for text in texts):
            raise BadSampleError("empty_text", f"{sample.key} has no alt-text")
        pixels = decode_image(sample.image)
        self._keep(index, sample, pixels)
        return sample, pixels

    def _keep(self, index: int, sample: Sample, pixels: np.ndarray) -> None:
        # Two threads may have decoded the same picture: it is kept and paid for once.
        with self._lock:
            if index not in self.kept and pixels.nbytes <= self.bytes_left:
                self.bytes_left -= pixels.nbytes
                self.kept[index] = (replace(sample, image=b""), pixels)
