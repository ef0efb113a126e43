"""One page that compares any number of checkpoints, from their folders of results alone.

The page is self-contained: pictures inside as data URIs, no request to anywhere. Tables sort by a click; every share
has its 95 % bootstrap interval, every difference its paired-bootstrap p-value, corrected for the number of metrics.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from openvision.errors import OpenVisionError
from openvision.evaluation.report import figures
from openvision.evaluation.report.template import png_uri, render
from openvision.evaluation.suites.compare import Comparison, Row, compare
from openvision.evaluation.suites.reported import beside
from openvision.evaluation.suites.results import Result
from openvision.files import atomic_write_text

METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "ece": "calibration error",
    "t2i_r1": "text to image R@1",
    "t2i_r5": "R@5",
    "t2i_r10": "R@10",
    "t2i_median": "median rank",
    "i2t_r1": "image to text R@1",
    "i2t_r5": "R@5 ",
    "i2t_r10": "R@10 ",
    "i2t_median": "median rank ",
    "patch_accuracy": "patches right",
    "miou": "mean IoU",
}
_NO_SHARE = ("t2i_median", "i2t_median")
# Of these less is better.
_LESS = ("ece", *_NO_SHARE)


def build_page(results: Sequence[Result], path: Path) -> Path:
    """Write the page at `path`, completely or not at all; returns `path`. Raises OpenVisionError without results."""
    if not results:
        raise OpenVisionError("there are no results to make a page of; measure a checkpoint with `openvision eval`")
    atomic_write_text(path, render("compare.html", context(results)))
    return path


def context(results: Sequence[Result]) -> dict[str, Any]:
    """Everything the template reads."""
    pairs = [compare(first, second) for first, second in combinations(results, 2)]
    evaluators = list(dict.fromkeys(name for result in results for name in result.measured))
    pictures: dict[str, str] = {}
    galleries = [result.gallery() for result in results]
    for gallery in galleries:
        pictures |= gallery.get("pictures", {})
    return {
        "names": [result.name for result in results],
        "colours": [figures.colour(number) for number in range(len(results))],
        "suite": results[0].content["suite"],
        "overview": _overview(results, evaluators, pairs),
        "sections": [_section(results, name, pairs, galleries) for name in evaluators],
        "pairs": [_pair(pair) for pair in pairs],
        "history": _themes(figures.training_curves, results) if figures.has_history(results) else None,
        "patches": _side_by_side([gallery.get("patches", []) for gallery in galleries], "picture"),
        "reported": _reported(results),
        "facts": [_facts(result) for result in results],
        "skipped": [(result.name, note) for result in results for note in result.content["skipped"]],
        "pictures": pictures,
    }


def _themes(draw: Callable[..., Any], *arguments: Any) -> dict[str, str]:
    return {
        theme.name: png_uri(figures.to_png(draw(*arguments, theme), dpi=120)) for theme in (figures.LIGHT, figures.DARK)
    }


def label(metric: str) -> str:
    """What people call a metric."""
    return METRICS.get(metric, metric.replace("_", " ")).strip()


def shown(metric: str, value: float, bounds: Sequence[float] | None = None) -> str:
    """A value for a table: percent with its interval, a median rank as it is."""
    if metric in _NO_SHARE:
        return f"{value:g}"
    text = f"{100 * value:.1f}"
    return f"{text} ({100 * bounds[0]:.1f}-{100 * bounds[1]:.1f})" if bounds else text


def _first_metric(results: Sequence[Result], evaluator: str) -> str:
    return next(next(iter(r.measured[evaluator]["values"])) for r in results if evaluator in r.measured)


def _overview(results: Sequence[Result], evaluators: Sequence[str], pairs: Sequence[Comparison]) -> dict[str, Any]:
    """A row a checkpoint, the first metric of every evaluator."""
    columns = [(name, _first_metric(results, name)) for name in evaluators]
    return {
        "columns": [f"{name}: {label(metric)}" for name, metric in columns],
        "rows": [
            {
                "name": result.name,
                "parameters": result.content["checkpoint"]["vision_parameters"],
                "cells": [_cell(results, result, name, metric, pairs) for name, metric in columns],
            }
            for result in results
        ],
    }


def _cell(
    results: Sequence[Result], result: Result, evaluator: str, metric: str, pairs: Sequence[Comparison]
) -> dict[str, Any]:
    """One number: its text, its value for sorting, and whether it is the best or worse than the best by noise only."""
    found = result.measured.get(evaluator, {"values": {}})
    if metric not in found["values"]:
        return {"text": "", "value": -1, "mark": "", "title": "not measured"}
    value = found["values"][metric]
    text = shown(metric, value, found["intervals"].get(metric))
    cell = {"text": text, "value": value, "mark": "", "title": ""}
    if len(results) == 1:
        return cell
    choose = min if metric in _LESS else max
    rivals = [one for one in results if metric in one.measured.get(evaluator, {"values": {}})["values"]]
    best = choose(rivals, key=lambda one: one.measured[evaluator]["values"][metric])
    if best is result:
        return cell | {"mark": "best", "title": "best"}
    row = _row_of(pairs, result.name, best.name, evaluator, metric)
    if row is None:
        return cell
    mark = "worse" if row.differs else "tie"
    said = "more than noise" if row.differs else "within noise"
    return cell | {"mark": mark, "title": f"against {best.name}: {said}, p = {row.corrected_p:.2g}"}


def _row_of(pairs: Sequence[Comparison], one: str, other: str, evaluator: str, metric: str) -> Row | None:
    for pair in pairs:
        if {pair.first, pair.second} == {one, other}:
            return next((row for row in pair.rows if (row.evaluator, row.metric) == (evaluator, metric)), None)
    return None


def _section(
    results: Sequence[Result], name: str, pairs: Sequence[Comparison], galleries: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """One evaluator: table, curve, galleries."""
    having = [result for result in results if name in result.measured]
    first = having[0].measured[name]
    metrics = list(first["values"])
    shows = [gallery.get("evaluators", {}).get(name, {}) for gallery in galleries]
    return {
        "name": name,
        "anchor": "e-" + "".join(letter if letter.isalnum() else "-" for letter in name.lower()),
        "kind": first["kind"].replace("_", " "),
        "facts": ", ".join(f"{key.replace('_', ' ')} {_fact(value)}" for key, value in first["facts"].items()),
        "metrics": [label(metric) for metric in metrics],
        "rows": [
            {
                "name": result.name,
                "cells": [_cell(results, result, name, metric, pairs) for metric in metrics],
            }
            for result in having
        ],
        "reliability": _themes(figures.reliability, results, name) if "reliability" in first["details"] else None,
        "classes": _classes(having, name),
        "confusions": [(result.name, show["confusions"]) for result, show in _with(results, shows, "confusions")],
        "mistakes": [(result.name, show["mistakes"]) for result, show in _with(results, shows, "mistakes")],
        "queries": _queries(results, shows),
        "maps": _side_by_side([show.get("maps", []) for show in shows], "text"),
    }


def _fact(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _with(results: Sequence[Result], shows: Sequence[dict[str, Any]], part: str) -> list[tuple[Result, dict[str, Any]]]:
    return [(result, show) for result, show in zip(results, shows, strict=True) if show.get(part)]


def _classes(results: Sequence[Result], name: str) -> list[dict[str, Any]]:
    """Accuracy of every class where there are few enough to read."""
    names = results[0].measured[name]["details"].get("classes", [])
    if not 1 < len(names) <= 200 or any(r.measured[name]["details"].get("classes") != names for r in results):
        return []
    counts = [result.measured[name]["details"]["per_class"] for result in results]
    rows = []
    for index, klass in enumerate(names):
        total = counts[0][index][1]
        if total > 1:
            rows.append({"name": klass, "count": total, "cells": [own[index][0] / total for own in counts]})
    return rows


def _queries(results: Sequence[Result], shows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Queries with what each checkpoint found; they are the same for all, drawn by lot."""
    merged: dict[str, dict[str, Any]] = {}
    for result, show in _with(results, shows, "queries"):
        for query in show["queries"]:
            entry = merged.setdefault(query["text"], {"text": query["text"], "right": query["right"], "answers": []})
            entry["answers"].append({"name": result.name, "place": query["place"], "found": query["found"]})
    return list(merged.values())


