"""Statistics of shards: sizes, formats and bytes of the images, lengths and variety of alt-texts and captions.

Image sizes come from the headers; nothing is decoded, so an image may still be broken (verify.py). With a limit,
samples are spread evenly over all shards, the same ones every time.
"""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from openvision.data.shards.dataset import Sample, ShardDataset
from openvision.files import JsonObject
from openvision.images.decode import BadSampleError, read_header
from openvision.text.captions import non_blank, sentences
from openvision.text.tokenizer import Tokenizer

# Positions of the released text tower and caption decoder.
TOWER_LENGTH, DECODER_LENGTH = 80, 128
# Positions left for tokens: the tower also holds [bos], [eos] and the class token, the decoder the first two.
TOWER_TOKENS, DECODER_TOKENS = TOWER_LENGTH - 3, DECODER_LENGTH - 2

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_SAMPLES_AT_ONCE = 256


@dataclass
class ImageCounts:
    """Sizes, one entry an image, and formats."""

    widths: array = field(default_factory=lambda: array("q"))
    heights: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("q"))
    """Bytes of the encoded file."""
    formats: Counter[str] = field(default_factory=Counter)
    distinct: set[bytes] = field(default_factory=set)

    def add(self, data: bytes) -> None:
        """Count one encoded image; raises BadSampleError when its header cannot be read."""
        width, height, kind = read_header(data)
        self.widths.append(width)
        self.heights.append(height)
        self.sizes.append(len(data))
        self.formats[kind] += 1
        self.distinct.add(_short_hash(data))


@dataclass
class TextCounts:
    """Lengths and variety of one kind of text."""

    words: array = field(default_factory=lambda: array("q"))
    tokens: array = field(default_factory=lambda: array("q"))
    distinct: set[bytes] = field(default_factory=set)
    known_words: set[str] = field(default_factory=set)
    known_tokens: set[int] = field(default_factory=set)
    missing: int = 0
    """Samples without a text of this kind."""

    def add(self, texts: Sequence[str], tokenizer: Tokenizer | None) -> None:
        """Count texts; token lengths only with a tokenizer."""
        for text in texts:
            words = _WORD.findall(text.lower())
            self.words.append(len(words))
            self.known_words.update(words)
            self.distinct.add(_short_hash(text.encode("utf-8", errors="replace")))
        for ids in tokenizer.tokens(texts) if tokenizer else ():
            self.tokens.append(len(ids))
            self.known_tokens.update(ids)


@dataclass
class Statistics:
    """Counts over the samples that were read."""

    shards: str
    samples: int
    """Number of samples in the shards."""
    read: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Members and samples that the index of the shards leaves out, by reason."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Unusable samples among those that were read, by reason."""
    images: ImageCounts = field(default_factory=ImageCounts)
    texts: dict[str, TextCounts] = field(default_factory=lambda: {kind: TextCounts() for kind in TEXT_KINDS})
    vocab_size: int | None = None
    """Vocabulary size of the tokenizer; None without one, when lengths are in words only."""

    def summary(self) -> JsonObject:
        """Summary statistics as a JSON object; shares are between 0 and 1."""
        return {
            "shards": self.shards,
            "samples": self.samples,
            "read": self.read,
            "left_out": dict(sorted(self.left_out.items())),
            "rejected": dict(sorted(self.rejected.items())),
            "vocab_size": self.vocab_size,
            # The key that earlier versions wrote.
            "pictures": _summarise_images(self.images),
            "texts": {kind: self._summarise_texts(texts) for kind, texts in self.texts.items()},
        }

    def _summarise_texts(self, texts: TextCounts) -> JsonObject:
        summary: JsonObject = {
            "texts": len(texts.words),
            "samples_without": texts.missing,
            "distinct": len(texts.distinct),
            "distinct_words": len(texts.known_words),
            "words": _lengths(texts.words),
        }
        if self.vocab_size is not None:
            cut = {
                "cut_at_80": _share_over(texts.tokens, TOWER_TOKENS),
                "cut_at_128": _share_over(texts.tokens, DECODER_TOKENS),
            }
            summary |= {"distinct_tokens": len(texts.known_tokens), "tokens": {**_lengths(texts.tokens), **cut}}
        return summary


