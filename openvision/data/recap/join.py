"""Recap-DataComp-1B: the recaption table joined with the shards img2dataset wrote.

The table has 1.24 billion rows in 3,550 parquet files (710 GB of text), the pictures lie in more than 100,000 tars, and
the two are in unrelated order. So nothing is held but what one step needs, and all text is read once, in order:

1. Index. The shards' identities, 24 bytes a sample, become sorted arrays on disk (recap_index.py). For 1.24 billion
   samples that is 30 GB of files that are searched in place. Sorting the captions instead would write all text twice.
2. Scan. The table is read once, a few row groups at a time (recap_table.py). A row is looked up by the 64-bit digest of
   its hash, key or url; what matches is put aside for its group of shards, with everything needed to decide later.
3. Join. Group by group, shard by shard (recap_write.py): digests are checked against the values, several rows for one
   picture are told apart, the captions are written.

Each unit of a step ends with a file that says so, written last under a temporary name and renamed: after kill -9 the
same command goes on and redoes at most one unit a process. Units do not depend on each other, so processes share them.

By hash is the surest way: keys number a download, and another download gives them to other pictures; urls lose a part
of the rows to redirects. A picture whose hash comes often is the error picture of some site, and its caption is about
that: such pictures and rows are dropped and listed.
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
from typing import Any

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
from openvision.data.recap.write import Mode, Writing, write_shard
from openvision.data.shards.manifest import index_folder
from openvision.data.shards.store import LocalStore, Store, open_store
from openvision.errors import OpenVisionError, require
from openvision.files import atomic_write_text, make_folder

# Shards joined at a time: with 10,000 samples each about 600 MB of captions.
GROUP_SHARDS = 128
WORK_NAME = ".recap"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RecapOptions:
    """How to join."""

    by: str = "hash"
    """"hash", "key" or "url"."""
    captions: tuple[tuple[str, str], ...] = (("re_caption", "re_caption"), ("org_caption", "org_caption"))
    """Columns of the table and the names they get. A row whose first is empty is dropped."""
    placeholders: int = 10
    """A picture whose hash comes this often, on disk or in the table, is an error picture."""
    output: Path | None = None
    """Folder of new shards; None writes captions tars beside the shards."""
    work: Path | None = None
    """Folder of what is between; kept when named, else inside the output or the shards and removed at the end."""
    dry_run: bool = False
    """Write nothing but the report (and the work folder, if named)."""
    processes: int = 1
    group_shards: int = GROUP_SHARDS

    @property
    def mode(self) -> Mode:
        """What is written."""
        return "dry-run" if self.dry_run else "shards" if self.output else "sidecar"


def recap(
    shards: str | Path, table: Path, options: RecapOptions, progress: Progress = lambda step, done, of: None
) -> dict[str, Any]:
    """Join the folder `shards` with `table` and return the report.

    `progress` is told the step and how many of how many units are done. Raises OpenVisionError for input that is
    missing, does not fit, or would be overwritten. The same call goes on where one was stopped.
    """
    require("pyarrow", extra="parquet")
    _check(shards, options)
    store = open_store(shards)
    names = shard_names(store)
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
        raise OpenVisionError(f"unknown join key {options.by!r}; it is one of {', '.join(JOIN_FIELDS)}")
    names = [name for _, name in options.captions]
    if not names or len(set(names)) < len(names):
        raise OpenVisionError(f"captions {', '.join(names) or '(none)'}: name at least one, and each once")
    if options.placeholders < 2:
        raise OpenVisionError(f"placeholders is {options.placeholders}: every picture comes once; give 2 or more")
    if options.output and Path(shards).resolve() == options.output.resolve():
        raise OpenVisionError(f"output {options.output} is the folder of the shards; choose another, or write sidecars")


def _work_folder(store: Store, options: RecapOptions, scratch: Path) -> Path:
    if options.work:
        return options.work
    if options.dry_run:
        return scratch / "work"
    if options.output:
        return options.output / WORK_NAME
    if not isinstance(store, LocalStore):
        raise OpenVisionError(f"{store.name} is not a local folder; name a folder for the work with --work")
    return Path(store.name) / WORK_NAME


def _settings(store: Store, names: list[str], table: Path, units: list[Unit], options: RecapOptions) -> dict[str, Any]:
    """What a work folder belongs to: the inputs by name and size, and the options that change what is in it."""
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


def _claim(work: Path, settings: dict[str, Any], options: RecapOptions) -> None:
    """Make the work folder this join's, or go on in it; raises OpenVisionError when it or the output is another's."""
    path = work / "settings.json"
    earlier = _read_settings(path) if path.exists() else {}
    for name, value in settings.items():
        if earlier and earlier.get(name) != value:
            raise OpenVisionError(
                f"{work} holds a join begun with {name} = {earlier.get(name)!r}, not {value!r}; finish that one with "
                "the same command, or remove the folder"
            )
    output = str(options.output.resolve()) if options.output else None
    if options.output and not options.dry_run:
        ours = earlier.get("output") == output
        if not ours and options.output.is_dir() and any(options.output.iterdir()):
            raise OpenVisionError(
                f"output folder {options.output} is not empty; choose another or remove what it holds"
            )
        make_folder(options.output)
    # A dry run that kept its work folder claims no output: the real run after it does.
    claimed = earlier.get("output") if options.dry_run else output
    make_folder(work)
    atomic_write_text(path, json.dumps(settings | {"output": claimed}, indent=2) + "\n")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OpenVisionError(f"{path} cannot be read ({error}); remove the folder {path.parent}") from error


class _Join:
    """The three steps; each does what its files do not yet say is done."""

    def __init__(
        self, store: Store, names: list[str], units: list[Unit], options: RecapOptions, work: Path, progress: Progress
    ) -> None:
        self.store, self.names, self.units = store, names, units
        self.options, self.progress = options, progress
        self.index, self.spill = make_folder(work / "index"), make_folder(work / "spill")
        # A dry run says nothing about what a later run has written.
        self.joined = make_folder(work / f"joined-{options.mode}")
        size = options.group_shards
        self.groups = [names[first : first + size] for first in range(0, len(names), size)]

    def run(self) -> dict[str, Any]:
        """Do what is left and count everything."""
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
        writing = Writing(
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
                tasks.append((writing, self.store, left, self.spill, len(self.units), group))
        self._each("join", _join_group, tasks)

    def _shard_report(self, name: str) -> Path:
        return self.joined / f"{name}.json"

    def _each(self, step: str, function: Callable[..., None], tasks: list[tuple[Any, ...]]) -> None:
        """Run the function over the tasks, in this process or in several."""
        self.progress(step, 0, len(tasks))
        if self.options.processes == 1:
            for done, task in enumerate(tasks, start=1):
                function(*task)
                self.progress(step, done, len(tasks))
            return
        # Spawned: a fork would copy whatever threads and locks the caller has.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.options.processes, mp_context=context) as pool:
            futures = [pool.submit(function, *task) for task in tasks]
            try:
                for done, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    self.progress(step, done, len(tasks))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _join_group(
    writing: Writing, store: Store, left: dict[int, tuple[str, Path]], spill: Path, units: int, group: int
) -> None:
    """Join the shards of a group that are left: number of the shard -> its name and the file of its report."""
    places, rows = spilled_rows(spill, units, group)
    for shard, (name, report) in left.items():
        start, end = np.searchsorted(places, np.array([shard << 32, (shard + 1) << 32], dtype=np.uint64)).tolist()
        positions = (places[start:end] & np.uint64(0xFFFFFFFF)).astype(np.int64)
        write_shard(writing, store, name, positions, rows.slice(start, end - start).to_pylist(), report)
