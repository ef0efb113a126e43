"""Options that evaluators share: which images they measure, with which labels or texts."""

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveInt

from openvision.data.shards.selection import holds_shards
from openvision.data.shards.store import join_folder
from openvision.errors import OpenVisionError
from openvision.evaluation.data import hugging_face
from openvision.evaluation.data.hugging_face import PREFIX
from openvision.evaluation.data.images import (
    Captioned,
    ImageSet,
    Labelled,
    ShardImages,
    captioned_shards,
    folder_of_classes,
    labelled_shards,
    spread,
    take,
)
from openvision.evaluation.data.karpathy import karpathy
from openvision.evaluation.data.prompts import class_names
from openvision.text.captions import sentences


class LabelOptions(BaseModel):
    """The class of each image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str = "name"
    """Json field or member of a shard, or column of a Hugging Face dataset. A folder's classes are its subfolders."""
    classes: str | None = None
    """Class names: `imagenet` (from open_clip_torch), or a file, a name a line or a JSON list, relative to the data
    folder. By default the names in the data."""
    split: str = "test"
    """Split of a Hugging Face dataset."""
    image: str = "image"
    """Column of a Hugging Face dataset."""


def open_labelled(data: str, root: str | Path, options: LabelOptions, limit: PositiveInt | None = None) -> Labelled:
    """Images with classes from wherever `data` points; raises OpenVisionError that says what is missing."""
    base = None if "://" in str(root) else Path(root)
    names = class_names(options.classes, base) if options.classes is not None else None
    if data.startswith(PREFIX):
        source = data.removeprefix(PREFIX)
        return hugging_face.labelled_dataset(source, options.split, options.image, options.label, names).only(limit)
    place = join_folder(root, data)
    if holds_shards(place):
        return labelled_shards(place, options.label, names).only(limit)
    return folder_of_classes(Path(place), names).only(limit)


def open_images(data: str, root: str | Path, limit: int | None = None) -> ImageSet:
    """Images of shards or of a folder of classes, about `limit` of them, evenly spread; all without it."""
    place = join_folder(root, data)
    images = ShardImages(place).images() if holds_shards(place) else folder_of_classes(Path(place)).images
    return images if limit is None or limit >= len(images) else take(images, spread(len(images), limit))


class TextOptions(BaseModel):
    """The texts of each image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = "txt"
    """Json field or member of a shard ("txt", "name", "synthetic"), or column of a Hugging Face dataset."""
    lines: bool = False
    """Every line of the text is a caption of its own, as in the original's Flickr30k."""
    sentences: bool = False
    """Every sentence of the text is a caption of its own."""
    annotations: str | None = None
    """Karpathy's JSON file, relative to the data folder; then `data` is the folder of images."""
    captions: PositiveInt | None = None
    """Take the first so many captions of each image; all by default."""
    split: str = "test"
    """Split of the annotations or of a Hugging Face dataset."""
    image: str = "image"
    """Column of a Hugging Face dataset."""


def open_captioned(data: str, root: str | Path, options: TextOptions, limit: int | None = None) -> Captioned:
    """Images with texts from wherever `data` points; raises OpenVisionError that says what is missing."""
    if options.annotations is not None:
        place = Path(root) / options.annotations
        return karpathy(place, Path(root) / data, options.split, options.captions).only(limit)
    if data.startswith(PREFIX):
        source = data.removeprefix(PREFIX)
        found = hugging_face.captioned_dataset(source, options.split, options.image, options.text)
    else:
        place = join_folder(root, data)
        if not holds_shards(place):
            raise OpenVisionError(f"{place} holds no tar shards; for images in files give `annotations` too")
        found = captioned_shards(place, options.text, options.lines)
    return _chosen(found, options).only(limit)


def _chosen(found: Captioned, options: TextOptions) -> Captioned:
    """Split into sentences and keep the number of captions asked for."""
    if not options.sentences and options.captions is None:
        return found
    texts: list[str] = []
    owner: list[int] = []
    taken: dict[int, int] = {}
    for text, image in zip(found.texts, found.owner.tolist(), strict=True):
        for one in (sentences(text) or [text]) if options.sentences else [text]:
            if options.captions is None or taken.get(image, 0) < options.captions:
                taken[image] = taken.get(image, 0) + 1
                texts.append(one)
                owner.append(image)
    return Captioned(found.images, texts, np.array(owner, dtype=np.int64))
