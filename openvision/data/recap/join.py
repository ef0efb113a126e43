"""Join the recaption table of Recap-DataComp-1B with the shards that img2dataset wrote: an external, resumable join.

The table has 1.24 billion rows in 3,550 parquet files (710 GB of text), the images are in more than 100,000 tars, and
the two are in unrelated order. So memory holds one unit of work, and all text is read once, sequentially:

1. Index (index.py). The join values of all samples become sorted arrays on disk, 24 bytes a sample: for 1.24 billion
   samples 30 GB of files, searched in place. Sorting the captions instead would write all text twice.
2. Scan (table.py). The table is read once, a few row groups at a time. A row is looked up by the 64-bit digest of its
   hash, key or url; matches are spilled to disk for their group of shards.
3. Join (write.py). Group by group and shard by shard: whole values are compared, one of several rows for an image is
   chosen, the captions are written.

Each unit of a step ends with a marker file, written last and atomically: after kill -9 the same command resumes and
redoes at most one unit per process. Units are independent, so processes share them.

The hash is the most reliable join key: keys number a download, and another download gives them to other images; urls
lose some rows to redirects. An image whose hash occurs often is the placeholder of some site, and its caption describes
that: such images and rows are dropped and listed.
"""

import hashlib
import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVarTuple

import numpy as np

from openvision.data.recap.index import (
    JOIN_FIELDS,
    index_group,
    merge_runs,
    repeated,
    save_array,
    shard_names,
)
from openvision.data.recap.report import make_report
from openvision.data.recap.table import Scan, Unit, scan_unit, spilled_rows, table_units
from openvision.data.recap.write import JoinSpec, Mode, write_shard
from openvision.data.shards.manifest import index_folder
from openvision.data.shards.selection import check_flat
from openvision.data.shards.store import LocalStore, Store, open_store
from openvision.data.workers import end_with_parent
from openvision.errors import OpenVisionError, require
from openvision.files import JsonObject, atomic_write_text, make_folder

Arguments = TypeVarTuple("Arguments")

# Shards joined at a time: with 10,000 samples each about 600 MB of captions.
GROUP_SHARDS = 128
WORK_NAME = ".recap"
Progress = Callable[[str, int, int], None]
"""Called with the step, the number of units done and their total."""


@dataclass(frozen=True)
class RecapOptions:
    """Options of the join."""

    by: str = "hash"
    """"hash", "key" or "url"."""
    captions: tuple[tuple[str, str], ...] = (("re_caption", "re_caption"), ("org_caption", "org_caption"))
    """Columns of the table and the names under which they are stored. Rows whose first one is empty are dropped."""
    placeholders: int = 10
    """An image whose hash occurs this often, on disk or in the table, is a placeholder."""
    output: Path | None = None
    """Folder for new shards; None writes captions tars beside the shards."""
    work: Path | None = None
    """Folder for intermediate files, kept; None uses one inside the output or the shards, removed at the end."""
    dry_run: bool = False
    """Write only the report (and the work folder, if named)."""
    processes: int = 1
    group_shards: int = GROUP_SHARDS

    @property
    def mode(self) -> Mode:
        """What is written."""
        return "dry-run" if self.dry_run else "shards" if self.output else "sidecar"


def recap(
    shards: str | Path, table: Path, options: RecapOptions, progress: Progress = lambda step, done, of: None
) -> JsonObject:
    """Join the folder `shards` with `table` and return the report.

    The same call resumes a join that was stopped. Raises OpenVisionError for input that is missing or does not match
    the options, and for output that would be overwritten.
    """
    require("pyarrow", extra="parquet")
    _check(shards, options)
    store = open_store(shards)
    names = shard_names(store)
    if options.output:
        check_flat(names)
    units = table_units(table, [JOIN_FIELDS[options.by], *(column for column, _ in options.captions)])
    with tempfile.TemporaryDirectory(prefix="openvision-recap-") as scratch:
        work = _work_folder(store, options, Path(scratch))
        _claim(work, _settings(store, names, table, units, options), options)
        counts = _Join(store, names, units, options, work, progress).run()
        if options.mode == "shards" and options.output and any(options.output.glob("*.tar")):
            index_folder(LocalStore(options.output))
        if not options.work:
            shutil.rmtree(work)
    inputs = {"shards": store.name, "table": str(table), "by": options.by, "mode": options.mode}
    return inputs | counts


