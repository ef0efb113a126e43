"""Readers for `openvision data make`: CSV, TSV and JSON-lines tables, image folders, Hugging Face datasets.

Every reader yields `Row`s in a fixed order and with stable identities, so the same source gives the same keys. A
malformed row is yielded as a `BadSampleError`, to be counted; an unreadable source raises OpenVisionError. Nothing in a
source is ever executed.
"""

import csv
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from openvision.errors import OpenVisionError, require
from openvision.files import JsonObject
from openvision.images.decode import IMAGE_SUFFIXES, BadSampleError
from openvision.untrusted import decode_text, load_json

# Default columns: the first one that the table has.
IMAGE_COLUMNS = ("image", "image_path", "path", "file", "file_name", "filename", "filepath", "file_path", "img")
ALT_COLUMNS = ("alt", "alt_text", "text", "caption", "captions", "title", "label", "class", "org_caption")
SYNTHETIC_COLUMNS = ("synthetic", "synthetic_caption", "re_caption", "recaption")

# Key under which csv.DictReader collects surplus fields; no column has this name.
_TOO_MANY = "\0too many"


@dataclass(frozen=True)
class Row:
    """One image, not read yet, with its texts."""

    place: str
    """File and line, path, or row number, for messages."""
    identity: str | None
    """Source of the key; None derives it from the bytes of the image."""
    image: Path | bytes
    alts: list[str]
    synthetic: str | list[str] | None = None
    meta: JsonObject = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    """What is suspicious of its texts although they are used (verify.py)."""