def _side_by_side(lists: Sequence[Sequence[dict[str, Any]]], key: str) -> list[dict[str, Any]]:
    """Maps of the same picture from every checkpoint, in one row; checkpoints may see it at other resolutions."""
    count = max((len(one) for one in lists), default=0)
    rows = []
    for index in range(count):
        own = [one[index] for one in lists if index < len(one)]
        rows.append(
            {
                "picture": own[0]["picture"],
                "text": own[0].get("text", ""),
                "maps": [one[index]["map"] if index < len(one) else None for one in lists],
            }
        )
    return rows


def _pair(pair: Comparison) -> dict[str, Any]:
    return {
        "first": pair.first,
        "second": pair.second,
        "verdict": pair.verdict(),
        "left_out": pair.left_out,
        "rows": [
            {
                "metric": f"{row.evaluator}: {full_label(row.metric)}",
                "first": shown(row.metric, row.first),
                "second": shown(row.metric, row.second),
                "value": row.difference.value,
                "difference": f"{100 * row.difference.value:+.1f} "
                f"({100 * row.difference.low:+.1f} to {100 * row.difference.high:+.1f})",
                "p": row.corrected_p,
                "said": "differs" if row.differs else "noise",
            }
            for row in pair.rows
        ],
    }


def full_label(metric: str) -> str:
    """A metric by a name that stands alone."""
    way = {"t2i": "text to image ", "i2t": "image to text "}.get(metric[:3], "")
    return way + label(metric).removeprefix(way)


def _reported(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Ours beside the published numbers, where a checkpoint is a released one."""
    rows = []
    for result in results:
        for name, measured in result.measured.items():
            for metric in measured["reported"]:
                found = beside(result.content["checkpoint"]["released"], measured, metric)
                if found is not None:
                    rows.append(
                        {
                            "name": result.name,
                            "metric": f"{name}: {full_label(metric)}",
                            "ours": f"{found.ours:.1f} ({found.low:.1f}-{found.high:.1f})",
                            "value": found.ours,
                            "reported": found.value,
                            "agrees": found.agrees,
                        }
                    )
    return rows


def _facts(result: Result) -> dict[str, Any]:
    """What is needed to compute the numbers again."""
    content = result.content
    checkpoint = content["checkpoint"]
    command = " ".join(Path(word).name if index == 0 else word for index, word in enumerate(content["command"]))
    data = {place: identity for entry in content["results"] for place, identity in entry["data"].items()}
    lines = [
        ("checkpoint", checkpoint["source"]),
        ("weights, SHA-256", checkpoint["sha256"]),
        ("recipe, SHA-256", checkpoint["recipe_sha256"] or "none came along"),
        ("commit of the code", (content["git"] or {}).get("commit", "not a git checkout")),
        ("command", command),
        ("libraries", ", ".join(f"{name} {found}" for name, found in content["libraries"].items())),
        ("settings", ", ".join(f"{name} {value}" for name, value in content["settings"].items())),
        ("suite, SHA-256", content["suite"]["sha256"]),
    ]
    lines += [(f"data {place}", identity) for place, identity in data.items()]
    return {"name": result.name, "lines": lines, "recipe": checkpoint["recipe"]}
