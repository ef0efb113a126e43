"""Batches of pictures and ids whose order is a pure function of (seed, position).

- Position p of a run is sample `stream[p]` (order.py), computed and not stored, so a run continues anywhere at once.
- Crops, colours and the choice of captions come from a generator keyed by (seed, p): the same whatever the number of
  threads, workers and processes, and however often the run was stopped.
- Process r of W takes rows r*B/W to (r+1)*B/W of every global batch of B: the global batches do not depend on W.
- Samples that cannot be used are replaced by the next one, counted by reason, listed, and end the run when they are
  many.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import grain
import numpy as np
import torch
from absl import flags
from torch import Tensor

from openvision.data.mixture import GLOBAL, Mixture, Ordering
from openvision.data.shards.dataset import Sample, ShardDataset
from openvision.errors import OpenVisionError
from openvision.files import append_text, read_json_lines
from openvision.images.augment import Augment, apply_jitter, draw_jitter, random_crop
from openvision.images.decode import BadSampleError, Pixels, SourceImage, open_image
from openvision.images.preprocess import to_batch
from openvision.text.captions import Captions, sample_captions
from openvision.text.tokenizer import Tokenizer

# A run that loses more than this share of its samples trains on something else than it was told to.
REJECT_BUDGET = 0.01
_BUDGET_COUNTS_FROM = 1000
_REPLACEMENTS = 100
_CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Reject:
    """A sample that was passed over."""

    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Batch:
    """B samples as a training step takes them."""

    images: Tensor
    """uint8 (B, 3, H, W)."""
    alt_ids: Tensor
    """int64 (B, context_length), the alt-text; no column without a context length (no text tower)."""
    sentence_ids: Tensor
    """int64 (B, context_length), one sentence of the synthetic caption; no column likewise."""
    labels: Tensor
    """int64 (B, caption_length), the whole synthetic caption, shifted; no column without a caption length."""
    label_mask: Tensor
    """bool (B, caption_length), True where a label counts."""
    positions: Tensor
    """int64 (B,), the samples' places in the global stream: what else is random about a sample is keyed by them."""
    keys: list[str]
    rejects: tuple[Reject, ...]
    """Samples passed over while this batch was made."""
    texts_cut: int
    """Alt-texts and sentences longer than the context, which lost their end."""
    captions_missing: int
    """Samples without a synthetic caption, for which their alt-text stands in (spec section 4)."""

    @property
    def rejected(self) -> Counter[str]:
        """Samples passed over, by reason."""
        return Counter(reject.reason for reject in self.rejects)


@dataclass(frozen=True)
class Reading:
    """How batches are read; none of it changes what is in them but the order."""

    ordering: Ordering = GLOBAL
    threads: int = 1
    """Threads that decode, in each worker."""
    workers: int = 0
    """Processes that decode; 0 decodes in this one."""
    rank: int = 0
    world_size: int = 1
    reject_budget: float = REJECT_BUDGET
    rejects_file: Path | None = None
    """Where rejected samples are listed, a JSON line each."""