Rows = Iterator[Row | BadSampleError]


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; None stands for the default names."""

    image: str | None = None
    alt: str | None = None
    synthetic: str | None = None

    def resolved(self, names: Sequence[str], source: str) -> "Columns":
        """Fill in default names from the columns `names`; raises OpenVisionError for a missing column."""
        return Columns(
            _choose(self.image, IMAGE_COLUMNS, names, source, "--image-column"),
            _choose(self.alt, ALT_COLUMNS, names, source, "--alt-column"),
            _choose(self.synthetic, SYNTHETIC_COLUMNS, names, source, None),
        )


def _choose(
    named: str | None, defaults: Sequence[str], names: Sequence[str], source: str, option: str | None
) -> str | None:
    """The column `named`, or the first default one; `option` names a column that must not be missing."""
    known = ", ".join(map(str, names))
    if named is not None:
        if named not in names:
            raise OpenVisionError(f"{source} has no column {named!r}; its columns are: {known}")
        return named
    by_lower = {str(name).lower(): name for name in reversed(names)}
    found = next((by_lower[name] for name in defaults if name in by_lower), None)
    if found is None and option is not None:
        if any(Path(str(name)).suffix.lower() in IMAGE_SUFFIXES for name in names):
            raise OpenVisionError(
                f"{source} has no line of column names: its first line is {known}; write one above it, e.g. image,text"
            )
        raise OpenVisionError(f"{source}: name the column to read with {option}; its columns are: {known}")
    return found


def table_rows(path: Path, columns: Columns, delimiter: str | None = None) -> Rows:
    """Rows of a .csv, .tsv or .jsonl file, whose image column holds paths relative to the file's folder.

    Without a `delimiter`, that of a .csv or .tsv is found in its first line.
    """
    readers: dict[str, Callable[[Path], Iterator[JsonObject | BadSampleError]]] = {
        ".csv": lambda file: _read_csv(file, delimiter or _delimiter_of(file, columns)),
        ".tsv": lambda file: _read_csv(file, delimiter or _delimiter_of(file, columns)),
        ".jsonl": _read_json_lines,
    }
    if path.suffix.lower() not in readers:
        raise OpenVisionError(f"table {path} has an unknown format; it must end in {', '.join(readers)}")
    if not path.is_file():
        raise OpenVisionError(f"table {path} does not exist; check the path")
    chosen: Columns | None = None
    for number, record in enumerate(readers[path.suffix.lower()](path), start=1):
        if isinstance(record, BadSampleError):
            yield record
            continue
        chosen = chosen or columns.resolved(list(record), str(path))
        yield _table_row(record, chosen, path, f"{path.name}, row {number}")


def _table_row(record: JsonObject, columns: Columns, path: Path, place: str) -> Row | BadSampleError:
    name = record.get(str(columns.image))
    if not isinstance(name, str) or not name.strip():
        return BadSampleError("no_image", f"{place}: column {columns.image!r} is empty")
    identity = Path(os.path.normpath(name.strip())).as_posix()
    row = _row(record, columns, place, identity, path.parent / name.strip())
    if isinstance(row, Row):
        row.meta.setdefault("file", identity)
    return row


def _row(
    record: JsonObject, columns: Columns, place: str, identity: str | None, image: Path | bytes
) -> Row | BadSampleError:
    """A row of a table or dataset; scalar values of its other columns go into the json."""
    # A column without a name is the row index that some programs write first.
    used = {columns.image, columns.alt, columns.synthetic, "synthetic", ""}
    meta = {str(name): value for name, value in record.items() if name not in used and _is_scalar(value)}
    try:
        alts = _texts(record.get(str(columns.alt)), columns.alt)
        synthetic = _texts(record.get(columns.synthetic), columns.synthetic) if columns.synthetic else []
    except BadSampleError as bad:
        return BadSampleError(bad.reason, f"{place}: {bad}")
    whole = synthetic[0] if len(synthetic) == 1 else synthetic or None
    return Row(place, identity, image, alts, whole, meta)


def _texts(value: object, column: str | None) -> list[str]:
    """The texts of a field, which may be one text, a list of texts, or empty; raises BadSampleError for others."""
    values = [one for one in (value if isinstance(value, (list, tuple)) else [value]) if not _is_missing(one)]
    if not all(map(_is_scalar, values)):
        raise BadSampleError("bad_text", f"column {column!r} holds neither a text nor a list of texts")
    return [text for text in (str(one).strip() for one in values) if text]


def _is_missing(value: object) -> bool:
    # pandas writes NaN where there is no text.
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_scalar(value: object) -> bool:
    return isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value))


_DELIMITERS = (",", "\t", ";", "|")


def _delimiter_of(path: Path, columns: Columns) -> str:
    """The delimiter that splits the header into the columns to read, or else into the most columns."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
        headers = {delimiter: next(csv.reader([header], delimiter=delimiter), []) for delimiter in _DELIMITERS}
    # The reader of the whole file says what is wrong with it.
    except (OSError, UnicodeDecodeError, csv.Error):
        return _DELIMITERS[0]
    wanted = [(columns.image,) if columns.image else IMAGE_COLUMNS, (columns.alt,) if columns.alt else ALT_COLUMNS]

    def fits(delimiter: str) -> tuple[int, int]:
        names = {name.lower() for name in headers[delimiter]}
        return sum(any(name.lower() in names for name in names_of) for names_of in wanted), len(names)

    return max(_DELIMITERS, key=fits)


def _read_csv(path: Path, delimiter: str) -> Iterator[JsonObject | BadSampleError]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, restkey=_TOO_MANY)
            for record in reader:
                if _TOO_MANY in record or None in record.values():
                    yield BadSampleError("bad_row", f"{path}, line {reader.line_num}: too few or too many fields")
                else:
                    yield record
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OpenVisionError(f"table {path} cannot be read: {error}; save it as UTF-8 text") from error


