"""Rows of a table as they finish, and the Markdown made of them.

A row is a JSON line, one for each run; the file is replaced as a whole, so that no line is ever half a row. A run whose
row is there with the same budget and learning rate is not made again, unless its evaluation was cut short.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from openvision.files import JsonObject, atomic_write_text, read_json_lines

# What stands in a table of each kind of evaluator; of other kinds the first value. Baselines depend on no training:
# rows keep them, a column would repeat them.
HEADLINES = {
    "zero_shot": ("top1",),
    "retrieval": ("t2i_r1", "t2i_r5"),
    "caption_loss": ("caption_loss",),
    "baselines": (),
}
_NOT_SHARES = ("loss", "median", "count")
_KEY = ("table", "variant", "seed", "profile", "rate", "planned_seconds", "planned_samples")


def key_of(row: JsonObject) -> tuple[object, ...]:
    """What makes a run another run."""
    return tuple(row.get(name) for name in _KEY)


class Rows:
    """The rows in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[JsonObject] = read_json_lines(path) if path.is_file() else []

    def __contains__(self, key: tuple[object, ...]) -> bool:
        return any(row["complete"] and key_of(row) == key for row in self.rows)

    def put(self, row: JsonObject) -> None:
        """Add a row, or replace that of the same run, and write the file."""
        self.rows = [other for other in self.rows if key_of(other) != key_of(row)] + [row]
        atomic_write_text(self.path, "".join(json.dumps(each) + "\n" for each in self.rows))

    def of(self, table: str, variants: Sequence[str] | None = None) -> list[JsonObject]:
        """Rows of a table, in the order of `variants`."""
        found = [row for row in self.rows if row["table"] == table]
        if variants is None:
            return found
        return sorted(
            (row for row in found if row["variant"] in variants), key=lambda row: variants.index(row["variant"])
        )


def columns_of(rows: Iterable[JsonObject]) -> list[tuple[str, str]]:
    """(evaluator, metric) of the columns, in the order in which rows name them."""
    found: dict[tuple[str, str], None] = {}
    for row in rows:
        for title, measured in row["measured"].items():
            wanted = HEADLINES.get(measured["kind"], tuple(measured["values"])[:1])
            found |= {(title, metric): None for metric in wanted if metric in measured["values"]}
    return list(found)


def values_of(rows: Iterable[JsonObject], column: tuple[str, str]) -> list[float]:
    """Values of a column in the rows that have it; shares in percent."""
    title, metric = column
    factor = 1 if any(word in metric for word in _NOT_SHARES) else 100
    return [factor * row["measured"][title]["values"][metric] for row in rows if title in row["measured"]]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation; one value has no spread, none at all is a dash."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(rows: Sequence[JsonObject]) -> str:
    """A table with a line for each variant and budget, the seeds' mean and standard deviation in each cell."""
    columns = columns_of(rows)
    head = ["", "seeds", "rate", "samples", "seconds", *(f"{title}, {metric}" for title, metric in columns)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    groups: dict[tuple[object, ...], list[JsonObject]] = {}
    for row in rows:
        budget = (row.get("planned_seconds"), row.get("planned_samples"))
        groups.setdefault((row["title"], row["profile"], row["rate"], *budget), []).append(row)
    for group in groups.values():
        cells = [group[0]["title"], str(len(group)), f"{group[0]['rate']:g}"]
        cells += [spread([row["samples"] for row in group], 0), spread([row["seconds"] for row in group], 0)]
        cells += [spread(values_of(group, column)) for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
