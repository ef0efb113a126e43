"""Karpathy's splits of COCO and Flickr30k: which images, which captions, in one JSON file.

    {"images": [{"filename": "x.jpg", "filepath": "val2014", "split": "test", "sentences": [{"raw": "A dog."}]}]}

`dataset_coco.json` and `dataset_flickr30k.json` hold all splits. "test" is the usual protocol (5,000 images of COCO,
1,000 of Flickr30k, about five captions each). The original evaluates COCO on the split that TFDS calls "val" (spec
section 7), which has the 5,000 images of Karpathy's "val"; every caption is used in both.
"""

import json
from pathlib import Path

from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import Captioned, captioned, images_of_files
from openvision.files import JsonObject


def karpathy(file: Path, images: Path, split: str = "test", captions: int | None = None) -> Captioned:
    """Images and captions of one split; `captions` keeps the first so many of each image, None all of them.

    Raises OpenVisionError for a file of another layout, a split that is not there, an image without caption, or
    images that are not below `images`.
    """
    entries = _entries(file)
    chosen = [entry for entry in entries if entry["split"] == split]
    if not chosen:
        known = ", ".join(sorted({entry["split"] for entry in entries}))
        raise OpenVisionError(f"{file} has no split {split!r}; it has {known}")
    paths = [_path(images, entry) for entry in chosen]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise OpenVisionError(f"{len(missing)} of {len(paths)} images of {file} are missing, {missing[0]} first")
    texts = [[sentence["raw"].strip() for sentence in entry["sentences"]][:captions] for entry in chosen]
    return captioned(images_of_files(paths, images), [[text for text in own if text] for own in texts])


def _entries(file: Path) -> list[JsonObject]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OpenVisionError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise OpenVisionError(f"{file} is not JSON: {error}") from error
    entries = content.get("images") if isinstance(content, dict) else None
    needed = {"filename", "split", "sentences"}
    if not isinstance(entries, list) or not all(isinstance(one, dict) and needed <= one.keys() for one in entries):
        raise OpenVisionError(f"{file} is not in Karpathy's layout: a list `images` with filename, split and sentences")
    return entries


def _path(images: Path, entry: JsonObject) -> Path:
    """FILEPATH/FILENAME below the folder, or FILENAME alone where the folder holds one split only."""
    nested = images / entry.get("filepath", "") / entry["filename"]
    return nested if nested.is_file() else images / entry["filename"]
