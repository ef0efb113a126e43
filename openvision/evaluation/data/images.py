"""Images with a label or with texts, from a folder or tar shards; nothing is decoded before it is asked for.

    DATA/CLASS/*.jpg           a folder of images, a subfolder a class (`folder_of_classes`)
    DATA/000000.tar ...        shards; label and texts are the txt or cls member or fields of the json (`ShardImages`)
    a Hugging Face dataset     see hugging_face.py
    Karpathy's JSON            see karpathy.py

Labels and texts are read when the set is opened, so that errors in them come before a model is loaded.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openvision.data.shards.dataset import parse_fields
from openvision.data.shards.index import CAPTIONS, IMAGE_EXTENSIONS, Entry, read_members
from openvision.data.shards.manifest import open_index, open_manifest
from openvision.data.shards.store import Store, open_store
from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.images.decode import IMAGE_SUFFIXES, BadSampleError, decode_image
from openvision.untrusted import decode_text, is_utf8


@dataclass(frozen=True)
class ImageSet:
    """n images that can be loaded by number, from many threads."""

    name: str
    """What messages call the set: its folder."""
    keys: list[str]
    load: Callable[[int], NDArray[np.uint8]]
    """Number -> RGB uint8 (H, W, 3); raises BadSampleError for an image that cannot be decoded."""
    identity: str
    """SHA-256 that changes when the set does; `openvision eval` writes it beside every result."""

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Labelled:
    """Images with one class each."""

    images: ImageSet
    labels: NDArray[np.int64]
    """(n,), positions in `classes`."""
    classes: list[str]
    naming: str = ""
    """How a list of class names was paired with folders; empty when the names are the data's own."""

    def __len__(self) -> int:
        return len(self.images)

    def only(self, count: int | None) -> "Labelled":
        """Every k-th image, about `count` of them, for a quick look; all without `count`."""
        if count is None or count >= len(self):
            return self
        rows = spread(len(self), count)
        return replace(self, images=take(self.images, rows), labels=self.labels[rows])


@dataclass(frozen=True)
class Captioned:
    """Images with one or more texts each."""

    images: ImageSet
    texts: list[str]
    owner: NDArray[np.int64]
    """(m,), the image of every text; ascending."""

    def __len__(self) -> int:
        return len(self.images)

    def only(self, count: int | None) -> "Captioned":
        """Every k-th image with its texts, about `count` of them; all without `count`."""
        if count is None or count >= len(self):
            return self
        rows = spread(len(self), count)
        kept = np.isin(self.owner, rows)
        texts = [text for text, keep in zip(self.texts, kept, strict=True) if keep]
        return Captioned(take(self.images, rows), texts, np.searchsorted(rows, self.owner[kept]))

    @property
    def one_each(self) -> bool:
        """Whether every image has exactly one text."""
        return len(self.texts) == len(self.images) and bool((self.owner == np.arange(len(self.texts))).all())


def spread(total: int, count: int) -> NDArray[np.int64]:
    """`count` of `total` numbers, evenly spread."""
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def take(images: ImageSet, rows: Sequence[int] | NDArray[np.integer]) -> ImageSet:
    """The images of `rows`, in that order."""
    numbers = [int(row) for row in rows]
    digest = hashlib.sha256(f"{images.identity} {numbers}".encode()).hexdigest()
    keys = [images.keys[number] for number in numbers]
    return replace(images, keys=keys, load=lambda index: images.load(numbers[index]), identity=digest)


def labelled(images: ImageSet, raw: Sequence[str | int], names: Sequence[str] | None = None) -> Labelled:
    """Give every image its class.

    `raw` are names, or positions in `names`. Without `names` the classes are the distinct labels, sorted. Raises
    OpenVisionError for a label that is not among the names, and for a name that no image has.
    """
    if not raw:
        raise OpenVisionError(f"{images.name} holds no images: there is nothing to evaluate")
    if names is None:
        names = sorted({str(label) for label in raw})
        raw = [str(label) for label in raw]
    check_names(names, images.name)
    position = {name: index for index, name in enumerate(names)}
    labels = np.empty(len(raw), dtype=np.int64)
    for row, label in enumerate(raw):
        found = label if isinstance(label, int) else position.get(label)
        if found is None or not 0 <= found < len(names):
            raise OpenVisionError(
                f"{images.name}: image {images.keys[row]} has the label {label!r}, which is not one of the "
                f"{len(names)} class names; give the list of names that belongs to these images"
            )
        labels[row] = found
    _check_present(labels, names, images.name)
    return Labelled(images, labels, list(names))


