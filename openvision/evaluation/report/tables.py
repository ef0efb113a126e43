"""Results of a suite as tables: Markdown to commit, CSV in open_clip's columns, the held-out sets in a terminal.

The CSV has the columns of docs/openclip_results.csv and docs/openclip_retrieval_results.csv in open_clip's repository.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from openvision.evaluation.report.labels import full_label, shown
from openvision.evaluation.suites.held_out import METRICS, MODEL, held_out_sets
from openvision.evaluation.suites.results import Result
from openvision.files import atomic_write_text
from openvision.terminal import Console


def markdown_table(results: Sequence[Result]) -> str:
    """A row a metric, a column a checkpoint; percent with 95 % intervals. Below, what they were computed from."""
    rows: list[list[str]] = []
    for name in dict.fromkeys(name for result in results for name in result.measured):
        having = next(result.measured[name] for result in results if name in result.measured)
        for metric in having["values"]:
            cells = [_cell(result, name, metric) for result in results]
            rows.append([f"{name}: {full_label(metric)}", *cells])
    head = ["", *(result.name for result in results)]
    lines = [_line(head), _line(["---", *("---:" for _ in results)]), *map(_line, rows), ""]
    for result in results:
        lines.append(f"{result.name}: weights {result.sha256[:16]}, suite {result.content['suite']['name']}")
    entries = [entry for result in results for entry in result.measured.values()]
    data = {identity[:16] for entry in entries for identity in entry["data"].values()}
    lines.append(f"data: {', '.join(sorted(data))}")
    return "\n".join(lines) + "\n"


def _cell(result: Result, name: str, metric: str) -> str:
    entry = result.measured.get(name)
    if entry is None or metric not in entry["values"]:
        return ""
    return shown(metric, entry["values"][metric], entry["intervals"].get(metric))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def open_clip_table(results: Sequence[Result]) -> str:
    """CSV: a row a checkpoint, its columns those that any evaluator names, shares 0 to 1 with four digits."""
    rows = [_row(result) for result in results]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _row(result: Result) -> dict[str, str]:
    checkpoint = result.content["checkpoint"]
    size = checkpoint["parameters"]
    row = {
        "name": checkpoint["released"] or checkpoint["name"],
        "pretrained": checkpoint["sha256"][:12],
        "params (M)": f"{size / 1e6:.2f}" if size is not None else "",
    }
    for measured in result.measured.values():
        for metric, column in measured["open_clip"].items():
            if metric in measured["values"]:
                row[column] = f"{measured['values'][metric]:.4f}"
    return row


def write_open_clip_table(results: Sequence[Result], path: Path) -> None:
    """Write the table completely or not at all."""
    atomic_write_text(path, open_clip_table(results))


def print_held_out(result: Result, console: Console | None = None) -> None:
    """Print a table for each held-out set: metrics down, baselines and model across, in % with 95 % intervals."""
    for held_out in held_out_sets(result):
        title = f"{held_out.title}: {held_out.images} images, {held_out.candidates} names; % (95 % interval)"
        # Narrow enough for a terminal of 80 columns.
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        table.add_column("", no_wrap=True)
        for row in held_out.rows:
            table.add_column(row.replace(", ", "\n"), justify="right", style="bold" if row == MODEL else None)
        for metric, label in METRICS.items():
            if metric in held_out.rows[MODEL]:
                cells = [held_out.percent(row, metric, digits=0) for row in held_out.rows]
                table.add_row(label.replace(" to ", "-"), *cells)
        (console or Console()).print(table)
