"""Results of a suite as a table in Markdown, to be committed and compared with."""

from collections.abc import Sequence

from openvision.evaluation.page import full_label, shown
from openvision.evaluation.results import Result


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
