"""Results of a suite as tables: Markdown to commit, and CSV in the columns of open_clip's published tables.

The CSV has the columns of docs/openclip_results.csv and docs/openclip_retrieval_results.csv in open_clip's repository.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from openvision.evaluation.report.comparison_page import full_label, shown
from openvision.evaluation.suites.results import Result
from openvision.files import atomic_write_text


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
    data = {identity[:16] for result in results for entry in result.measured.values() for identity in _data(entry)}
    lines.append(f"data: {', '.join(sorted(data))}")
    return "\n".join(lines) + "\n"


def _data(entry: dict) -> list[str]:
    return list(entry["data"].values())


def _cell(result: Result, name: str, metric: str) -> str:
    entry = result.measured.get(name, {"values": {}})
    if metric not in entry["values"]:
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
    row = {
        "name": checkpoint["released"] or checkpoint["name"],
        "pretrained": checkpoint["sha256"][:12],
        "params (M)": f"{checkpoint['parameters'] / 1e6:.2f}",
    }
    for measured in result.measured.values():
        for metric, column in measured["open_clip"].items():
            if metric in measured["values"]:
                row[column] = f"{measured['values'][metric]:.4f}"
    return row


def write_open_clip_table(results: Sequence[Result], path: Path) -> None:
    """Write the table completely or not at all."""
    atomic_write_text(path, open_clip_table(results))
