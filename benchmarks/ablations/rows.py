"""Rows of a table as they finish, and the Markdown made of them.

A row is a JSON line, one for each run; the file is replaced as a whole, so that no line is ever half a row. A run whose
row is there with the same scenes, budget and learning rate is not made again, for whichever table it was made, unless
its evaluation was cut short.
"""

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from openvision.files import JsonObject, atomic_write_text, locked_folder, make_folder, read_json_lines

# What stands in a table of each kind of evaluator; of others all probes of frozen features, or else the first value.
HEADLINES = {"zero_shot": ("top1",), "retrieval": ("t2i_r1", "t2i_r5"), "caption_loss": ("caption_loss",)}
_PROBES = ("pooled_", "patches_")
# Learning rates are chosen on it, so its numbers are no result; baselines have a column of their own.
_VALIDATION, _BASELINES_KIND, _BASELINES_TITLE = "validation, ", "baselines", "baselines, "
_UNTAUGHT = ("chance_", "majority_", "pixels", "untrained_")
_NOT_SHARES = ("loss", "median", "count")
TUNING, SPEEDS = "tuning", "speeds"
"""Rows of these are no results: they serve the runs of the tables."""
_BUDGET = ("planned_seconds", "planned_samples", "start", "start_seconds")
_KEY = ("variant", "seed", "world", "suite", "profile", "rate", *_BUDGET)


def key_of(row: JsonObject) -> tuple[object, ...]:
    """What makes a run another run."""
    purpose = row["table"] if row["table"] in (TUNING, SPEEDS) else None
    return (purpose, *(row.get(name) for name in _KEY))


class Rows:
    """The rows in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[JsonObject] = read_json_lines(path) if path.is_file() else []

    def __contains__(self, key: tuple[object, ...]) -> bool:
        return any(row["complete"] and key_of(row) == key for row in self.rows)

    def put(self, row: JsonObject) -> None:
        """Add a row, or replace that of the same run, and write the file with what other processes have added since."""
        with locked_folder(make_folder(self.path.parent)):
            rows = read_json_lines(self.path) if self.path.is_file() else []
            self.rows = [other for other in rows if key_of(other) != key_of(row)] + [row]
            atomic_write_text(self.path, "".join(json.dumps(each) + "\n" for each in self.rows))

    def serving(self, purpose: str) -> list[JsonObject]:
        """Rows that only tune or measure speeds."""
        return [row for row in self.rows if row["table"] == purpose]

    def of(self, variants: Sequence[str]) -> list[JsonObject]:
        """Results of some variants, in their order; in that of the file for one variant."""
        found = [row for row in self.rows if row["table"] not in (TUNING, SPEEDS) and row["variant"] in variants]
        return sorted(found, key=lambda row: variants.index(row["variant"]))


def metrics_of(rows: Iterable[JsonObject]) -> list[tuple[str, str]]:
    """(evaluator, metric) of the lines of a table, in the order in which rows name them."""
    found: dict[tuple[str, str], None] = {}
    for row in rows:
        for title, measured in row["measured"].items():
            if title.startswith(_VALIDATION) or measured["kind"] == _BASELINES_KIND:
                continue
            values = measured["values"]
            probes = [metric for metric in values if metric.startswith(_PROBES)]
            wanted = HEADLINES.get(measured["kind"]) or probes or list(values)[:1]
            found |= {(title, metric): None for metric in wanted if metric in values}
    return list(found)


def values_of(rows: Iterable[JsonObject], title: str, metric: str) -> list[float]:
    """Values of a metric in the rows that have it; shares in percent."""
    measured = [row["measured"][title]["values"] for row in rows if title in row["measured"]]
    return [_shown(metric, values[metric]) for values in measured if metric in values]


def untaught(rows: Iterable[JsonObject], title: str, metric: str) -> list[float]:
    """The best of what the suite measured of that metric without any training, as a list of one or none."""
    plain = metric
    for prefix in (*_PROBES, "linear_"):
        plain = plain.removeprefix(prefix)
    found = [
        value
        for row in rows
        for other, measured in row["measured"].items()
        if title in (other, other.replace(_BASELINES_TITLE, ""))
        for name, value in measured["values"].items()
        if name.startswith(_UNTAUGHT) and name.endswith(f"_{plain}")
    ]
    return [_shown(metric, max(found))] if found else []


def _shown(metric: str, value: float) -> float:
    return value if any(word in metric for word in _NOT_SHARES) else 100 * value


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation; one value has no spread, none at all is a dash."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _start(row: JsonObject) -> str | None:
    """What a run starts from; where the seconds of that run are counted, each seed has its own."""
    start = row.get("start")
    return re.sub(rf"seed{row['seed']}(?!\d)", "seed*", start) if start and row.get("start_seconds") else start


def _seconds(rows: Sequence[JsonObject]) -> str:
    """Seconds of training, and of the runs that these start from."""
    before = rows[0].get("start_seconds")
    return spread([row["seconds"] for row in rows], 0) + (f" behind {before:.0f}" if before else "")


def markdown(rows: Sequence[JsonObject]) -> str:
    """A table with a column for each variant and budget: mean and standard deviation over seeds of each metric."""
    groups: dict[tuple[object, ...], list[JsonObject]] = {}
    for row in rows:
        budget = (row.get("planned_seconds"), row.get("planned_samples"), _start(row), row.get("start_seconds"))
        groups.setdefault((row["title"], row["world"], row["profile"], row["rate"], *budget), []).append(row)
    columns = list(groups.values())
    lines = [
        ["", *(group[0]["title"] for group in columns), "untrained, at best"],
        ["---", *("---:" for _ in columns), "---:"],
        ["seeds", *(str(len(group)) for group in columns), ""],
        ["learning rate", *(f"{group[0]['rate']:g}" for group in columns), ""],
        ["seconds", *(_seconds(group) for group in columns), ""],
        ["samples", *(spread([row["samples"] for row in group], 0) for group in columns), ""],
    ]
    if any(row.get("start") for row in rows):
        lines.append(["starts from", *(_start(group[0]) or "fresh weights" for group in columns), ""])
    for title, metric in metrics_of(rows):
        cells = [spread(values_of(group, title, metric)) for group in columns]
        lines.append([f"{title}, {metric}", *cells, spread(untaught(rows, title, metric))])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
