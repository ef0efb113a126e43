"""Fields that evaluators share to say which pictures, and which of their texts, they are about."""

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveInt

from openvision.data.shards.store import join_folder
from openvision.errors import OpenVisionError
from openvision.evaluation.data import hugging_face
from openvision.evaluation.data.hugging_face import PREFIX
from openvision.evaluation.data.images import Captioned, Labelled, captioned_shards, folder_of_classes, labelled_shards
from openvision.evaluation.data.karpathy import karpathy
from openvision.evaluation.data.prompts import class_names
from openvision.text.captions import sentences


class LabelOptions(BaseModel):
    """Which class a picture has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str = "name"
    """Json field or member of a shard, or column of a Hugging Face dataset. A folder's classes are its subfolders."""
    classes: str | None = None
    """Class names: `imagenet` (from open_clip_torch), or a file, a name a line or a JSON list, relative to the data
    folder. By default those the data bring."""
    split: str = "test"
    """Of a Hugging Face dataset."""
    image: str = "image"
    """Column of a Hugging Face dataset."""


def open_labelled(data: str, root: str | Path, options: LabelOptions, limit: PositiveInt | None = None) -> Labelled:
    """Pictures with classes from wherever `data` points; raises OpenVisionError that says what is missing."""
    base = None if "://" in str(root) else Path(root)
    names = class_names(options.classes, base) if options.classes is not None else None
    if data.startswith(PREFIX):
        source = data.removeprefix(PREFIX)
        return hugging_face.labelled_dataset(source, options.split, options.image, options.label, names).only(limit)
    place = join_folder(root, data)
    if _holds_shards(place):
        return labelled_shards(place, options.label, names).only(limit)
    return folder_of_classes(Path(place), names).only(limit)


def _holds_shards(place: str | Path) -> bool:
    return "://" in str(place) or any(Path(place).glob("*.tar"))


class TextOptions(BaseModel):
    """Which texts a picture has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = "txt"
    """Json field or member of a shard ("txt", "name", "synthetic"), or column of a Hugging Face dataset."""
    lines: bool = False
    """Every line of the text is a caption of its own, as in the original's Flickr30k."""
    sentences: bool = False
    """Every sentence of the text is a caption of its own."""
    annotations: str | None = None
    """Karpathy's JSON file, relative to the data folder; then `data` is the folder of pictures."""
    captions: PositiveInt | None = None
    """Take the first so many captions of each picture; all by default."""
    split: str = "test"
    """Of the annotations or of a Hugging Face dataset."""
    image: str = "image"
    """Column of a Hugging Face dataset."""


def open_captioned(data: str, root: str | Path, options: TextOptions) -> Captioned:
    """Pictures with texts from wherever `data` points; raises OpenVisionError that says what is missing."""
    if options.annotations is not None:
        return karpathy(Path(root) / options.annotations, Path(root) / data, options.split, options.captions)
    if data.startswith(PREFIX):
        source = data.removeprefix(PREFIX)
        found = hugging_face.captioned_dataset(source, options.split, options.image, options.text)
    else:
        place = join_folder(root, data)
        if not _holds_shards(place):
            raise OpenVisionError(f"{place} holds no tar shards; for pictures in files give `annotations` too")
        found = captioned_shards(place, options.text, options.lines)
    return _chosen(found, options)


def _chosen(found: Captioned, options: TextOptions) -> Captioned:
    """Split into sentences and cut to the number of captions asked for."""
    if not options.sentences and options.captions is None:
        return found
    texts: list[str] = []
    owner: list[int] = []
    taken: dict[int, int] = {}
    for text, picture in zip(found.texts, found.owner.tolist(), strict=True):
        for one in (sentences(text) or [text]) if options.sentences else [text]:
            if options.captions is None or taken.get(picture, 0) < options.captions:
                taken[picture] = taken.get(picture, 0) + 1
                texts.append(one)
                owner.append(picture)
    return Captioned(found.pictures, texts, np.array(owner, dtype=np.int64))
