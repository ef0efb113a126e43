"""Conversations with images, from LLaVA's JSON or a Hugging Face data set to token ids and pixels.

Checks that need no decoding run first. Samples whose image is missing are dropped and counted. A sample whose image
is broken is counted when it is read, and replaced by the next one.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from openvision.errors import OpenVisionError, require
from openvision.files import JsonObject, append_lines
from openvision.images.decode import BadSampleError
from openvision.multimodal.data.conversation import (
    IGNORED,
    Conversation,
    SampleError,
    TokenizedConversation,
    parse_conversation,
    tokenize,
)
from openvision.multimodal.data.feature_cache import FeatureCache
from openvision.multimodal.data.images import ImageFile, ImageSource, ImageSourceError, RowImage
from openvision.multimodal.model.geometry import Aspect, Geometry
from openvision.multimodal.model.huggingface import Processor
from openvision.multimodal.model.native import prepare, row_break
from openvision.untrusted import json_text, load_json, path_inside

# More broken samples in a row than this stop the run: the cause is not a single file.
_MAX_REPLACEMENTS = 100


@dataclass(frozen=True)
class ConversationSample:
    """A conversation and its images."""

    conversation: Conversation
    images: tuple[ImageSource, ...]


@dataclass(frozen=True)
class Collection:
    """The usable samples of a data set, and counts of the others by reason."""

    samples: list[ConversationSample]
    dropped: Counter[str]

    def report(self) -> list[str]:
        """One line for each reason."""
        return [f"samples dropped, {reason}: {count}" for reason, count in sorted(self.dropped.items())]


@dataclass(frozen=True)
class ReadOptions:
    """How conversations are read."""

    image_first: bool = True
    """Move `<image>` to the start of its question, as LLaVA does."""
    skip_bad: bool = False
    """Drop and count unusable samples instead of raising an error."""
    rejects: Path | None = None
    """JSON lines file that lists every dropped sample."""


def read_llava_json(files: Sequence[Path], images: Path, options: ReadOptions | None = None) -> Collection:
    """Samples of LLaVA's JSON (a list) or JSON lines; image names are relative to `images`.

    Raises OpenVisionError for a file that cannot be read, and SampleError for an unusable sample unless `options` skip
    it.
    """
    rows = [row for file in files for row in _read_rows(file)]
    return collect(rows, lambda row, _: _files(row, images), options or ReadOptions())


def read_rows(rows: Sequence[JsonObject], options: ReadOptions | None = None) -> Collection:
    """Samples of rows with a column `image` or `images`, e.g. of a Hugging Face data set."""

    def images_of(row: JsonObject, number: int) -> list[ImageSource]:
        for column in ("image", "images"):
            value = row.get(column)
            if isinstance(value, list):
                return [RowImage(rows, number, column, position) for position in range(len(value))]
            if value is not None:
                return [RowImage(rows, number, column, None)]
        return []

    return collect(rows, images_of, options or ReadOptions())


def read_hub_dataset(name: str, config: str | None, split: str, options: ReadOptions | None = None) -> Collection:
    """Samples of a Hugging Face data set: a Hub id, or a folder written by `save_to_disk`."""
    datasets = require("datasets", extra="datasets")
    try:
        if Path(name).is_dir():
            loaded = datasets.load_from_disk(name)
            rows = loaded[split] if isinstance(loaded, dict) else loaded
        else:
            rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, KeyError) as error:
        raise OpenVisionError(f"cannot load data set {name} ({config or 'no config'}, {split}): {error}") from error
    return read_rows(rows, options)


def collect(
    rows: Iterable[JsonObject],
    images_of: Callable[[JsonObject, int], Sequence[ImageSource]],
    options: ReadOptions,
) -> Collection:
    """Check rows; `images_of` returns the images of a row, given the row and its number.

    Raises SampleError for an unusable sample unless `options` skip it, and OpenVisionError when none is usable.
    """
    samples: list[ConversationSample] = []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(rows):
        name = _name_of(row, number)
        try:
            images = tuple(images_of(row, number))
            conversation = parse_conversation(row, name, len(images), options.image_first)
        except SampleError as error:
            if not options.skip_bad:
                raise
            _reject(options.rejects, dropped, name, "unusable", str(error))
            continue
        if not all(image.exists() for image in images):
            _reject(options.rejects, dropped, name, "image missing", str(images))
            continue
        samples.append(ConversationSample(conversation, images))
    if not samples:
        raise OpenVisionError(f"no usable sample: {dict(dropped) or 'the data are empty'}; check the image folder")
    return Collection(samples, dropped)


class Item(TypedDict):
    """One sample of a `ConversationDataset`."""

    input_ids: list[int]
    labels: list[int]
    image_sizes: list[tuple[int, int]]
    """Height and width of every image in pixels."""
    pixel_values: NotRequired[Tensor]
    """float32 (squares, 3, S, S); missing without images."""
    features: NotRequired[Tensor]
    """(squares, N, D), in place of pixels."""
    native: NotRequired[list[Tensor]]
    """Of each image in native shapes: float32 pixels (3, H, W), or features (N, D)."""


class ConversationDataset(Dataset[Item]):
    """Samples as token ids, labels, and pixels or cached features."""

    def __init__(
        self,
        samples: Sequence[ConversationSample],
        processor: Processor,
        geometry: Geometry,
        aspect: Aspect,
        max_length: int,
        options: ReadOptions | None = None,
        features: FeatureCache | None = None,
    ) -> None:
        """`features` must hold these images in this aspect."""
        if aspect not in geometry.aspects:
            raise OpenVisionError(
                f"aspect {aspect!r} does not fit the model; use anyres for llava-next, native for llava-native, pad or "
                "crop for llava-1.5"
            )
        self.samples = samples
        self.processor = processor
        self.geometry = geometry
        self.aspect: Aspect = aspect
        self.max_length = max_length
        self.options = options or ReadOptions()
        self.features = features
        self.replaced: Counter[str] = Counter()
        # Squares and tiles have none in the text.
        self._end_of_row = 0 if geometry.native is None else row_break(processor.tokenizer)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        """Sample `index`, or the next usable one; raises OpenVisionError after too many unusable ones."""
        for attempt in range(min(_MAX_REPLACEMENTS, len(self))):
            sample = self.samples[(index + attempt) % len(self)]
            try:
                return self.item(sample)
            except ImageSourceError as error:
                reason, detail = "image unreadable", str(error)
            except SampleError as error:
                if not self.options.skip_bad:
                    raise
                reason, detail = "unusable", str(error)
            _reject(self.options.rejects, self.replaced, sample.conversation.id, reason, detail)
        raise OpenVisionError(
            f"{_MAX_REPLACEMENTS} samples in a row from number {index} cannot be used; see {self.options.rejects}"
        )

    def item(self, sample: ConversationSample) -> Item:
        """The sample itself, without replacement; raises ImageSourceError or SampleError."""
        item: Item = {"input_ids": [], "labels": [], "image_sizes": []}
        if sample.images and self.features is not None:
            found = [self.features.read(image, self.aspect) for image in sample.images]
            self._put(item, "features", [feature for feature, _ in found])
            item["image_sizes"] = [size for _, size in found]
        elif sample.images:
            images = [image.open() for image in sample.images]
            self._put(item, "pixel_values", [self.pixels(image) for image in images])
            item["image_sizes"] = [(image.height, image.width) for image in images]
        token, end_of_row = self.processor.image_token_id, self._end_of_row
        tokenized = self._tokenize(
            sample, [self.geometry.image_ids(*size, token, end_of_row) for size in item["image_sizes"]]
        )
        item["input_ids"], item["labels"] = tokenized.input_ids, tokenized.labels
        return item

    def _put(self, item: Item, name: Literal["features", "pixel_values"], values: Sequence[Tensor]) -> None:
        """Give a sample its images; those of native shapes differ in size."""
        if self.geometry.native is None:
            item[name] = torch.cat(list(values))
        else:
            item["native"] = [value[0] for value in values]

    def _tokenize(self, sample: ConversationSample, images: Sequence[Sequence[int]]) -> TokenizedConversation:
        tokenizer, image_token_id = self.processor.tokenizer, self.processor.image_token_id
        return tokenize(sample.conversation, tokenizer, image_token_id, images, self.max_length)

    def pixels(self, image: Image.Image) -> Tensor:
        """Normalised float32 (squares, 3, S, S): the square, or the base image and its tiles; (1, 3, H, W) natively.

        Raises ImageSourceError for an aspect that no native shape has.
        """
        if self.geometry.native is not None:
            try:
                return prepare(image, self.geometry.native, self.processor.image_processor)[None]
            except BadSampleError as error:
                raise ImageSourceError(str(error)) from error
        prepared = self.processor.image_processor(images=image, do_pad=self.aspect != "crop", return_tensors="pt")
        pixels = prepared["pixel_values"]
        return pixels[0] if self.geometry.pinpoints else pixels

    def answers(self) -> Iterator[list[int]]:
        """The answer tokens of every usable sample; opens no image."""
        for sample in self.samples:
            try:
                # Images take no tokens here, so that nothing is truncated that training will see.
                tokenized = self._tokenize(sample, [()] * len(sample.images))
            except SampleError:
                # Raised or counted when the sample is read.
                continue
            yield [label for label in tokenized.labels if label != IGNORED]

    def lengths(self) -> list[int]:
        """Estimated tokens of every sample, for batches of similar length; opens no image."""
        visual = self.geometry.most_patches * (3 if self.geometry.pinpoints else 1)
        return [
            sum(len(turn.text) for turn in sample.conversation.turns) // 4 + visual * len(sample.images)
            for sample in self.samples
        ]


def _reject(file: Path | None, counts: Counter[str], name: str, reason: str, detail: str) -> None:
    counts[reason] += 1
    if file is not None:
        append_lines(file, json_text({"id": name, "reason": reason, "detail": detail}) + "\n")


def _name_of(row: JsonObject, number: int) -> str:
    found = row.get("id")
    return str(found) if isinstance(found, (str, int)) and found != "" else f"number {number}"


def _files(row: JsonObject, images: Path) -> list[ImageFile]:
    try:
        return [ImageFile(path_inside(images, name)) for name in _names(row)]
    except SampleError:
        raise
    except OpenVisionError as error:
        raise SampleError(f"sample {row.get('id')}: {error}") from error


def _names(row: JsonObject) -> list[str]:
    value = row.get("image", row.get("images"))
    if value is None or value == "":
        return []
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise SampleError(f"sample {row.get('id')}: image must be a file name or a list of file names")
    return names


def _read_rows(file: Path) -> list[JsonObject]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            rows = [load_json(line) for line in text.splitlines() if line.strip()]
        else:
            rows = load_json(text)
    except OSError as error:
        raise OpenVisionError(
            f"conversations {file} cannot be read: {error.strerror}; check the recipe and --data"
        ) from error
    except ValueError as error:
        raise OpenVisionError(f"conversations {file} is not valid JSON: {error}; fix or download it again") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise OpenVisionError(f"conversations {file} must be a JSON list of samples")
    return rows
