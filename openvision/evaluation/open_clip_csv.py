"""Results in the columns of open_clip's tables, to be put beside its own (docs/openclip_results.csv and
docs/openclip_retrieval_results.csv of that project)."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from openvision.evaluation.results import Result
from openvision.files import atomic_write_text


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
