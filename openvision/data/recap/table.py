"""Scan of the recaption table (parquet): rows are looked up in the index, matches spilled for their group of shards.

A spill file is an Arrow file with one record batch for each group, so that a group later reads its own batches only.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from openvision.data.recap.index import JOIN_FIELDS, digest, identity, save_array
from openvision.errors import OpenVisionError, require
from openvision.files import atomic_write_text

if TYPE_CHECKING:
    import pyarrow

# Rows in memory at once, unless a single row group has more.
_UNIT_ROWS = 250_000
# Column that helps to choose among several rows for one image, if the table has it.
ORIGINAL_CAPTION = "org_caption"
EXAMPLES = 5


@dataclass(frozen=True)
class Unit:
    """Unit of work: row groups `first` to `last` (exclusive) of one parquet file."""

    path: Path
    first: int
    last: int


def table_units(table: Path, needed: list[str]) -> list[Unit]:
    """The units of a table, which is a parquet file or a folder of them.

    Raises OpenVisionError when there is none, when a file is not parquet, or when it lacks a needed column.
    """
    if not table.exists():
        raise OpenVisionError(f"table {table} does not exist; name a parquet file or a folder of them")
    files = [table] if table.is_file() else sorted(table.rglob("*.parquet"))
    if not files:
        raise OpenVisionError(f"table {table} holds no .parquet file; name a parquet file or a folder of them")
    units = [unit for path in files for unit in _file_units(path, needed)]
    if not units:
        raise OpenVisionError(f"table {table} holds no row; download it again")
    return units


def _file_units(path: Path, needed: list[str]) -> list[Unit]:
    parquet, arrow = require("pyarrow.parquet", extra="parquet"), require("pyarrow", extra="parquet")
    try:
        metadata = parquet.read_metadata(path)
        columns = metadata.schema.to_arrow_schema().names
    except (arrow.ArrowException, OSError) as error:
        raise OpenVisionError(f"{path} is not a parquet file: {error}; download it again") from error
    missing = [column for column in needed if column not in columns]
    if missing:
        raise OpenVisionError(
            f"{path} has no column {missing[0]!r}; its columns are {', '.join(columns)}: choose another join key with "
            "--by, or name the caption columns with --caption"
        )
    units, first, rows = [], 0, 0
    for group in range(metadata.num_row_groups):
        if rows and rows + metadata.row_group(group).num_rows > _UNIT_ROWS:
            units.append(Unit(path, first, group))
            first, rows = group, 0
        rows += metadata.row_group(group).num_rows
    return [*units, Unit(path, first, metadata.num_row_groups)] if rows else units


@dataclass(frozen=True)
class Scan:
    """Parameters of the scan, the same for every unit."""

    by: str
    captions: tuple[str, ...]
    """Columns; a row whose first is empty is dropped."""
    index: Path
    group_shards: int
    groups: int
    spill: Path


def scan_unit(scan: Scan, number: int, unit: Unit) -> None:
    """Look up the rows of unit `number`; write its spill file, its hashes and, last, its counts."""
    stem = scan.spill / f"{number:06d}"
    table = _read(scan, unit)
    counts: Counter[str] = Counter(rows=len(table))
    hashes = _digests(table, "hash") if "sha256" in table.column_names else []
    save_array(stem.with_suffix(".hashes.npy"), np.sort(np.array([h for h in hashes if h is not None], np.uint64)))
    rows, digests = _usable(table, scan, counts)
    rows, places, missing = _look_up(rows, digests, scan, counts)
    _write_spill(table, rows, places, scan, number, stem.with_suffix(".arrow"))
    column = "url" if "url" in table.column_names else JOIN_FIELDS[scan.by]
    examples = table[column].take(missing[:EXAMPLES]).to_pylist()
    report = {"counts": counts, "examples": {"not_on_disk": examples}}
    atomic_write_text(stem.with_suffix(".json"), json.dumps(report))


def _read(scan: Scan, unit: Unit) -> "pyarrow.Table":
    arrow, parquet = require("pyarrow", extra="parquet"), require("pyarrow.parquet", extra="parquet")
    try:
        with parquet.ParquetFile(unit.path) as file:
            present = file.schema_arrow.names
            wanted = dict.fromkeys([*JOIN_FIELDS.values(), *scan.captions, ORIGINAL_CAPTION])
            columns = [column for column in wanted if column in present]
            table = file.read_row_groups(list(range(unit.first, unit.last)), columns=columns)
        # Large strings: the texts of a unit may exceed 32-bit offsets.
        return table.select(columns).cast(arrow.schema([(column, arrow.large_string()) for column in columns]))
    except (arrow.ArrowException, OSError) as error:
        raise OpenVisionError(f"{unit.path} cannot be read: {error}; download it again") from error


def _digests(table: "pyarrow.Table", by: str) -> list[int | None]:
    values = (identity(value, by) for value in table[JOIN_FIELDS[by]].to_pylist())
    return [None if value is None else digest(value, by) for value in values]


def _usable(table: "pyarrow.Table", scan: Scan, counts: Counter[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a join value and a caption, and their digests."""
    captions = table[scan.captions[0]].to_pylist()
    rows, digests = [], []
    for row, (value, caption) in enumerate(zip(_digests(table, scan.by), captions, strict=True)):
        if value is None:
            counts["no_join_value"] += 1
        elif caption is None or not caption.strip():
            counts["empty_caption"] += 1
        else:
            rows.append(row)
            digests.append(value)
    return np.array(rows, dtype=np.int64), np.array(digests, dtype=np.uint64)


