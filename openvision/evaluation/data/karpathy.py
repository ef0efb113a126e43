"""Karpathy's splits of COCO and Flickr30k: which images, which captions, in one JSON file.

    {"images": [{"filename": "x.jpg", "filepath": "val2014", "split": "test", "sentences": [{"raw": "A dog."}]}]}

`dataset_coco.json` and `dataset_flickr30k.json` hold all splits. "test" is the usual protocol (5,000 images of COCO,
1,000 of Flickr30k, about five captions each). The original evaluates COCO on the split that TFDS calls "val" (spec
section 7), which has the 5,000 images of Karpathy's "val"; every caption is used in both.
"""

from pathlib import Path

from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import Captioned, captioned, images_of_files
from openvision.files import JsonObject
from openvision.untrusted import is_utf8, load_json, path_inside


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
    texts = [[text.strip() for text in entry["sentences"]][:captions] for entry in chosen]
    return captioned(images_of_files(paths, images), [[text for text in own if text] for own in texts])


def _entries(file: Path) -> list[JsonObject]:
    try:
        content = load_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OpenVisionError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise OpenVisionError(f"{file} is not JSON: {error}") from error
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise OpenVisionError(f"{file} is not in Karpathy's layout: a list `images` with filename, split and sentences")
    return [{**one, "sentences": [sentence["raw"] for sentence in one["sentences"]]} for one in entries]


def _is_entry(one: object) -> bool:
    if not isinstance(one, dict) or not isinstance(one.get("sentences"), list):
        return False
    sentences = [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in one["sentences"]]
    texts = [one.get("filename"), one.get("split"), one.get("filepath", ""), *sentences]
    return all(isinstance(text, str) and is_utf8(text) for text in texts)


def _path(images: Path, entry: JsonObject) -> Path:
    """FILEPATH/FILENAME below the folder, or FILENAME alone where the folder holds one split only."""
    nested = path_inside(images, f"{entry.get('filepath', '')}/{entry['filename']}".lstrip("/"))
    return nested if nested.is_file() else path_inside(images, entry["filename"])