class Loader:
    """Iterates batches without end, from sample position `start` of the global stream on."""

    def __init__(
        self,
        data: ShardDataset | Mixture,
        tokenizer: Tokenizer,
        *,
        resolution: int,
        batch_size: int,
        context_length: int | None,
        caption_length: int | None,
        augment: Augment,
        seed: int,
        start: int = 0,
        reading: Reading | None = None,
    ) -> None:
        """Open the stream of global batches of `batch_size`.

        An epoch ends where it ends, also inside a batch, and the next begins there; data smaller than a batch are
        repeated within it. Raises OpenVisionError when the processes do not divide the batch.
        """
        self.reading = reading or Reading()
        mixture = data if isinstance(data, Mixture) else Mixture([data])
        if batch_size % self.reading.world_size:
            raise OpenVisionError(
                f"a batch of {batch_size} cannot be divided among {self.reading.world_size} processes; "
                "choose a multiple of their number"
            )
        self.batch_size = batch_size
        self.start = start
        self.position = start
        self.rejected: Counter[str] = Counter()
        self.texts_cut = 0
        self.captions_missing = 0
        self._mixture = mixture
        self._listed = _listed(self.reading.rejects_file)
        self._share = batch_size // self.reading.world_size
        self._maker = _BatchMaker(
            mixture, tokenizer, resolution, context_length, caption_length, augment, seed, self.reading.ordering
        )
        self._iterator: Any = iter(self._batches())

    def _batches(self) -> Any:
        first = self.start + self.reading.rank * self._share
        # As many batches as 64-bit positions allow: the stream has no end, its state is one number.
        make = _MakeBatch(self._maker, first, self.batch_size, self._share, apart=self.reading.workers > 0)
        batches = grain.MapDataset.range(2**40).map(make)
        threads = self.reading.threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        stream = batches.to_iter_dataset(options)
        if self.reading.workers:
            # Grain asks absl for a flag of its own before it starts workers, and absl wants to have read sys.argv.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(self.reading.workers, per_worker_buffer_size=2))
        return stream

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        made: Batch | _Sent = next(self._iterator)
        batch = made if isinstance(made, Batch) else _received(made)
        self.position += self.batch_size
        self.rejected.update(batch.rejected)
        self.texts_cut += batch.texts_cut
        self.captions_missing += batch.captions_missing
        self._list(batch.rejects)
        self._check_budget()
        return batch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and workers."""
        self._iterator.close()

    def sample_at(self, position: int) -> tuple[int, int]:
        """Source and number of the sample at `position` of the stream."""
        return self._maker.stream[position]

    def _list(self, rejects: tuple[Reject, ...]) -> None:
        """Append to the rejects file what is not in it yet."""
        new = {reject.key: reject for reject in rejects if reject.key not in self._listed}
        if self.reading.rejects_file is None or not new:
            return
        self._listed |= new.keys()
        lines = [json.dumps(reject.__dict__, ensure_ascii=False) + "\n" for reject in new.values()]
        append_text(self.reading.rejects_file, "".join(lines))

    def _check_budget(self) -> None:
        bad = self.rejected.total()
        seen = (self.position - self.start) // self.reading.world_size + bad
        if seen >= _BUDGET_COUNTS_FROM and bad > self.reading.reject_budget * seen:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.rejected.items()))
            listed = f", listed in {self.reading.rejects_file}" if self.reading.rejects_file else ""
            raise OpenVisionError(
                f"{self._mixture.name}: {bad} of {seen} samples cannot be used ({reasons}{listed}), more than "
                f"{self.reading.reject_budget:.1%}; mend the shards"
            )


def _listed(path: Path | None) -> set[str]:
    """Keys that an earlier part of the run has listed."""
    return {line["key"] for line in read_json_lines(path)} if path is not None and path.exists() else set()


@dataclass(frozen=True)
class _MakeBatch:
    """Number of a batch -> this process's share of it."""

    maker: "_BatchMaker"
    first: int
    stride: int
    share: int
    apart: bool
    """Whether batches go to another process."""

    def __call__(self, number: int) -> "Batch | _Sent":
        begin = self.first + number * self.stride
        batch = self.maker(range(begin, begin + self.share))
        return _sent(batch) if self.apart else batch


# Between processes a batch goes as arrays: Grain puts large ones into shared memory. Tensors would go as descriptors,
# which die with the worker that made them, so that a loader with batches on their way could not be closed.
_Sent = tuple[np.ndarray, dict[str, Any]]


def _sent(batch: Batch) -> _Sent:
    rest = {name: _array(value) for name, value in batch.__dict__.items() if name != "images"}
    return batch.images.numpy(), rest


def _array(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def _received(sent: _Sent) -> Batch:
    images, rest = sent
    values: dict[str, Any] = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in rest.items()
    }
    return Batch(images=torch.from_numpy(images), **values)