def _check(shards: str | Path, options: RecapOptions) -> None:
    if options.by not in JOIN_FIELDS:
        raise OpenVisionError(f"unknown join key {options.by!r}; use one of {', '.join(JOIN_FIELDS)}")
    names = [name for _, name in options.captions]
    if not names or len(set(names)) < len(names):
        raise OpenVisionError(f"captions {', '.join(names) or '(none)'}: name at least one, and each once")
    if options.placeholders < 2:
        raise OpenVisionError(f"placeholders is {options.placeholders}: every image occurs once; give 2 or more")
    if options.output and Path(shards).resolve() == options.output.resolve():
        raise OpenVisionError(f"output {options.output} is the folder of the shards; choose another, or leave it out")


def _work_folder(store: Store, options: RecapOptions, scratch: Path) -> Path:
    if options.work:
        return options.work
    if options.dry_run:
        return scratch / "work"
    if options.output:
        return options.output / WORK_NAME
    if not isinstance(store, LocalStore):
        raise OpenVisionError(f"{store.name} is not a local folder; name a folder for intermediate files with --work")
    return store.folder / WORK_NAME


def _settings(store: Store, names: list[str], table: Path, units: list[Unit], options: RecapOptions) -> JsonObject:
    """Identity of a work folder: inputs by name and size, and the options that its content depends on."""
    sizes = store.sizes(".tar")
    files = {str(unit.path): unit.path.stat().st_size for unit in units}
    listing = json.dumps([[(name, sizes[name]) for name in names], sorted(files.items())])
    return {
        "shards": store.name,
        "table": str(table),
        "by": options.by,
        "captions": [list(pair) for pair in options.captions],
        "placeholders": options.placeholders,
        "group_shards": options.group_shards,
        "files": hashlib.sha256(listing.encode()).hexdigest(),
    }


def _claim(work: Path, settings: JsonObject, options: RecapOptions) -> None:
    """Take or resume the work folder; raises OpenVisionError when it or the output belongs to another join."""
    path = work / "settings.json"
    earlier = _read_settings(path) if path.exists() else {}
    for name, value in settings.items():
        if earlier and earlier.get(name) != value:
            raise OpenVisionError(
                f"{work} holds a join begun with {name} = {earlier.get(name)!r}, not {value!r}; finish that one with "
                "its command, or remove the folder"
            )
    output = str(options.output.resolve()) if options.output else None
    if options.output and not options.dry_run:
        ours = earlier.get("output") == output
        if not ours and options.output.is_dir() and any(options.output.iterdir()):
            raise OpenVisionError(f"output folder {options.output} is not empty; choose another or empty it")
        make_folder(options.output)
    # A dry run with a work folder claims no output: the real run after it does.
    claimed = earlier.get("output") if options.dry_run else output
    make_folder(work)
    atomic_write_text(path, json.dumps(settings | {"output": claimed}, indent=2) + "\n")


def _read_settings(path: Path) -> JsonObject:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OpenVisionError(f"{path} cannot be read ({error}); remove the folder {path.parent}") from error


