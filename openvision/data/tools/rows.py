"""Where the samples of `openvision data make` come from: a table, a folder of pictures, a Hugging Face dataset.

Every source gives `Row`s in an order and with identities of its own, so the same source makes the same keys. A row that
cannot be understood is given as a `BadSampleError` in its place, to be counted; a source that cannot be read at all is
an OpenVisionError. Nothing of a source is ever executed.
"""

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openvision.errors import OpenVisionError, require
from openvision.images.decode import BadSampleError

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif"}

# Columns looked for, in this order, when none is named.
IMAGE_COLUMNS = ("image", "image_path", "path", "file", "file_name", "filename", "filepath", "file_path", "img")
ALT_COLUMNS = ("alt", "alt_text", "text", "caption", "captions", "title", "label", "class", "org_caption")
SYNTHETIC_COLUMNS = ("synthetic", "synthetic_caption", "re_caption", "recaption")

# Where the csv module is told to put the fields of a row that has more than the header; no column is called so.
_TOO_MANY = "\0too many"


@dataclass(frozen=True)
class Row:
    """One picture with its texts, before it is read."""

    place: str
    """For messages: file and line, path, or number of the row."""
    identity: str | None
    """What the key is made of; None takes the bytes of the picture."""
    picture: Path | bytes
    alts: list[str]
    synthetic: str | list[str] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


Rows = Iterator[Row | BadSampleError]


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; None looks for the usual ones."""

    image: str | None = None
    alt: str | None = None
    synthetic: str | None = None

    def found_in(self, names: Sequence[str], source: str) -> "Columns":
        """The same with every name that was left open filled in; raises OpenVisionError for one that is not there."""
        return Columns(
            _choose(self.image, IMAGE_COLUMNS, names, source, "--image-column"),
            _choose(self.alt, ALT_COLUMNS, names, source, "--alt-column"),
            _choose(self.synthetic, SYNTHETIC_COLUMNS, names, source, None),
        )


def _choose(
    named: str | None, usual: Sequence[str], names: Sequence[str], source: str, needed_as: str | None
) -> str | None:
    """The column named, or the first usual one; `needed_as` is the option to name it by when it cannot be missing."""
    known = ", ".join(map(str, names))
    if named is not None:
        if named not in names:
            raise OpenVisionError(f"{source} has no column {named!r}; its columns are: {known}")
        return named
    by_lower = {str(name).lower(): name for name in reversed(names)}
    found = next((by_lower[name] for name in usual if name in by_lower), None)
    if found is None and needed_as is not None:
        raise OpenVisionError(f"{source}: name the column to read with {needed_as}; its columns are: {known}")
    return found


def table_rows(path: Path, columns: Columns) -> Rows:
    """Rows of a .csv, .tsv or .jsonl file; pictures are paths, relative to the file's folder."""
    readers: dict[str, Callable[[Path], Iterator[Any]]] = {
        ".csv": lambda file: _read_csv(file, ","),
        ".tsv": lambda file: _read_csv(file, "\t"),
        ".jsonl": _read_json_lines,
    }
    if path.suffix.lower() not in readers:
        raise OpenVisionError(f"table {path} must end in {', '.join(readers)}")
    if not path.is_file():
        raise OpenVisionError(f"table {path} does not exist")
    chosen: Columns | None = None
    for number, record in enumerate(readers[path.suffix.lower()](path), start=1):
        if isinstance(record, BadSampleError):
            yield record
            continue
        chosen = chosen or columns.found_in(list(record), str(path))
        yield _table_row(record, chosen, path, f"{path.name}, row {number}")


def _table_row(record: dict[str, Any], columns: Columns, path: Path, place: str) -> Row | BadSampleError:
    name = record.get(str(columns.image))
    if not isinstance(name, str) or not name.strip():
        return BadSampleError("no_picture", f"{place}: column {columns.image!r} is empty")
    identity = Path(os.path.normpath(name.strip())).as_posix()
    row = _row(record, columns, place, identity, path.parent / name.strip())
    row.meta.setdefault("file", identity)
    return row


def _row(record: dict[str, Any], columns: Columns, place: str, identity: str | None, picture: Path | bytes) -> Row:
    """A row of a table or data set; its other columns go into the json when they are plain values."""
    # A column without a name is the row number that some programs put first.
    used = {columns.image, columns.alt, columns.synthetic, "synthetic", ""}
    meta = {str(name): value for name, value in record.items() if name not in used and _plain(value)}
    synthetic = _texts(record.get(columns.synthetic)) if columns.synthetic else []
    whole = synthetic[0] if len(synthetic) == 1 else synthetic or None
    return Row(place, identity, picture, _texts(record.get(str(columns.alt))), whole, meta)


