"""Report of a join: a JSON object, and tables for the terminal."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from openvision.data.recap.table import EXAMPLES
from openvision.data.shards.store import Store
from openvision.files import JsonObject
from openvision.renamed import RENAMED_REASONS
from openvision.terminal import Console
from openvision.untrusted import load_json

# Reason -> label on the terminal.
SAMPLE_REASONS = {
    "no_row": "no usable row in the table",
    "no_join_value": "no join value in its json",
    "placeholder": "placeholder image, by its repeated hash",
    "another_image": "the row with its key is of another image",
    "differing_captions": "several rows with differing captions",
    "duplicate_key": "repeated key in its shard",
    "bad_json": "invalid json member",
    "bad_name": "name that is empty or not UTF-8",
}
ROW_REASONS = {
    "not_on_disk": "image not on disk",
    "no_join_value": "no join value",
    "empty_caption": "empty caption",
    "placeholder": "placeholder image, by its repeated hash",
}
_MOST = 20


def make_report(
    samples: Sequence[Path],
    rows: Sequence[Path],
    on_disk: np.ndarray,
    in_table: np.ndarray,
    threshold: int,
    store: Store,
) -> JsonObject:
    """Sum the reports of shards (`samples`) and of units of the table (`rows`)."""
    sample_counts, sample_examples = _sum(samples)
    row_counts, row_examples = _sum(rows)
    return {
        "samples": {
            "total": sample_counts["samples"],
            "joined": sample_counts["joined"],
            "join_rate": _share(sample_counts["joined"], sample_counts["samples"]),
            "dropped": {reason: sample_counts[reason] for reason in SAMPLE_REASONS},
            "examples": sample_examples,
            "with_several_rows": sample_counts["several_rows"],
        },
        "rows": {
            "total": row_counts["rows"],
            "on_disk": row_counts["on_disk"],
            "on_disk_rate": _share(row_counts["on_disk"], row_counts["rows"]),
            "dropped": {reason: row_counts[reason] for reason in ROW_REASONS},
            "examples": row_examples,
        },
        "captions_mended": sample_counts["mended"],
        "placeholders": {
            "threshold": threshold,
            "on_disk": _placeholders(on_disk),
            "in_table": _placeholders(in_table),
        },
        "download": _download(store),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _sum(paths: Sequence[Path]) -> tuple[Counter[str], dict[str, list[str]]]:
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for path in paths:
        part = json.loads(path.read_text(encoding="utf-8"))
        for name, count in part["counts"].items():
            counts[_reason(name)] += count
        for name, found in part["examples"].items():
            examples[_reason(name)] = (examples.get(_reason(name), []) + found)[:EXAMPLES]
    return counts, {reason: found for reason, found in examples.items() if found}


def _reason(stored: str) -> str:
    return RENAMED_REASONS.get(stored, stored)


def _placeholders(found: np.ndarray) -> JsonObject:
    most = found[np.argsort(found[:, 1], kind="stable")[::-1][:_MOST]].tolist()
    return {
        "images": len(found),
        "copies": int(found[:, 1].sum()),
        "most_copied": [{"sha256_begins": f"{digest:016x}", "copies": copies} for digest, copies in most],
    }


def _download(store: Store) -> dict[str, int] | None:
    """Sums over img2dataset's statistics files; None when there are none."""
    sums: Counter[str] = Counter()
    for name in store.sizes("_stats.json"):
        try:
            stats = load_json(store.read(name))
        except ValueError:
            stats = None
        fields = ("count", "successes", "failed_to_download", "failed_to_resize")
        if not isinstance(stats, dict) or not all(isinstance(stats.get(field, 0), int) for field in fields):
            # Truncated when a download was stopped; the shard itself is still counted.
            sums["unreadable_files"] += 1
            continue
        for field in fields:
            sums[field] += stats.get(field, 0)
    return dict(sums) if sums else None


def print_report(report: JsonObject, console: Console) -> None:
    """Print the report as tables."""
    samples, rows, placeholders = report["samples"], report["rows"], report["placeholders"]
    console.print(_table("samples on disk", samples, samples["joined"], "joined", SAMPLE_REASONS))
    console.print(_table("rows of the table", rows, rows["on_disk"], "image on disk", ROW_REASONS))
    for place, found in (("on disk", placeholders["on_disk"]), ("in the table", placeholders["in_table"])):
        console.print(
            f"images that occur {placeholders['threshold']} times or more {place}: {found['images']:,} "
            f"({found['copies']:,} copies)",
            highlight=False,
        )
    console.print(f"captions with fixed encoding: {report['captions_mended']:,}", highlight=False)
    if report["download"]:
        parts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in report["download"].items())
        console.print(f"img2dataset statistics: {parts}", highlight=False)


def _table(title: str, part: JsonObject, good: int, label: str, reasons: dict[str, str]) -> Table:
    table = Table("", "count", "share", title=title, title_justify="left")
    table.columns[1].justify = table.columns[2].justify = "right"
    lines = [("all", part["total"]), (label, good)]
    lines += [(text, part["dropped"][reason]) for reason, text in reasons.items() if part["dropped"][reason]]
    for text, count in lines:
        table.add_row(text, f"{count:,}", f"{_share(count, part['total']):.1%}")
    return table
