"""Batches of images and token ids whose order is a pure function of (seed, position).

- Position p of a run is sample `stream[p]` (mixture.py, order.py): computed, not stored, so a run resumes anywhere at
  once.
- Crop, colour jitter and choice of captions come from a generator keyed by (seed, p): identical for any number of
  threads, workers and processes, and however often the run was resumed. With fixed views it draws one of them.
- Process r of W takes rows r*B/W to (r+1)*B/W of every global batch of B: the global batches do not depend on W.
- No image is in a global batch twice (distinct.py), unless the options allow it.
- A sample that cannot be used is replaced by another one, counted by reason and listed; too many of them stop the run.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import TracebackType

import grain
import numpy as np
import torch
from absl import flags
from torch import Tensor

from openvision.data.batch import ArrayBatch, Batch, Reject, from_arrays, to_arrays
from openvision.data.distinct import DistinctOrder, Grid
from openvision.data.mixture import Mixture, Ordering, Stream
from openvision.data.order import Interleaved
from openvision.data.shards.dataset import Sample, ShardDataset
from openvision.data.stored_features import StoredFeatures
from openvision.data.workers import end_with_parent
from openvision.errors import OpenVisionError
from openvision.files import PatientLines, read_json_lines
from openvision.images.augment import Augment, Draws, Jitter, apply_jitter, draw_jitter, draws_at, random_crop
from openvision.images.decode import BadSampleError, Pixels, SourceImage, open_image
from openvision.images.native import NativeShapes, pack, rows_by_shape
from openvision.images.preprocess import to_batch
from openvision.text.captions import Captions, sample_captions
from openvision.text.tokenizer import Tokenizer
from openvision.untrusted import json_text

# A run that loses more than this share of its samples trains on other data than its recipe names.
REJECT_BUDGET = 0.01
# The share is looked at once a process has read so many samples: an early bad one does not end a run.
_BUDGET_COUNTS_FROM = 1000
_MAX_REPLACEMENTS = 100
_CACHE_BYTES = 512 * 2**20
# Samples that the log names of each remark.
_NAMED = 3
# As many batches as 64-bit positions allow: the stream has no end, its state is one number.
_ENDLESS = 2**40


@dataclass(frozen=True)
class InputSpec:
    """Shapes and augmentation of what a model reads of a sample."""

    resolution: int = 224
    """Side of the square image, pixels."""
    context_length: int | None = 80
    """Ids of a text for the text tower; None without a text tower."""
    caption_length: int | None = 128
    """Positions of the caption decoder's target; None without a decoder."""
    augment: Augment = field(default_factory=Augment)
    native: NativeShapes | None = None
    """Shapes that images keep their aspect in; None resizes to squares of `resolution`."""
    text_lengths: bool = False
    """Whether batches say how long each text is before its padding."""
    features: tuple[StoredFeatures, ...] = ()
    """What is read of the fixed views (`augment.views`) beside the images."""


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are read. Apart from `ordering`, `distinct` and `grid`, nothing here changes what is in them."""

    ordering: Ordering = field(default_factory=Ordering)
    distinct: bool = True
    """No image is in a global batch twice, as a contrastive loss needs it; otherwise one may where an epoch ends."""
    grid: Grid | None = None
    """The batches in which no image is twice; by default those that are read."""
    threads: int = 1
    """Decoding threads in each worker."""
    workers: int = 0
    """Decoding processes; 0 decodes in this process."""
    rank: int = 0
    world_size: int = 1
    reject_budget: float = REJECT_BUDGET
    """Largest share of rejected samples, 0 to 1."""
    rejects_file: Path | None = None
    """File that lists rejected samples, one JSON object a line."""


class Loader:
    """Endless iterator over batches, starting at position `start` of the global stream."""

    def __init__(
        self,
        data: ShardDataset | Mixture,
        tokenizer: Tokenizer,
        inputs: InputSpec,
        *,
        batch_size: int,
        seed: int,
        start: int = 0,
        options: LoaderOptions | None = None,
    ) -> None:
        """Open the stream of global batches of `batch_size`.

        An epoch may end inside a batch, where the next one begins. Raises OpenVisionError when the batch size is no
        multiple of the number of processes, or when the data have too few images for a batch of distinct ones.
        """
        self.options = options or LoaderOptions()
        if batch_size % self.options.world_size:
            raise OpenVisionError(
                f"a batch of {batch_size} cannot be divided among {self.options.world_size} processes; "
                "choose a multiple of their number"
            )
        self.batch_size = batch_size
        self.start = start
        self.position = start
        self.rejected: Counter[str] = Counter()
        """Samples that could not be used, by reason; one that is met again in a later epoch counts once."""
        self.texts_cut = 0
        self.captions_missing = 0
        self.remarks: Counter[str] = Counter()
        self.remarked: dict[str, list[str]] = {}
        """The first keys of each remark."""
        self._mixture = data if isinstance(data, Mixture) else Mixture([data])
        rejects_file = self.options.rejects_file
        self._listed = _listed_keys(rejects_file)
        self._bad: set[tuple[str, str]] = set()
        self._skipped = 0
        self._interleaved = Interleaved(self._mixture.weights)
        self._rejects_file = PatientLines(rejects_file) if rejects_file is not None else None
        self._builder = _BatchBuilder(self._mixture, tokenizer, inputs, batch_size, seed, start, self.options)
        self._iterator = iter(self._batches())

    def _batches(self) -> "grain.IterDataset[Batch | ArrayBatch]":
        threads, workers = self.options.threads, self.options.workers
        read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        batches = grain.MapDataset.range(_ENDLESS).map(self._builder).to_iter_dataset(read)
        if not workers:
            return batches
        # Grain reads an absl flag of its own before it starts workers, and absl wants sys.argv parsed first.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        return batches.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=2), _begin_worker)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            item = next(self._iterator)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            raise OpenVisionError(
                "a loader worker was lost, usually because memory ran out; set run.loader_workers lower, then run the "
                f"same command ({error})"
            ) from error
        batch = item if isinstance(item, Batch) else from_arrays(item)
        self.position += self.batch_size
        self._count_rejects(batch.rejects)
        self.texts_cut += batch.texts_cut
        self.captions_missing += batch.captions_missing
        self._note(batch.remarks)
        self._list_rejects(batch.rejects)
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

    @property
    def unlisted(self) -> str | None:
        """Why rejected samples are missing in the rejects file; None when all are listed."""
        return self._rejects_file.problem if self._rejects_file is not None else None

    def sample_at(self, position: int) -> tuple[int, int]:
        """Source and sample index at `position` of the stream."""
        return self._builder.stream[position]

    def _list_rejects(self, rejects: tuple[Reject, ...]) -> None:
        """Append to the rejects file what it does not list yet."""
        new = {reject.key: reject for reject in rejects if reject.key not in self._listed}
        if self._rejects_file is None or not new:
            return
        self._listed |= new.keys()
        self._rejects_file.write(json_text(reject.__dict__) + "\n" for reject in new.values())

    def _count_rejects(self, rejects: tuple[Reject, ...]) -> None:
        self._skipped += len(rejects)
        new = {(reject.key, reject.reason) for reject in rejects} - self._bad
        self._bad |= new
        self.rejected.update(reason for _, reason in new)

    def _note(self, remarks: tuple[tuple[str, str], ...]) -> None:
        for reason, key in remarks:
            self.remarks[reason] += 1
            first = self.remarked.setdefault(reason, [])
            if len(first) < _NAMED and key not in first:
                first.append(key)

    def _check_budget(self) -> None:
        read = (self.position - self.start) // self.options.world_size + self._skipped
        bad, seen = len(self._bad), self._seen()
        if read >= _BUDGET_COUNTS_FROM and bad > self.options.reject_budget * seen:
            listed = f", listed in {self.options.rejects_file}" if self.options.rejects_file else ""
            raise OpenVisionError(
                f"{self._mixture.name}: {bad} of {seen} samples cannot be used ({_counts(self.rejected)}{listed}), "
                f"more than {self.options.reject_budget:.1%}; fix or regenerate the shards, or raise data.reject_budget"
            )

    def _seen(self) -> int:
        """Different samples that this process has read; later epochs bring no new ones."""
        begin, end = (self._interleaved.counts(position) for position in (self.start, self.position))
        read = [-(-(last - first) // self.options.world_size) for first, last in zip(begin, end, strict=True)]
        lengths = [len(source) for source in self._mixture.sources]
        return min(sum(map(min, read, lengths)) + len(self._bad), sum(lengths))


def _begin_worker(worker: int, workers: int) -> None:
    end_with_parent()


def _listed_keys(path: Path | None) -> set[str]:
    """Keys that the run listed before it was resumed."""
    return {line["key"] for line in read_json_lines(path)} if path is not None and path.exists() else set()


def _counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))


def _reasons(rejects: Iterable[Reject]) -> str:
    return _counts(Counter(reject.reason for reject in rejects))


@dataclass(frozen=True)
class _Usable:
    """A sample with its crop."""

    index: int
    sample: Sample
    image: np.ndarray
    drawn: np.random.Generator
    """What has drawn the crop, and draws the colours next."""


@dataclass(frozen=True)
class _Replacement:
    """A sample for a row whose candidates are all bad, and what was rejected on the way to it."""

    index: int
    rejects: list[Reject]


class _BatchBuilder:
    """Number of a batch -> this process's rows of it; picklable, for workers."""

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        inputs: InputSpec,
        batch_size: int,
        seed: int,
        start: int,
        options: LoaderOptions,
    ) -> None:
        self.mixture = mixture
        self.tokenizer = tokenizer
        self.inputs = inputs
        self.batch_size = batch_size
        self.seed = seed
        self.local_batch_size = batch_size // options.world_size
        self.first = start + options.rank * self.local_batch_size
        self.as_arrays = options.workers > 0
        self.stream: Stream | DistinctOrder = mixture.stream(seed, options.ordering)
        if options.distinct:
            grid = options.grid or Grid(batch_size, start)
            self.stream = mixture.distinct_stream(seed, options.ordering, grid)
        self._last_resort: tuple[tuple[int, int], dict[int, _Replacement]] | None = None
        self._caches = [_ImageCache(source) for source in mixture.sources]

    def __call__(self, number: int) -> Batch | ArrayBatch:
        begin = self.first + number * self.batch_size
        batch = self._build(range(begin, begin + self.local_batch_size))
        return to_arrays(batch) if self.as_arrays else batch

    def _build(self, positions: range) -> Batch:
        rejects: list[Reject] = []
        images: list[np.ndarray] = []
        jitters: list[Jitter] = []
        captions: list[Captions] = []
        keys: list[str] = []
        missing = 0
        remarks: list[tuple[str, str]] = []
        features: list[list[np.ndarray]] = []
        for position in positions:
            draws = draws_at(self.seed, position, self.inputs.augment)
            source, found = self._usable(position, draws, rejects)
            sample = found.sample
            images.append(found.image)
            jitters.append(draw_jitter(found.drawn, self.inputs.augment))
            captions.append(sample_captions(sample.alt, sample.synthetic, draws.own))
            if draws.view is not None:
                place = self.mixture.sources[source].place(found.index)
                features.append([stored.read(*place, draws.view) for stored in self.inputs.features])
            missing += not sample.synthetic
            keys.append(self.mixture.qualified_key(source, sample.key))
            remarks += [(remark, keys[-1]) for remark in sample.remarks]
        alt_ids, alts_cut = self._encode([caption.alt for caption in captions])
        sentence_ids, sentences_cut = self._encode([caption.sentence for caption in captions])
        labels, mask = self._encode_targets([caption.full for caption in captions])
        odd = self.tokenizer.only_unknown(alt_ids.numpy()) | self.tokenizer.only_unknown(sentence_ids.numpy())
        remarks += [("unknown_words", keys[row]) for row in np.flatnonzero(odd)]
        pixels, shapes = self._pixels(images, jitters)
        return Batch(
            images=pixels,
            alt_ids=alt_ids,
            sentence_ids=sentence_ids,
            labels=labels,
            label_mask=mask,
            positions=torch.arange(positions.start, positions.stop),
            keys=keys,
            rejects=tuple(rejects),
            texts_cut=alts_cut + sentences_cut,
            captions_missing=missing,
            remarks=tuple(remarks),
            shapes=shapes,
            text_lengths=self._lengths(alt_ids, sentence_ids) if self.inputs.text_lengths else None,
            features=tuple(torch.from_numpy(np.stack(rows)) for rows in zip(*features, strict=True)),
        )

    def _lengths(self, *texts: Tensor) -> Tensor:
        """Ids of each text before padding and class token, int64 (n, K)."""
        return torch.stack([(ids[:, :-1] != self.tokenizer.pad_id).sum(dim=1) for ids in texts], dim=1)

    def _pixels(self, images: list[np.ndarray], jitters: list[Jitter]) -> tuple[Tensor, Tensor | None]:
        """Images with their colours changed, and their shapes where these may differ."""
        if self.inputs.native is None:
            return apply_jitter(to_batch(images), jitters), None
        changed: dict[int, Tensor] = {}
        for rows in rows_by_shape([image.shape[:2] for image in images]).values():
            alike = apply_jitter(to_batch([images[row] for row in rows]), [jitters[row] for row in rows])
            changed |= dict(zip(rows, alike, strict=True))
        return pack([changed[row] for row in range(len(images))], self.inputs.native.pixels)

    def _crop(self, image: SourceImage, rng: np.random.Generator) -> np.ndarray:
        if self.inputs.native is not None:
            return self.inputs.native.random_crop(image, rng, self.inputs.augment)
        return random_crop(image, rng, self.inputs.resolution, self.inputs.augment)

    def _usable(self, position: int, draws: Draws, rejects: list[Reject]) -> tuple[int, _Usable]:
        """Source and sample at `position`, or the sample that replaces one that cannot be used."""
        source, index = self.stream[position]
        before = len(rejects)
        found = self._first_usable(source, self._candidates(position, source, index), draws, rejects)
        tried = len(rejects) - before
        if found is None and isinstance(self.stream, DistinctOrder) and tried < _MAX_REPLACEMENTS:
            replacement = self._replacements(self.stream, position)[position]
            rejects += replacement.rejects
            found = self._first_usable(source, (replacement.index,), draws, [])
        if found is None:
            raise OpenVisionError(
                f"{self.mixture.names[source]}: {tried} samples in a row cannot be used "
                f"({_reasons(rejects)}); fix or regenerate the shards"
            )
        return source, found

    def _first_usable(
        self, source: int, candidates: Iterable[int], draws: Draws, rejects: list[Reject]
    ) -> _Usable | None:
        """The first of the candidates that can be used."""
        for index in candidates:
            try:
                sample, image = self._caches[source][index]
                drawn = draws.of(sample.key)
                return _Usable(index, sample, self._crop(image, drawn), drawn)
            except BadSampleError as error:
                rejects.append(Reject(self.mixture.key(source, index), error.reason, str(error)))
        return None

    def _candidates(self, position: int, source: int, index: int) -> Iterator[int]:
        """The sample at `position`, and those that may replace it whatever the rest of the batch is like."""
        yield index
        if isinstance(self.stream, DistinctOrder):
            others = self.stream.rows(position).replacements(position)
        else:
            length = len(self.mixture.sources[source])
            others = ((index + offset) % length for offset in range(1, length))
        yield from islice(others, _MAX_REPLACEMENTS - 1)

    def _replacements(self, stream: DistinctOrder, position: int) -> dict[int, "_Replacement"]:
        """Position -> what is left for it, for the rows of the batch that have none but bad candidates.

        Every process that needs it decodes the whole batch and comes to the same result. Raises OpenVisionError when
        too few samples are usable.
        """
        source, _ = stream[position]
        batch = (stream.grid.number(position), source)
        if self._last_resort is not None and self._last_resort[0] == batch:
            return self._last_resort[1]
        rows, taken, needy, bad = stream.rows(position), set[int](), list[int](), list[Reject]()
        for place, index in rows.samples.items():
            candidates = self._candidates(place, source, index)
            found = self._first_usable(source, candidates, draws_at(self.seed, place, self.inputs.augment), bad)
            taken.add(found.index) if found is not None else needy.append(place)
        free = (index for index in rows.unused() if index not in taken)
        replacements: dict[int, _Replacement] = {}
        for place in needy:
            rejects: list[Reject] = []
            found = self._first_usable(source, free, draws_at(self.seed, place, self.inputs.augment), rejects)
            if found is None:
                usable, needed = len(taken) + len(replacements), len(rows.positions)
                raise OpenVisionError(
                    f"{self.mixture.names[source]}: only {usable} of {rows.length} samples can be used, fewer than the "
                    f"{needed} different ones of a batch ({_reasons(bad + rejects)}); set batch_size to at most "
                    f"{usable}, or fix or regenerate the shards"
                )
            replacements[place] = _Replacement(found.index, rejects)
        self._last_resort = (batch, replacements)
        return replacements

    def _encode(self, texts: list[str]) -> tuple[Tensor, int]:
        """Ids for the text tower, int64 (n, context_length), and the number of truncated texts."""
        if self.inputs.context_length is None:
            return torch.zeros(len(texts), 0, dtype=torch.int64), 0
        ids, cut = self.tokenizer.encode_counting(texts, self.inputs.context_length)
        return torch.from_numpy(ids), cut

    def _encode_targets(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Labels int64 and mask bool for the caption decoder, both (n, caption_length)."""
        if self.inputs.caption_length is None:
            return torch.zeros(len(texts), 0, dtype=torch.int64), torch.zeros(len(texts), 0, dtype=torch.bool)
        labels, mask = self.tokenizer.encode_target(texts, self.inputs.caption_length)
        return torch.from_numpy(labels), torch.from_numpy(mask)


class _ImageCache:
    """Samples of a dataset with their images; decoded images are kept while they fit into `_CACHE_BYTES`.

    JPEGs are not kept: decoding the part that a crop needs is fast, and the state of a cache must not decide at which
    scale an image is decoded. Thread-safe; every process keeps its own.
    """

    def __init__(self, dataset: ShardDataset) -> None:
        self.dataset = dataset
        self._bytes_left = _CACHE_BYTES
        self._kept: dict[int, tuple[Sample, Pixels]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["_ImageCache"], tuple[ShardDataset]]:
        return _ImageCache, (self.dataset,)

    def __getitem__(self, index: int) -> tuple[Sample, SourceImage]:
        """Raises BadSampleError for a sample that cannot be used."""
        found = self._kept.get(index)
        if found is not None:
            return found
        sample = self.dataset[index]
        texts = [sample.alt] if isinstance(sample.alt, str) else sample.alt
        if not any(text.strip() for text in texts):
            raise BadSampleError("empty_text", f"{sample.key} has no alt-text")
        image = open_image(sample.image)
        if isinstance(image, Pixels):
            self._keep(index, sample, image)
        return sample, image

    def _keep(self, index: int, sample: Sample, image: Pixels) -> None:
        # Two threads may have decoded the same image: it is kept and counted once.
        with self._lock:
            if index not in self._kept and image.array.nbytes <= self._bytes_left:
                self._bytes_left -= image.array.nbytes
                self._kept[index] = (replace(sample, image=b""), image)