def _texts(value: Any) -> list[str]:
    """A field as texts: one, several in a list, none when it is empty."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [text for text in (str(one).strip() for one in values if not _empty(one)) if text]


def _empty(value: Any) -> bool:
    # Tables that went through pandas say "not a number" where there is no text.
    return value is None or (isinstance(value, float) and math.isnan(value))


def _plain(value: Any) -> bool:
    return isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value))


def _read_csv(path: Path, delimiter: str) -> Iterator[dict[str, Any] | BadSampleError]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, restkey=_TOO_MANY)
            for record in reader:
                if _TOO_MANY in record or None in record.values():
                    yield BadSampleError("bad_row", f"{path}, line {reader.line_num}: not as many fields as columns")
                else:
                    yield record
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OpenVisionError(f"table {path} cannot be read: {error}; it must be a table in UTF-8") from error


def _read_json_lines(path: Path) -> Iterator[dict[str, Any] | BadSampleError]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_record(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise OpenVisionError(f"table {path} cannot be read: {error}; it must be a table in UTF-8") from error


def _json_record(line: str, place: str) -> dict[str, Any] | BadSampleError:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadSampleError("bad_row", f"{place} is not JSON: {error}")
    return record if isinstance(record, dict) else BadSampleError("bad_row", f"{place} is not a JSON object")


def folder_rows(folder: Path) -> Rows:
    """Pictures of a folder with its subfolders, in order of their paths.

    The text is that of the .txt file of the same name, or else the name of the subfolder, underscores read as spaces.
    """
    if not folder.is_dir():
        raise OpenVisionError(f"folder {folder} does not exist")
    paths = sorted(path for path in _visible(folder) if path.suffix.lower() in PICTURE_SUFFIXES)
    if not paths:
        raise OpenVisionError(f"folder {folder} holds no picture; known are {', '.join(sorted(PICTURE_SUFFIXES))}")
    for path in paths:
        relative = path.relative_to(folder)
        try:
            text = _text_beside(path, relative)
        except (OSError, UnicodeDecodeError) as error:
            yield BadSampleError("bad_text_file", f"{path.with_suffix('.txt')} cannot be read: {error}")
            continue
        yield Row(str(path), relative.as_posix(), path, [text] if text else [], None, {"file": relative.as_posix()})


def _visible(folder: Path) -> Iterable[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in files if not name.startswith("."))


def _text_beside(path: Path, relative: Path) -> str:
    file = path.with_suffix(".txt")
    if file.is_file():
        return file.read_text(encoding="utf-8-sig").strip()
    return relative.parent.name.replace("_", " ").strip()


def hugging_face_rows(source: str, split: str, columns: Columns) -> Rows:
    """Rows of a data set saved on disk by the `datasets` library, or of one it knows by name."""
    library = require("datasets", extra="datasets")
    data = _open_hugging_face(library, source, split)
    chosen = columns.found_in(data.column_names, f"data set {source}")
    if isinstance(data.features[chosen.image], library.Image):
        # The files as they are: decoded ones would have to be compressed again.
        data = data.cast_column(chosen.image, library.Image(decode=False))
    labels = {name: feature for name, feature in data.features.items() if isinstance(feature, library.ClassLabel)}
    for number, record in enumerate(data):
        named = {name: _class_name(labels.get(name), value) for name, value in record.items()}
        place = f"{source}, row {number}"
        picture = _picture_of(named[str(chosen.image)])
        if picture is None:
            yield BadSampleError("no_picture", f"{place}: column {chosen.image!r} holds no picture")
        else:
            yield _row(named, chosen, place, None, picture)


def _open_hugging_face(library: Any, source: str, split: str) -> Any:
    try:
        data = library.load_from_disk(source) if Path(source).exists() else library.load_dataset(source)
    except Exception as error:  # The library raises many kinds, some of them its own.
        raise OpenVisionError(
            f"data set {source!r} cannot be opened: {error}; give a folder written by save_to_disk or a name on the Hub"
        ) from error
    # Saved as one or with its splits.
    if not isinstance(data, library.DatasetDict):
        return data
    if split not in data:
        raise OpenVisionError(f"data set {source!r} has no split {split!r}; its splits are: {', '.join(data)}")
    return data[split]


def _class_name(feature: Any, value: Any) -> Any:
    return feature.int2str(value) if feature is not None and isinstance(value, int) and value >= 0 else value


def _picture_of(value: Any) -> Path | bytes | None:
    """What an image column holds: bytes, a path, or both in a dictionary."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    return Path(value) if isinstance(value, str) and value else None