class _BatchMaker:
    """Positions -> batch; can be sent to other processes."""

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        resolution: int,
        context_length: int | None,
        caption_length: int | None,
        augment: Augment,
        seed: int,
        ordering: Ordering,
    ) -> None:
        self.mixture = mixture
        self.tokenizer = tokenizer
        self.resolution = resolution
        self.context_length = context_length
        self.caption_length = caption_length
        self.augment = augment
        self.seed = seed
        self.stream = mixture.stream(seed, ordering)
        self._samples = [_Samples(source) for source in mixture.sources]

    def __call__(self, positions: range) -> Batch:
        rejects: list[Reject] = []
        images, jitters, captions, keys = [], [], [], []
        missing = 0
        for position in positions:
            # A counter-based generator: any position's numbers without drawing those before it.
            rng = np.random.Generator(np.random.Philox(key=[self.seed, position]))
            source, sample, image = self._usable(*self.stream[position], rng, rejects)
            images.append(image)
            jitters.append(draw_jitter(rng, self.augment))
            captions.append(sample_captions(sample.alt, sample.synthetic, rng))
            missing += not sample.synthetic
            keys.append(self.mixture.named(source, sample.key))
        pixels = apply_jitter(to_batch(images), jitters)
        batch = self._with_texts(pixels, captions, torch.arange(positions.start, positions.stop), keys)
        return replace(batch, rejects=tuple(rejects), captions_missing=missing)

    def _usable(
        self, source: int, index: int, rng: np.random.Generator, rejects: list[Reject]
    ) -> tuple[int, Sample, np.ndarray]:
        """Sample `index` of a source and its crop, or the first usable one after it."""
        length = len(self.mixture.sources[source])
        for offset in range(_REPLACEMENTS):
            number = (index + offset) % length
            try:
                sample, picture = self._samples[source][number]
                return source, sample, random_crop(picture, rng, self.resolution, self.augment)
            except BadSampleError as error:
                rejects.append(Reject(self.mixture.key(source, number), error.reason, str(error)))
        reasons = Counter(reject.reason for reject in rejects)
        told = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        raise OpenVisionError(f"{self.mixture.names[source]}: {_REPLACEMENTS} samples in a row cannot be used ({told})")

    def _with_texts(self, images: Tensor, captions: list[Captions], positions: Tensor, keys: list[str]) -> Batch:
        alt, alt_cut = self._encoded([caption.alt for caption in captions])
        sentence, cut = self._encoded([caption.sentence for caption in captions])
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
            positions=positions,
            keys=keys,
            rejects=(),
            texts_cut=alt_cut + cut,
            captions_missing=0,
        )

    def _encoded(self, texts: list[str]) -> tuple[np.ndarray, int]:
        """Ids for the text tower, and how many texts were cut; no column where there is no text tower."""
        if self.context_length is None:
            return np.zeros((len(texts), 0), np.int64), 0
        return self.tokenizer.encode_counting(texts, self.context_length)


class _Samples:
    """Samples with their pictures. What cannot be decoded in part is decoded once and kept while it fits.

    JPEGs are not kept: decoding the part that a crop needs is fast, and what is in memory must not decide at which
    scale a picture is decoded. For many threads; every process keeps its own.
    """

    def __init__(self, dataset: ShardDataset) -> None:
        self.dataset = dataset
        self._open()

    def _open(self) -> None:
        self.bytes_left = _CACHE_BYTES
        self.kept: dict[int, tuple[Sample, Pixels]] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.dataset = state["dataset"]
        self._open()

    def __getitem__(self, index: int) -> tuple[Sample, SourceImage]:
        """Raises BadSampleError for a sample that cannot be used."""
        found = self.kept.get(index)
        if found is not None:
            return found
        sample = self.dataset[index]
        texts = [sample.alt] if isinstance(sample.alt, str) else sample.alt
        if not any(text.strip() for text in texts):
            raise BadSampleError("empty_text", f"{sample.key} has no alt-text")
        picture = open_image(sample.image)
        if isinstance(picture, Pixels):
            self._keep(index, sample, picture)
        return sample, picture

    def _keep(self, index: int, sample: Sample, picture: Pixels) -> None:
        # Two threads may have decoded the same picture: it is kept and paid for once.
        with self._lock:
            if index not in self.kept and picture.array.nbytes <= self.bytes_left:
                self.bytes_left -= picture.array.nbytes
                self.kept[index] = (replace(sample, image=b""), picture)