def check_names(names: Sequence[str], source: str) -> None:
    """Raise OpenVisionError for an empty list of class names, an empty name, or a name listed twice."""
    if not names:
        raise OpenVisionError(f"{source}: the list of class names is empty")
    seen: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name.strip():
            raise OpenVisionError(f"{source}: class name {number} is empty")
        if name in seen:
            raise OpenVisionError(
                f"{source}: the class name {name!r} is listed twice (lines {seen[name]} and {number}); "
                "names must differ, or images of the two could never be told apart"
            )
        seen[name] = number


def _check_present(labels: NDArray[np.int64], names: Sequence[str], source: str) -> None:
    missing = np.setdiff1d(np.arange(len(names)), labels)
    if len(missing):
        raise OpenVisionError(
            f"{source}: {len(missing)} of {len(names)} classes have no image, {names[missing[0]]!r} first; "
            "add images or take the names out of the list"
        )


def folder_of_classes(folder: Path, names: Sequence[str] | None = None) -> Labelled:
    """Images of FOLDER/CLASS/, subfolders sorted by name.

    `names` may list the folders' own names in any order, or other names in the folders' order (ImageNet's wnids and
    words). Raises OpenVisionError for a list that holds some of the folders' names and others.
    """
    if not folder.is_dir():
        raise OpenVisionError(f"folder {folder} does not exist")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise OpenVisionError(f"{folder} has no subfolders: images are expected as {folder}/CLASS/image.jpg")
    files = [(index, path) for index, place in enumerate(classes) for path in _images_below(place)]
    found = {index for index, _ in files}
    empty = [place for index, place in enumerate(classes) if index not in found]
    if empty:
        raise OpenVisionError(f"class folder {empty[0]} has no images; add some or remove the folder")
    if names is not None and len(names) != len(classes):
        raise OpenVisionError(
            f"{folder} has {len(classes)} class folders but there are {len(names)} class names; they must pair up"
        )
    own = [place.name.replace("_", " ") for place in classes]
    words, naming = (own, "") if names is None else _paired(own, names, folder)
    if names is None:
        check_names(words, str(folder))
    labels = np.array([index for index, _ in files], dtype=np.int64)
    return Labelled(images_of_files([path for _, path in files], folder), labels, words, naming)


def _paired(folders: list[str], names: Sequence[str], source: Path) -> tuple[list[str], str]:
    """The name of each folder from a list as long as they are many, and how the two were paired."""
    given = {name.replace("_", " "): name for name in names}
    known = [folder for folder in folders if folder in given]
    if len(known) == len(folders):
        return [given[folder] for folder in folders], "by name: the list holds the names of the folders"
    if known:
        strange = next(name for key, name in given.items() if key not in folders)
        left = next(folder for folder in folders if folder not in given)
        raise OpenVisionError(
            f"{source}: {len(known)} of {len(names)} class names are names of its folders, but {strange!r} is not, and "
            f"folder {left!r} is not listed; list the name of every folder, or other names in the folders' order"
        )
    return list(names), f"by position: folder {folders[0]!r} is {names[0]!r}, folder {folders[-1]!r} is {names[-1]!r}"