def _look_up(
    rows: np.ndarray, digests: np.ndarray, scan: Scan, counts: Counter[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matched rows, one entry for each place; their places; and the rows without a match."""
    if scan.by == "hash":
        # Placeholder images: the product of their rows and their samples would exceed all the rest.
        placeholder = np.isin(digests, np.load(scan.index / "placeholders.npy")[:, 0])
        counts["placeholder"] += int(placeholder.sum())
        rows, digests = rows[~placeholder], digests[~placeholder]
    keys = np.load(scan.index / "all.digests.npy", mmap_mode="r")
    # Sorted queries read the file once from front to back.
    order = np.argsort(digests, kind="stable")
    rows, digests = rows[order], digests[order]
    left, right = np.searchsorted(keys, digests, "left"), np.searchsorted(keys, digests, "right")
    found = right - left
    counts["not_on_disk"] += int((found == 0).sum())
    counts["on_disk"] += int((found > 0).sum())
    starts = np.repeat(left - (np.cumsum(found) - found), found)
    places = np.load(scan.index / "all.places.npy", mmap_mode="r")[starts + np.arange(found.sum())]
    return np.repeat(rows, found), places, np.sort(rows[found == 0])


def _write_spill(
    table: "pyarrow.Table", rows: np.ndarray, places: np.ndarray, scan: Scan, number: int, path: Path
) -> None:
    arrow = require("pyarrow", extra="parquet")
    order = np.lexsort((rows, places))
    rows, places = rows[order], places[order]
    spilled = table.take(rows).combine_chunks()
    spilled = spilled.append_column("place", arrow.array(places))
    spilled = spilled.append_column("row", arrow.array((number << 32) + rows))
    groups = (places >> np.uint64(32)) // np.uint64(scan.group_shards)
    ends = np.searchsorted(groups, np.arange(scan.groups, dtype=np.uint64), "right")
    temporary = path.with_suffix(".tmp")
    options = arrow.ipc.IpcWriteOptions(compression="zstd")
    with arrow.OSFile(str(temporary), "wb") as sink, arrow.ipc.new_file(sink, spilled.schema, options=options) as file:
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            batch = arrow.Table.from_batches(spilled.slice(start, end - start).to_batches(), spilled.schema)
            batches = batch.combine_chunks().to_batches()
            file.write_batch(batches[0] if batches else arrow.RecordBatch.from_pylist([], spilled.schema))
    os.replace(temporary, path)


def spilled_rows(spill: Path, units: int, group: int) -> tuple[np.ndarray, "pyarrow.Table"]:
    """The spilled rows of a group of shards: places, sorted, and the rows as an Arrow table."""
    arrow = require("pyarrow", extra="parquet")
    batches = []
    for number in range(units):
        with arrow.memory_map(str(spill / f"{number:06d}.arrow")) as file:
            batches.append(arrow.ipc.open_file(file).get_batch(group))
    # Files of a table may differ in their columns; missing ones are null.
    tables = [arrow.Table.from_batches([batch]) for batch in batches]
    table = arrow.concat_tables(tables, promote_options="default")
    places, rows = table["place"].to_numpy(), table["row"].to_numpy()
    order = np.lexsort((rows, places))
    return places[order], table.take(order)
