"""How new captions differ from alt-texts: lengths, words, similarity with the image, faults, duplicates; and a page.

The statistics are those of Recap-DataComp-1B (arXiv 2406.08478): length distributions, distinct words, and the
similarity of each image with its alt-text and with its new caption under a given encoder.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from openvision.data.recap.index import shard_names
from openvision.data.shards.dataset import Sample, ShardDataset
from openvision.data.shards.store import open_store
from openvision.data.tools.stats import TextCounts, even_sample, spread
from openvision.errors import OpenVisionError, require
from openvision.evaluation.report.gallery import Album, draw
from openvision.evaluation.report.template import render
from openvision.files import JsonObject, atomic_write_text, read_json
from openvision.images.decode import BadSampleError, decode_image
from openvision.inference.encoder import Encoder
from openvision.recaption.duplicates import Fingerprint, fingerprint, near_duplicates
from openvision.recaption.job import MANIFEST, count_finished
from openvision.text.captions import non_blank
from openvision.untrusted import json_text

_AT_ONCE = 64
# Groups of near-duplicates on the page, and images of each.
_GROUPS, _MEMBERS = 12, 8
_BAR = 10
_BARS = 16


@dataclass(frozen=True)
class ReportOptions:
    """What is read and shown."""

    limit: int | None = 10_000
    """Samples that are read, spread evenly; None: all."""
    samples: int = 48
    """Samples on the page, drawn by lot."""
    placeholder: int = 10
    """An image that occurs this often is a placeholder."""
    seed: int = 0


@dataclass(frozen=True)
class Card:
    """A sample on the page."""

    key: str
    image: str
    """Name in the album."""
    alt: str
    captions: list[str]
    seeds: list[int]
    is_retried: bool


@dataclass
class Found:
    """What the samples say."""

    counts: Counter[str]
    """Of the job: captions, faults by reason, ..."""
    alt: TextCounts = field(default_factory=TextCounts)
    new: TextCounts = field(default_factory=TextCounts)
    keys: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    """Of the samples that could be read, in the data set."""
    fingerprints: list[Fingerprint] = field(default_factory=list)
    similarities: dict[str, list[float]] = field(default_factory=lambda: {"alt": [], "recaption": []})
    """Of images that have both texts."""
    rejected: Counter[str] = field(default_factory=Counter)
    groups: list[list[int]] = field(default_factory=list)

    def add(self, index: int, sample: Sample, pixels: NDArray[np.uint8]) -> None:
        """Count one sample."""
        self.keys.append(sample.key)
        self.indices.append(index)
        self.fingerprints.append(fingerprint(pixels))
        for counts, texts in ((self.alt, non_blank(sample.alt)), (self.new, non_blank(sample.synthetic))):
            counts.missing += not texts
            counts.add(texts, None)

    def summary(self, placeholder: int) -> JsonObject:
        """Everything as numbers; shares are between 0 and 1."""
        often = [group for group in self.groups if len(group) >= placeholder]
        plain = [index for index, one in enumerate(self.fingerprints) if one.is_plain]
        summary: JsonObject = {
            "read": len(self.keys),
            "rejected": dict(sorted(self.rejected.items())),
            "job": dict(sorted(self.counts.items())),
            "texts": {"alt": _texts(self.alt), "recaption": _texts(self.new)},
            "near_duplicates": {
                "groups": len(self.groups),
                "images": sum(map(len, self.groups)),
                "placeholders": [[self.keys[index] for index in group] for group in often],
                "plain": [self.keys[index] for index in plain],
            },
        }
        if self.similarities["alt"]:
            alt, new = (np.array(self.similarities[kind]) for kind in ("alt", "recaption"))
            summary["similarity"] = {
                "images": len(alt),
                "alt": spread(alt),
                "recaption": spread(new),
                "recaption_closer": round(float((new > alt).mean()), 4),
            }
        return summary


def write_report(
    output: Path, page: Path, options: ReportOptions, encoder: Encoder | None = None, numbers: Path | None = None
) -> JsonObject:
    """Read the finished shards of the job in `output`, write the HTML `page`, and return (and write) the numbers.

    Raises OpenVisionError for a folder without a finished shard, and without the extra `report`.
    """
    require("jinja2", extra="report")
    if not (output / MANIFEST).is_file():
        raise OpenVisionError(f"{output} holds no recaption job; name the output folder of `openvision recaption`")
    manifest = read_json(output / MANIFEST)
    counts = count_finished(output, shard_names(open_store(str(manifest["shards"]))))
    if not counts["shards"]:
        raise OpenVisionError(f"{output} holds no finished shard yet; run `openvision recaption` first")
    dataset = ShardDataset(output, str(manifest["key"]))
    indices = even_sample(len(dataset), options.limit)
    shown = {indices[place] for place in draw([""] * len(indices), options.samples, options.seed)}
    found, album = Found(counts), Album()
    cards: list[Card] = []
    for start in range(0, len(indices), _AT_ONCE):
        read = list(_samples(dataset, indices[start : start + _AT_ONCE], found))
        for index, sample, pixels in read:
            found.add(index, sample, pixels)
            if index in shown:
                cards.append(_card(sample, album.add(pixels), str(manifest["key"])))
        if encoder is not None:
            _compare(encoder, read, found)
    found.groups = near_duplicates(found.fingerprints)
    summary = found.summary(options.placeholder)
    groups = [[_tile(dataset, found, place, album) for place in group[:_MEMBERS]] for group in found.groups[:_GROUPS]]
    context = {
        "manifest": manifest,
        "summary": summary,
        "cards": cards,
        "groups": [(len(group), tiles) for group, tiles in zip(found.groups, groups, strict=False)],
        "lengths": _histograms(found),
        "images": album.images,
        "placeholder": options.placeholder,
    }
    atomic_write_text(page, render("recaption.html", context))
    if numbers is not None:
        atomic_write_text(numbers, json_text(summary, indent=2) + "\n")
    return summary


def _samples(
    dataset: ShardDataset, indices: Sequence[int], found: Found
) -> Iterator[tuple[int, Sample, NDArray[np.uint8]]]:
    for index in indices:
        try:
            sample = dataset[index]
            pixels = decode_image(sample.image)
        except BadSampleError as bad:
            found.rejected[bad.reason] += 1
            continue
        yield index, sample, pixels


def _first(texts: str | Sequence[str] | None) -> str:
    return next(iter(non_blank(texts)), "")


def _compare(encoder: Encoder, read: Sequence[tuple[int, Sample, NDArray[np.uint8]]], found: Found) -> None:
    """Cosines of the images that have an alt-text and a new caption with the first of each."""
    both = [(sample, pixels) for _, sample, pixels in read if _first(sample.alt) and _first(sample.synthetic)]
    if not both:
        return
    images = encoder.encode_images([Image.fromarray(pixels) for _, pixels in both])
    for kind, texts in (
        ("alt", [_first(sample.alt) for sample, _ in both]),
        ("recaption", [_first(sample.synthetic) for sample, _ in both]),
    ):
        found.similarities[kind] += (images * encoder.encode_texts(texts)).sum(dim=1).tolist()


def _card(sample: Sample, image: str, key: str) -> Card:
    by = sample.meta.get(f"{key}_by")
    origin = by if isinstance(by, dict) else {}
    seeds, retries = origin.get("seeds", []), origin.get("retries", [])
    return Card(sample.key, image, _first(sample.alt), non_blank(sample.synthetic), seeds, any(retries))


def _tile(dataset: ShardDataset, found: Found, place: int, album: Album) -> tuple[str, str]:
    """Name in the album and key of one of the images that were read."""
    return album.add(decode_image(dataset[found.indices[place]].image)), found.keys[place]


def _texts(counts: TextCounts) -> JsonObject:
    return {
        "texts": len(counts.words),
        "samples_without": counts.missing,
        "distinct": len(counts.distinct),
        "distinct_words": len(counts.known_words),
        "words": spread(counts.words),
    }


def _histograms(found: Found) -> list[tuple[str, float, float]]:
    """Range of words, and the shares of alt-texts and of new captions in it."""
    rows = []
    for number in range(_BARS):
        low, high = number * _BAR, (number + 1) * _BAR
        label = f"{low} to {high - 1}" if number < _BARS - 1 else f"{low} and more"
        shares = []
        for words in (np.asarray(found.alt.words), np.asarray(found.new.words)):
            inside = (words >= low) & ((words < high) | (number == _BARS - 1))
            shares.append(float(inside.mean()) if len(words) else 0.0)
        rows.append((label, *shares))
    while rows and not any(rows[-1][1:]):
        rows.pop()
    return rows