def _images_below(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def images_of_files(paths: Sequence[Path], folder: Path) -> ImageSet:
    """Files as images; their names and sizes are the identity, their bytes are not read for it."""
    keys = [path.relative_to(folder).as_posix() for path in paths]
    digest = hashlib.sha256()
    for key, path in zip(keys, paths, strict=True):
        digest.update(f"{key} {path.stat().st_size}\n".encode())

    def load(index: int) -> NDArray[np.uint8]:
        try:
            return decode_image(paths[index].read_bytes())
        except OSError as error:
            raise BadSampleError("unreadable", f"{paths[index]}: {error.strerror}") from error

    return ImageSet(str(folder), keys, load, digest.hexdigest())


class ShardImages:
    """Images of a folder of shards with the texts and fields of their samples."""

    def __init__(self, folder: str | Path) -> None:
        """Open `folder`, local or a URL; raises OpenVisionError as `ShardDataset` does."""
        self.store: Store = open_store(folder)
        self.name = self.store.name
        manifest = open_manifest(self.store)
        self.identity = manifest.sha256()
        self.places: list[tuple[str, Entry]] = []
        number = 0
        for shard in manifest.shards:
            index = open_index(self.store, shard)
            for row in range(shard.samples):
                if number not in manifest.duplicates:
                    self.places.append((shard.name, index[row]))
                number += 1
        if not self.places:
            raise OpenVisionError(f"the shards of {self.name} hold no sample")
        self._fields, broken = _read_fields(self)
        self.bad: dict[int, BadSampleError] = dict(broken)
        """Samples whose json or texts cannot be used: their images raise this error, and evaluators count them."""
        self._broken_json = len(broken)

    def images(self) -> ImageSet:
        """The images, not decoded yet; call it when labels and texts have been read, which find bad samples."""
        identity = self.identity
        if len(self.bad) > self._broken_json:
            # Whether a text is bad depends on the field that is read.
            identity = hashlib.sha256(f"{identity} without {sorted(self.bad)}".encode()).hexdigest()
        return ImageSet(self.name, [entry.key for _, entry in self.places], self._load, identity)

    def _load(self, index: int) -> NDArray[np.uint8]:
        if index in self.bad:
            raise self.bad[index]
        shard, entry = self.places[index]
        extension = next(kind for kind in IMAGE_EXTENSIONS if kind in entry.spans)
        return decode_image(self._members(shard, entry, {extension})[extension])

    def values(self, name: str) -> list[object]:
        """A value of every sample: the member of that name as text, or a field of the json or of the captions.

        None where a sample has none.
        """
        return [self._value(index, name, self._fields[index]) for index in range(len(self.places))]

    def texts(self, name: str, lines: bool = False) -> list[list[str]]:
        """The texts of every sample under `name`; empty for samples that have none, or that this finds to be bad."""
        found = []
        for index, value in enumerate(self.values(name)):
            values = value if isinstance(value, list) else [value] if value is not None else []
            if all(isinstance(text, str) and is_utf8(text) for text in values):
                found.append(texts_of(value, lines))
            else:
                self.reject(index, name, "is not a text or a list of texts in UTF-8")
                found.append([])
        return found

    def reject(self, index: int, name: str, why: str) -> None:
        """Count a sample as bad for its field `name`."""
        key = self.places[index][1].key
        self.bad.setdefault(index, BadSampleError("bad_text", f"{self.name}: {key}: {name!r} {why}"))

    def _value(self, index: int, name: str, fields: JsonObject) -> object:
        shard, entry = self.places[index]
        if name in entry.spans and name not in ("json", CAPTIONS):
            return decode_text(self._members(shard, entry, {name})[name])[0].strip()
        return fields.get(name)

    def read_fields(self) -> tuple[list[JsonObject], dict[int, BadSampleError]]:
        """Fields of every sample's json and captions, none of one that is broken; and the errors of those."""
        found: list[JsonObject] = []
        broken: dict[int, BadSampleError] = {}
        for index, (shard, entry) in enumerate(self.places):
            fields: JsonObject = {}
            try:
                for data in self._members(shard, entry, {"json", CAPTIONS}).values():
                    fields |= parse_fields(data, entry.key, self.store.join(shard))
            except BadSampleError as error:
                fields, broken[index] = {}, error
            found.append(fields)
        return found, broken

    def _members(self, shard: str, entry: Entry, kinds: set[str]) -> dict[str, bytes]:
        spans = {kind: span for kind, span in entry.spans.items() if kind in kinds}
        if spans.keys() == {CAPTIONS}:
            # `read_members` wants a member of the tar itself: the smallest.
            small = min(entry.spans.keys() - {CAPTIONS}, key=lambda kind: entry.spans[kind][1])
            spans[small] = entry.spans[small]
        read = read_members(self.store, shard, replace(entry, spans=spans)) if spans else {}
        return {kind: data for kind, data in read.items() if kind in kinds}

    def __hash__(self) -> int:
        return hash((self.name, self.identity))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardImages) and (self.name, self.identity) == (other.name, other.identity)