TEXT_KINDS = ("alt", "synthetic", "sentence")
"""The alt-text, the whole synthetic caption, and its sentences, of which the text tower reads one in a step."""


def gather(
    dataset: ShardDataset,
    tokenizer: Tokenizer | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Read every sample of `dataset`, or `limit` of them spread evenly; unusable samples are counted by reason.

    `progress` receives the number of samples read and their total. Raises OpenVisionError for a damaged shard.
    """
    found = Statistics(
        str(dataset.folder),
        len(dataset),
        left_out=dataset.left_out,
        vocab_size=tokenizer.vocab_size if tokenizer else None,
    )
    indices = even_sample(len(dataset), limit)
    for start in range(0, len(indices), _SAMPLES_AT_ONCE):
        samples = []
        for index in indices[start : start + _SAMPLES_AT_ONCE]:
            try:
                sample = dataset[index]
                found.images.add(sample.image)
                samples.append(sample)
            except BadSampleError as bad:
                found.rejected[bad.reason] += 1
        found.read += len(samples)
        _add_texts(found, samples, tokenizer)
        if progress:
            progress(found.read + found.rejected.total(), len(indices))
    return found


def even_sample(count: int, limit: int | None) -> Sequence[int]:
    """At most `limit` of `count` indices, equally spaced, so that every shard is represented."""
    if limit is None or limit >= count:
        return range(count)
    return [(2 * place + 1) * count // (2 * limit) for place in range(limit)]


def _add_texts(found: Statistics, samples: Iterable[Sample], tokenizer: Tokenizer | None) -> None:
    by_kind: dict[str, list[list[str]]] = {kind: [] for kind in TEXT_KINDS}
    for sample in samples:
        # A list of strings is one synthetic caption, as in training.
        whole = non_blank(" ".join(non_blank(sample.synthetic)))
        by_kind["alt"].append(non_blank(sample.alt))
        by_kind["synthetic"].append(whole)
        by_kind["sentence"].append([piece for text in whole for piece in sentences(text) if piece.strip()])
    for kind, lists in by_kind.items():
        found.texts[kind].missing += sum(not texts for texts in lists)
        found.texts[kind].add(list(chain.from_iterable(lists)), tokenizer)


def _summarise_images(images: ImageCounts) -> JsonObject:
    widths, heights = np.asarray(images.widths, np.float64), np.asarray(images.heights, np.float64)
    return {
        "formats": dict(images.formats.most_common()),
        "distinct": len(images.distinct),
        "width": spread(widths),
        "height": spread(heights),
        "shorter_side": spread(np.minimum(widths, heights)),
        "aspect": spread(widths / np.maximum(heights, 1)),
        "bytes": spread(np.asarray(images.sizes, np.float64)),
        "total_bytes": int(sum(images.sizes)),
    }


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float] | None:
    """Minimum, mean, quantiles and maximum of some numbers; None when there are none."""
    if not len(values):
        return None
    numbers = np.asarray(values, np.float64)
    low, middle, high = np.quantile(numbers, (0.05, 0.5, 0.95))
    named = {"min": numbers.min(), "p5": low, "median": middle, "mean": numbers.mean(), "p95": high}
    return {name: round(float(value), 4) for name, value in {**named, "max": numbers.max()}.items()}


def _lengths(values: array) -> dict[str, float | None]:
    return {
        **(spread(values) or {}),
        "over_80": _share_over(values, TOWER_LENGTH),
        "over_128": _share_over(values, DECODER_LENGTH),
    }


def _share_over(values: array, length: int) -> float | None:
    return round(float((np.asarray(values) > length).mean()), 6) if len(values) else None


def _short_hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=12).digest()
