"""One page that compares any number of checkpoints, from their folders of results alone.

The page is self-contained: images inside as data URIs, no request to any server. Tables sort by a click; every share
has its 95 % bootstrap interval, every difference its paired-bootstrap p-value, corrected for the number of metrics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from openvision.errors import OpenVisionError
from openvision.evaluation.report import figures
from openvision.evaluation.report.gallery import Caption, Confusion, Gallery, Mistake, Neighbours, read_gallery
from openvision.evaluation.report.labels import LESS, full_label, label, shown
from openvision.evaluation.report.parts import (
    Asked,
    Cell,
    Maps,
    Row,
    Table,
    asked,
    chart,
    provenance,
    shown_by,
    side_by_side,
)
from openvision.evaluation.report.template import render
from openvision.evaluation.suites.compare import Comparison, compare
from openvision.evaluation.suites.reported import beside
from openvision.evaluation.suites.results import Result
from openvision.files import atomic_write_text


@dataclass(frozen=True)
class Section:
    """One evaluator: tables, curve, examples by checkpoint."""

    name: str
    anchor: str
    kind: str
    facts: str
    table: Table
    reliability: dict[str, str] | None
    classes: Table | None
    confusions: list[tuple[str, list[Confusion]]]
    mistakes: list[tuple[str, list[Mistake]]]
    queries: list[Asked]
    neighbours: list[tuple[str, list[Neighbours]]]
    captions: list[tuple[str, list[Caption]]]
    maps: list[Maps]


@dataclass(frozen=True)
class Pair:
    """Two checkpoints compared."""

    first: str
    second: str
    verdict: str
    table: Table
    left_out: list[str]


@dataclass(frozen=True)
class Facts:
    """What is needed to compute the numbers of a checkpoint again."""

    name: str
    lines: list[tuple[str, str]]
    recipe: str | None


def build_page(results: Sequence[Result], path: Path) -> Path:
    """Write the page at `path`, completely or not at all; returns `path`. Raises OpenVisionError without results."""
    if not results:
        raise OpenVisionError("there are no results to make a page of; measure a checkpoint with `openvision eval`")
    atomic_write_text(path, render("compare.html", context(results)))
    return path


def context(results: Sequence[Result]) -> dict[str, object]:
    """Everything the template reads."""
    pairs = [compare(first, second) for first, second in combinations(results, 2)]
    evaluators = list(dict.fromkeys(name for result in results for name in result.measured))
    galleries = [read_gallery(result.folder) for result in results]
    return {
        "names": [result.name for result in results],
        "colours": {result.name: figures.colour(number) for number, result in enumerate(results)},
        "suite": results[0].content["suite"],
        "overview": _overview(results, evaluators, pairs),
        "sections": [_section(results, name, pairs, galleries) for name in evaluators],
        "pairs": [_pair(pair) for pair in pairs],
        "history": chart(figures.training_curves, results, dpi=120) if figures.has_history(results) else None,
        "patches": side_by_side([gallery["patches"] for gallery in galleries]),
        "reported": _reported(results),
        "facts": [Facts(one.name, provenance(one), one.content["checkpoint"]["recipe"]) for one in results],
        "skipped": [(result.name, note) for result in results for note in result.content["skipped"]],
        "images": {name: uri for gallery in galleries for name, uri in gallery["images"].items()},
    }


def _overview(results: Sequence[Result], evaluators: Sequence[str], pairs: Sequence[Comparison]) -> Table:
    """A row a checkpoint, the first metric of every evaluator."""
    first = {name: next(one.measured[name] for one in results if name in one.measured) for name in evaluators}
    columns = [(name, next(iter(entry["values"]))) for name, entry in first.items()]
    rows = []
    for result in results:
        size = result.content["checkpoint"]["vision_parameters"]
        cells = [Cell(f"{size / 1e6:.1f} M" if size is not None else "", size or -1)]
        rows.append(Row(result.name, cells + [_cell(results, result, *column, pairs) for column in columns]))
    heads = [f"{name}: {label(metric)}" for name, metric in columns]
    return Table("checkpoint", ["vision parameters", *heads], rows)


def _cell(results: Sequence[Result], result: Result, evaluator: str, metric: str, pairs: Sequence[Comparison]) -> Cell:
    """One number, and whether it is the best or worse than the best by noise only."""
    value = _value(result, evaluator, metric)
    if value is None:
        return Cell("", -1, title="not measured")
    text = shown(metric, value, result.measured[evaluator]["intervals"].get(metric))
    if len(results) == 1:
        return Cell(text, value)
    values = {one.name: found for one in results if (found := _value(one, evaluator, metric)) is not None}
    best = (min if metric in LESS else max)(values, key=lambda name: values[name])
    if best == result.name:
        return Cell(text, value, "best", "best")
    row = next(
        (
            row
            for pair in pairs
            if {pair.first, pair.second} == {result.name, best}
            for row in pair.rows
            if (row.evaluator, row.metric) == (evaluator, metric)
        ),
        None,
    )
    if row is None:
        return Cell(text, value)
    mark, said = ("worse", "more than noise") if row.differs else ("tie", "within noise")
    return Cell(text, value, mark, f"against {best}: {said}, p = {row.corrected_p:.2g}")


def _value(result: Result, evaluator: str, metric: str) -> float | None:
    found = result.measured.get(evaluator)
    return found["values"].get(metric) if found is not None else None


def _section(
    results: Sequence[Result], name: str, pairs: Sequence[Comparison], galleries: Sequence[Gallery]
) -> Section:
    having = [result for result in results if name in result.measured]
    first = having[0].measured[name]
    metrics = list(first["values"])
    rows = [Row(one.name, [_cell(results, one, name, metric, pairs) for metric in metrics]) for one in having]
    names = [result.name for result in results]
    shows = shown_by(galleries, name)
    by_name = list(zip(names, shows, strict=True))
    return Section(
        name=name,
        anchor="e-" + "".join(letter if letter.isalnum() else "-" for letter in name.lower()),
        kind=first["kind"].replace("_", " "),
        facts=", ".join(f"{key.replace('_', ' ')} {_fact(value)}" for key, value in first["facts"].items()),
        table=Table("checkpoint", [label(metric) for metric in metrics], rows),
        reliability=chart(figures.reliability, results, name, dpi=120) if "reliability" in first["details"] else None,
        classes=_classes(having, name),
        confusions=[(one, found) for one, own in by_name if (found := own.get("confusions"))],
        mistakes=[(one, found) for one, own in by_name if (found := own.get("mistakes"))],
        queries=asked(names, [own.get("queries", []) for own in shows]),
        neighbours=[(one, found) for one, own in by_name if (found := own.get("neighbours"))],
        captions=[(one, found) for one, own in by_name if (found := own.get("captions"))],
        maps=side_by_side([own.get("maps", []) for own in shows]),
    )


def _fact(value: float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def _classes(results: Sequence[Result], name: str) -> Table | None:
    """Accuracy of every class where there are few enough to read."""
    details = [result.measured[name]["details"] for result in results]
    names = details[0].get("classes", [])
    if not 1 < len(names) <= 200 or any(own.get("classes") != names for own in details):
        return None
    counts = [own["per_class"] for own in details]
    rows = []
    for index, one in enumerate(names):
        total = counts[0][index][1]
        if total > 1:
            shares = [own[index][0] / total for own in counts]
            rows.append(Row(one, [Cell(str(total), total), *(Cell(f"{100 * share:.1f}", share) for share in shares)]))
    return Table("class", ["images", *(result.name for result in results)], rows) if rows else None


def _pair(pair: Comparison) -> Pair:
    rows = []
    for row in pair.rows:
        found = row.difference
        text = f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
        cells = [
            Cell(shown(row.metric, row.first), row.first),
            Cell(shown(row.metric, row.second), row.second),
            Cell(text, found.value),
            Cell(f"{row.corrected_p:.2g}" if row.corrected_p >= 0.001 else "< 0.001", row.corrected_p),
            Cell("differs" if row.differs else "noise", int(row.differs)),
        ]
        rows.append(Row(f"{row.evaluator}: {full_label(row.metric)}", cells))
    table = Table("metric", [pair.first, pair.second, "difference", "p", ""], rows)
    return Pair(pair.first, pair.second, pair.verdict(), table, pair.left_out)


def _reported(results: Sequence[Result]) -> Table | None:
    """Ours beside the published numbers, where a checkpoint is a released one."""
    rows = []
    for result in results:
        for name, measured in result.measured.items():
            for metric in measured["reported"]:
                found = beside(result.content["checkpoint"]["released"], measured, metric)
                if found is not None:
                    cells = [
                        Cell(f"{name}: {full_label(metric)}", len(rows)),
                        Cell(f"{found.ours:.1f} ({found.low:.1f}-{found.high:.1f})", found.ours),
                        Cell(f"{found.value}", found.value),
                        Cell("agrees" if found.agrees else "off", int(found.agrees), "" if found.agrees else "off"),
                    ]
                    rows.append(Row(result.name, cells))
    return Table("checkpoint", ["metric", "ours", "reported", ""], rows) if rows else None