def _read_json_lines(path: Path) -> Iterator[JsonObject | BadSampleError]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_record(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise OpenVisionError(f"table {path} cannot be read: {error}; save it as UTF-8 text") from error


def _json_record(line: str, place: str) -> JsonObject | BadSampleError:
    try:
        record = load_json(line)
    except ValueError as error:
        return BadSampleError("bad_row", f"{place} is not JSON: {error}")
    return record if isinstance(record, dict) else BadSampleError("bad_row", f"{place} is not a JSON object")


def folder_rows(folder: Path, not_taken: Counter[str] | None = None) -> Rows:
    """Images of a folder and its subfolders, sorted by path; files that are not taken are counted by their suffix.

    The alt-text is the .txt file of the same name, or else the name of the subfolder with spaces for underscores.
    """
    if not folder.is_dir():
        raise OpenVisionError(f"folder {folder} does not exist; check the path")
    files = list(_visible(folder))
    paths = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    used = {*paths, *(texts[path.with_suffix("")] for path in paths if path.with_suffix("") in texts)}
    others = Counter(path.suffix.lower() or "no suffix" for path in files if path not in used)
    if not_taken is not None:
        not_taken.update(others)
    if not paths:
        found = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common(5)) or "none"
        raise OpenVisionError(
            f"folder {folder} has no image (its files: {found}); supported are {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    for path in paths:
        relative = path.relative_to(folder)
        file = texts.get(path.with_suffix(""))
        try:
            text, is_plain = decode_text(file.read_bytes()) if file else (relative.parent.name.replace("_", " "), True)
        except OSError as error:
            yield BadSampleError("bad_text_file", f"{file} cannot be read: {error}")
            continue
        meta: JsonObject = {"file": relative.as_posix()}
        alts = [text.strip()] if text.strip() else []
        yield Row(str(path), relative.as_posix(), path, alts, None, meta, () if is_plain else ("not_utf8",))


def _visible(folder: Path) -> Iterable[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in files if not name.startswith("."))


class _ClassLabel(Protocol):
    """The part of `datasets.ClassLabel` that is used here."""

    def int2str(self, values: int) -> str: ...


class _Dataset(Protocol):
    """The part of `datasets.Dataset` that is used here."""

    column_names: list[str]
    features: dict[str, object]

    def cast_column(self, column: str, feature: object) -> "_Dataset": ...
    def __iter__(self) -> Iterator[JsonObject]: ...


def hugging_face_rows(source: str, split: str, columns: Columns) -> Rows:
    """Rows of a Hugging Face dataset: a folder written by `save_to_disk`, or a name on the Hub."""
    library = require("datasets", extra="datasets")
    dataset = _open_hugging_face(source, split)
    chosen = columns.resolved(dataset.column_names, f"dataset {source}")
    image_column = str(chosen.image)
    if isinstance(dataset.features[image_column], library.Image):
        # The encoded files: decoded images would have to be compressed again.
        dataset = dataset.cast_column(image_column, library.Image(decode=False))
    classes = {name: feature for name, feature in dataset.features.items() if isinstance(feature, library.ClassLabel)}
    labels = cast(dict[str, _ClassLabel], classes)
    for number, item in enumerate(dataset):
        # -1 stands for an unknown label.
        known = {name: item[name] for name in labels if isinstance(item[name], int) and item[name] >= 0}
        record = item | {name: labels[name].int2str(value) for name, value in known.items()}
        place = f"{source}, row {number}"
        image = _image_of(record[image_column])
        if image is None:
            yield BadSampleError("no_image", f"{place}: column {image_column!r} is empty or holds no image")
        else:
            yield _row(record, chosen, place, None, image)


def _open_hugging_face(source: str, split: str) -> _Dataset:
    library = require("datasets", extra="datasets")
    try:
        loaded = library.load_from_disk(source) if Path(source).exists() else library.load_dataset(source)
    except Exception as error:  # The library raises many kinds, some of them its own.
        raise OpenVisionError(
            f"dataset {source!r} cannot be opened: {error}; give a folder written by save_to_disk or a name on the Hub"
        ) from error
    # A single split, or a dictionary of splits.
    if not isinstance(loaded, library.DatasetDict):
        return loaded
    if split not in loaded:
        raise OpenVisionError(f"dataset {source!r} has no split {split!r}; its splits are: {', '.join(loaded)}")
    return loaded[split]


def _image_of(value: object) -> Path | bytes | None:
    """The value of an image column: bytes, a path, or a dictionary with either."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    return Path(value) if isinstance(value, str) and value else None