@lru_cache(maxsize=4)
def _read_fields(shards: ShardImages) -> tuple[list[JsonObject], dict[int, BadSampleError]]:
    """Several evaluators read the same shards, one after the other and at every measurement of a run."""
    return shards.read_fields()


def labelled_shards(folder: str | Path, label: str = "name", names: Sequence[str] | None = None) -> Labelled:
    """Shards whose class is the json field `label`, or the member of that name ("txt", "cls").

    An integer is a position in `names`, which defaults to the lines of classnames.txt in the folder or in the one
    above it (the layout of clip_benchmark's data sets) where that exists, else to the distinct labels.
    """
    shards = ShardImages(folder)
    raw: list[str | int | None] = []
    for index, value in enumerate(shards.values(label)):
        found = _as_label(value, label)
        if found is None and index not in shards.bad:
            if value is None or value == "":
                raise OpenVisionError(
                    f"{shards.name}: sample {shards.places[index][1].key} has no {label!r}; name the json field or "
                    "member that is the class"
                )
            shards.reject(index, label, "is not a name or a number")
        raw.append(found)
    known = next((label for label in raw if label is not None), None)
    if known is None:
        raise OpenVisionError(f"{shards.bad[0]}, nor is that of any other sample; name the field that is the class")
    if names is None and isinstance(known, int):
        names = _names_beside(shards.store)
    # The label of a bad sample is never read, but it must be one.
    return labelled(shards.images(), [known if label is None else label for label in raw], names)


def _as_label(value: object, label: str) -> str | int | None:
    """A name or a number; None if the value is neither."""
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        return None
    if isinstance(value, str) and not is_utf8(value):
        return None
    return int(value) if label == "cls" and str(value).isdecimal() else value


def _names_beside(store: Store) -> list[str] | None:
    """Lines of classnames.txt in the folder of shards or in the one above it."""
    if store.exists("classnames.txt"):
        return store.read("classnames.txt").decode("utf-8").strip().splitlines()
    if "://" in store.name:
        return None
    above = Path(store.name).resolve().parent / "classnames.txt"
    return above.read_text(encoding="utf-8").strip().splitlines() if above.is_file() else None


def captioned_shards(folder: str | Path, text: str = "txt", lines: bool = False) -> Captioned:
    """Shards whose texts are the member or json field `text`, one or a list; `lines` takes every line as a text.

    Raises OpenVisionError naming the first image without a text.
    """
    shards = ShardImages(folder)
    texts = shards.texts(text, lines)
    # The text of a bad sample is never read, but there must be one.
    return captioned(shards.images(), [[""] if index in shards.bad else own for index, own in enumerate(texts)])


def texts_of(value: object, lines: bool = False) -> list[str]:
    """A text or a list of texts as a list without empty ones; `lines` takes every line as a text."""
    values = value if isinstance(value, list) else [value]
    found = [line for one in values if isinstance(one, str) for line in (one.splitlines() if lines else [one])]
    return [text.strip() for text in found if text.strip()]


def captioned(images: ImageSet, texts: Sequence[Sequence[str]]) -> Captioned:
    """Give every image its texts, a list each; raises OpenVisionError naming the first image without one."""
    if not len(images):
        raise OpenVisionError(f"{images.name} holds no images: there is nothing to evaluate")
    without = [key for key, own in zip(images.keys, texts, strict=True) if not own]
    if without:
        raise OpenVisionError(
            f"{images.name}: {len(without)} of {len(images)} images have no caption, {without[0]} first; "
            "retrieval needs one for each"
        )
    owner = np.repeat(np.arange(len(images)), [len(own) for own in texts]).astype(np.int64)
    return Captioned(images, [text for own in texts for text in own], owner)
