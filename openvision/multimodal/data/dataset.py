"""Conversations with pictures, from LLaVA's JSON or Hugging Face data sets to ids and pixels.

Everything that can be checked without opening a picture is checked first. Samples whose picture is missing are left out
and counted; a picture that turns out to be broken is counted, and the next sample takes its place.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from openvision.errors import OpenVisionError, require
from openvision.files import append_text
from openvision.multimodal.data.conversation import IGNORED, Sample, SampleError, encode, parse_sample
from openvision.multimodal.data.images import ImageFile, Picture, RowImage, UnreadableImageError
from openvision.multimodal.model.geometry import Geometry

Aspect = Literal["pad", "crop", "anyres"]
# How many broken samples in a row end the run: something else is wrong then.
_PATIENCE = 100


@dataclass(frozen=True)
class Record:
    """A sample and its pictures."""

    sample: Sample
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Collection:
    """The usable samples of a data set, and why others are left out."""

    records: list[Record]
    left_out: Counter[str]

    def report(self) -> list[str]:
        """One line a reason."""
        return [f"samples left out, {reason}: {count}" for reason, count in sorted(self.left_out.items())]


@dataclass(frozen=True)
class Rules:
    """How strict reading is."""

    image_first: bool = True
    """Move `<image>` to the start of its question, as LLaVA does."""
    skip_bad: bool = False
    """Leave unusable samples out and count them, instead of refusing the data."""
    rejects: Path | None = None
    """File of JSON lines that names every sample left out."""


def read_llava_json(files: Sequence[Path], images: Path, rules: Rules | None = None) -> Collection:
    """Samples of LLaVA's JSON (a list) or JSON lines; picture names are relative to `images`.

    Raises OpenVisionError for a file that cannot be read, SampleError for an unusable sample unless `rules` skip it.
    """
    rows = [row for file in files for row in _read_rows(file)]
    return collect(rows, lambda row, _: [ImageFile(images / name) for name in _names(row)], rules or Rules())


def from_rows(rows: Sequence[dict[str, Any]], rules: Rules | None = None) -> Collection:
    """Samples of rows that carry their pictures in a column `image` or `images`, e.g. of a Hugging Face data set."""

    def pictures(row: dict[str, Any], number: int) -> list[Picture]:
        for column in ("image", "images"):
            value = row.get(column)
            if isinstance(value, list):
                return [RowImage(rows, number, column, position) for position in range(len(value))]
            if value is not None:
                return [RowImage(rows, number, column, None)]
        return []

    return collect(rows, pictures, rules or Rules())


def read_hub_dataset(name: str, config: str | None, split: str, rules: Rules | None = None) -> Collection:
    """Samples of a Hugging Face data set by Hub id, or of a folder written by `save_to_disk`."""
    datasets = require("datasets", extra="datasets")
    try:
        if Path(name).is_dir():
            loaded = datasets.load_from_disk(name)
            rows = loaded[split] if isinstance(loaded, dict) else loaded
        else:
            rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, KeyError) as error:
        raise OpenVisionError(f"cannot load data set {name} ({config or 'no config'}, {split}): {error}") from error
    return from_rows(rows, rules)


def collect(
    rows: Iterable[dict[str, Any]],
    pictures_of: Callable[[dict[str, Any], int], Sequence[Picture]],
    rules: Rules,
) -> Collection:
    """Check rows; `pictures_of` finds the pictures of row and number."""
    records: list[Record] = []
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows):
        name = _name_of(row, number)
        try:
            pictures = tuple(pictures_of(row, number))
            record = Record(parse_sample(row, name, len(pictures), rules.image_first), pictures)
        except SampleError as error:
            if not rules.skip_bad:
                raise
            _reject(rules.rejects, left_out, name, "unusable", str(error))
            continue
        if not all(picture.exists() for picture in pictures):
            _reject(rules.rejects, left_out, name, "picture missing", str(pictures))
            continue
        records.append(record)
    if not records:
        raise OpenVisionError(
            f"no usable sample: {dict(left_out) or 'the data are empty'}; check the folder of pictures"
        )
    return Collection(records, left_out)


class ConversationDataset(Dataset[dict[str, Any]]):
    """Records as ids, labels and pixels, or as features of a cache in place of pixels."""

    def __init__(
        self,
        records: Sequence[Record],
        processor: Any,
        geometry: Geometry,
        aspect: Aspect,
        max_length: int,
        rules: Rules | None = None,
        features: Any = None,
    ) -> None:
        """`features` is a `cache.FeatureCache` filled for these pictures and this aspect."""
        if (aspect == "anyres") != bool(geometry.pinpoints):
            raise OpenVisionError(
                f"aspect {aspect!r} does not fit the model: llava-next takes anyres, llava-1.5 takes pad or crop"
            )
        self.records = records
        self.processor = processor
        self.geometry = geometry
        self.aspect: Aspect = aspect
        self.max_length = max_length
        self.rules = rules or Rules()
        self.features = features
        self.rejected: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids` and `labels` (lists), `pixel_values` (squares, 3, S, S) or `features`, `image_sizes` (n, 2)."""
        for attempt in range(min(_PATIENCE, len(self))):
            record = self.records[(index + attempt) % len(self)]
            try:
                return self.item(record)
            except UnreadableImageError as error:
                _reject(self.rules.rejects, self.rejected, record.sample.id, "picture unreadable", str(error))
            except SampleError as error:
                if not self.rules.skip_bad:
                    raise
                _reject(self.rules.rejects, self.rejected, record.sample.id, "unusable", str(error))
        raise OpenVisionError(
            f"{_PATIENCE} samples in a row from number {index} cannot be used; see {self.rules.rejects}"
        )

    def item(self, record: Record) -> dict[str, Any]:
        """One record, without a replacement; raises UnreadableImageError or SampleError."""
        item: dict[str, Any] = {}
        sizes: list[tuple[int, int]] = []
        if record.pictures and self.features is not None:
            found = [self.features.read(picture, self.aspect) for picture in record.pictures]
            item["features"] = torch.cat([feature for feature, _ in found])
            sizes = [size for _, size in found]
        elif record.pictures:
            images = [picture.open() for picture in record.pictures]
            sizes = [(image.height, image.width) for image in images]
            item["pixel_values"] = torch.cat([self.pixels(image) for image in images])
        counts = [self.geometry.tokens(*size) for size in sizes]
        tokenizer = self.processor.tokenizer
        encoded = encode(record.sample, tokenizer, self.processor.image_token_id, counts, self.max_length)
        return item | {"input_ids": encoded.input_ids, "labels": encoded.labels, "image_sizes": sizes}

    def pixels(self, image: Any) -> Tensor:
        """(squares, 3, S, S), normalised float32: the square, or the base and its tiles."""
        prepared = self.processor.image_processor(images=image, do_pad=self.aspect != "crop", return_tensors="pt")
        pixels = prepared["pixel_values"]
        return pixels[0] if self.geometry.pinpoints else pixels

    def answers(self) -> Iterator[list[int]]:
        """The answer tokens of every sample that can be used; no picture is opened."""
        tokenizer, image_token_id = self.processor.tokenizer, self.processor.image_token_id
        for record in self.records:
            try:
                # Pictures take no place here, so nothing is cut that training will see.
                encoded = encode(record.sample, tokenizer, image_token_id, [0] * len(record.pictures), self.max_length)
            except SampleError:
                # Whoever draws it refuses it, or leaves it out and counts it.
                continue
            yield [label for label in encoded.labels if label != IGNORED]

    def lengths(self) -> list[int]:
        """Estimated tokens of every sample, for batches of like length; no picture is opened."""
        picture = self.geometry.patches * (3 if self.geometry.pinpoints else 1)
        return [
            sum(len(turn.text) for turn in record.sample.turns) // 4 + picture * len(record.pictures)
            for record in self.records
        ]


def _reject(file: Path | None, counts: Counter[str], name: str, reason: str, detail: str) -> None:
    counts[reason] += 1
    if file is not None:
        append_text(file, json.dumps({"id": name, "reason": reason, "detail": detail}) + "\n")


def _name_of(row: dict[str, Any], number: int) -> str:
    found = row.get("id")
    return str(found) if found not in (None, "") else f"number {number}"


def _names(row: dict[str, Any]) -> list[str]:
    value = row.get("image", row.get("images"))
    if value is None or value == "":
        return []
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise SampleError(f"sample {row.get('id')}: image must be a file name or a list of them")
    return names


def _read_rows(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except OSError as error:
        raise OpenVisionError(f"conversations {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise OpenVisionError(f"conversations {file} is not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise OpenVisionError(f"conversations {file} must be a list of samples")
    return rows