class _Join:
    """The three steps; each skips units that have their marker file."""

    def __init__(
        self, store: Store, names: list[str], units: list[Unit], options: RecapOptions, work: Path, progress: Progress
    ) -> None:
        self.store, self.names, self.units = store, names, units
        self.options, self.progress = options, progress
        self.index, self.spill = make_folder(work / "index"), make_folder(work / "spill")
        # The markers of a dry run do not count for a run that writes.
        self.joined = make_folder(work / f"joined-{options.mode}")
        size = options.group_shards
        self.groups = [names[first : first + size] for first in range(0, len(names), size)]

    def run(self) -> JsonObject:
        """Do all units that are left and return the counts."""
        self._index()
        self._scan()
        self._join()
        return make_report(
            samples=[self._shard_report(name) for name in self.names],
            rows=[self.spill / f"{number:06d}.json" for number in range(len(self.units))],
            on_disk=np.load(self.index / "placeholders.npy"),
            in_table=np.load(self.spill / "placeholders.npy"),
            threshold=self.options.placeholders,
            store=self.store,
        )

    def _index(self) -> None:
        runs = [self.index / f"{group:06d}" for group in range(len(self.groups))]
        size = self.options.group_shards
        self._each(
            "index",
            index_group,
            [
                (self.store, names, number * size, self.options.by, run)
                for number, (names, run) in enumerate(zip(self.groups, runs, strict=True))
                if not run.with_suffix(".digests.npy").exists()
            ],
        )
        if not (self.index / "all.digests.npy").exists():
            merge_runs(runs, self.index / "all")
        self._placeholders(self.index, len(runs))

    def _scan(self) -> None:
        scan = Scan(
            by=self.options.by,
            captions=tuple(column for column, _ in self.options.captions),
            index=self.index,
            group_shards=self.options.group_shards,
            groups=len(self.groups),
            spill=self.spill,
        )
        self._each(
            "scan",
            scan_unit,
            [
                (scan, number, unit)
                for number, unit in enumerate(self.units)
                if not (self.spill / f"{number:06d}.json").exists()
            ],
        )
        self._placeholders(self.spill, len(self.units))

    def _placeholders(self, folder: Path, runs: int) -> None:
        path = folder / "placeholders.npy"
        if not path.exists():
            hashes = [folder / f"{number:06d}.hashes.npy" for number in range(runs)]
            save_array(path, repeated(hashes, self.options.placeholders))

    def _join(self) -> None:
        spec = JoinSpec(
            by=self.options.by,
            captions=self.options.captions,
            mode=self.options.mode,
            output=self.options.output,
            disk_placeholders=frozenset(np.load(self.index / "placeholders.npy")[:, 0].tolist()),
            table_placeholders=frozenset(np.load(self.spill / "placeholders.npy")[:, 0].tolist()),
        )
        tasks = []
        for group, names in enumerate(self.groups):
            first = group * self.options.group_shards
            left = {
                first + offset: (name, self._shard_report(name))
                for offset, name in enumerate(names)
                if not self._shard_report(name).exists()
            }
            if left:
                tasks.append((spec, self.store, left, self.spill, len(self.units), group))
        self._each("join", _join_group, tasks)

    def _shard_report(self, name: str) -> Path:
        return self.joined / f"{name}.json"

    def _each(self, step: str, function: Callable[[*Arguments], None], tasks: list[tuple[*Arguments]]) -> None:
        """Call the function with the arguments of each task, in this process or in several."""
        self.progress(step, 0, len(tasks))
        if self.options.processes == 1:
            for done, task in enumerate(tasks, start=1):
                function(*task)
                self.progress(step, done, len(tasks))
            return
        # Spawned: a fork would copy the caller's threads and locks.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.options.processes, context, initializer=end_with_parent) as pool:
            futures = [pool.submit(function, *task) for task in tasks]
            try:
                for done, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    self.progress(step, done, len(tasks))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _join_group(
    spec: JoinSpec, store: Store, left: dict[int, tuple[str, Path]], spill: Path, units: int, group: int
) -> None:
    """Join the remaining shards of a group; `left` maps the number of a shard to its name and report file."""
    places, rows = spilled_rows(spill, units, group)
    for shard, (name, report) in left.items():
        start, end = np.searchsorted(places, np.array([shard << 32, (shard + 1) << 32], dtype=np.uint64)).tolist()
        positions = (places[start:end] & np.uint64(0xFFFFFFFF)).astype(np.int64)
        write_shard(spec, store, name, positions, rows.slice(start, end - start).to_pylist(), report)
