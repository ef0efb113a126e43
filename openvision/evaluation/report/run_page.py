"""The report of a run: one HTML page that needs nothing but itself, and PNGs of its figures.

    RUN/report/index.html           pictures inside as data URIs, no request to anywhere
    RUN/report/learning_curves.png  accuracy.png, retrieval.png, neighbours.png, patches.png

The page is written completely or not at all. Examples are drawn by lot with a fixed seed (`gallery`).
"""

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openvision.data.shards.dataset import ShardDataset
from openvision.errors import OpenVisionError
from openvision.evaluation.report import figures
from openvision.evaluation.report.gallery import Picture, Study
from openvision.evaluation.report.template import png_uri, render
from openvision.evaluation.suites.artefact import file_sha256
from openvision.evaluation.suites.held_out import (
    HELD_OUT,
    METRICS,
    TRAIN,
    evaluate_run,
    load_evaluation,
    percent,
    set_title,
)
from openvision.files import atomic_folder
from openvision.renamed import read_metrics
from openvision.weights.folder import load_folder

# The galleries show the harder set.
SHOWN = HELD_OUT[0]
SEED = 0


@dataclass(frozen=True)
class Sizes:
    """How many examples of each kind the page shows."""

    retrieved: int = 8
    neighbours: int = 6
    captioned: int = 8
    mistakes: int = 8
    patches: int = 12


def build_report(run_folder: Path, data_folder: Path, sizes: Sizes | None = None) -> Path:
    """Write RUN/report and return the path of its index.html.

    Evaluates first when RUN/evaluation.json is missing or belongs to another checkpoint. Raises OpenVisionError when
    the run has no model, no metrics or its data are missing.
    """
    sizes = sizes or Sizes()
    lines = read_log(run_folder / "metrics.jsonl")
    evaluation = _current_evaluation(run_folder, data_folder)
    model, tokenizer, _ = load_folder(run_folder / "model")
    study = Study(model, tokenizer, ShardDataset(data_folder / TRAIN), ShardDataset(data_folder / SHOWN))
    examples = {
        "retrieved": study.retrieved(sizes.retrieved, SEED),
        "neighbours": study.neighbours(sizes.neighbours, SEED + 1),
        "captioned": study.captioned(sizes.captioned, SEED + 2),
        "mistakes": study.confident_mistakes(sizes.mistakes),
        "patches": study.patch_maps(sizes.patches, SEED + 3),
    }
    page = render("report.html", _context(run_folder, lines, evaluation, examples), uri=_source)
    with atomic_folder(run_folder / "report") as folder:
        (folder / "index.html").write_text(page, encoding="utf-8")
        for name, data in _pngs(lines, examples).items():
            (folder / name).write_bytes(data)
    return run_folder / "report" / "index.html"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl; raises OpenVisionError when it is missing or holds no training step."""
    lines = read_metrics(path)
    if not any(line.get("kind") == "train" for line in lines):
        raise OpenVisionError(f"{path} holds no training steps; train the run first")
    return lines


def _current_evaluation(run_folder: Path, data_folder: Path) -> dict[str, Any]:
    path = run_folder / "evaluation.json"
    checkpoint = file_sha256(run_folder / "model" / "model.safetensors")
    if path.is_file():
        evaluation = load_evaluation(path)
        if evaluation["artefact"]["checkpoint_sha256"] == checkpoint:
            return evaluation
    return evaluate_run(run_folder, data_folder)


def _pngs(lines: list[dict[str, Any]], examples: dict[str, Any]) -> dict[str, bytes]:
    return {
        "learning_curves.png": figures.to_png(figures.learning_curves(lines)),
        "accuracy.png": figures.to_png(figures.accuracy_over_compute(lines)),
        "retrieval.png": figures.to_png(figures.retrieval_figure(examples["retrieved"]), dpi=110),
        "neighbours.png": figures.to_png(figures.neighbours_figure(examples["neighbours"]), dpi=110),
        "patches.png": figures.to_png(figures.patch_figure(examples["patches"]), dpi=110),
    }


def _context(
    run_folder: Path, lines: list[dict[str, Any]], evaluation: dict[str, Any], examples: dict[str, Any]
) -> dict[str, Any]:
    """Everything the template reads."""
    recipe = _recipe(run_folder)
    last = max((line for line in lines if line["kind"] == "train"), key=lambda line: line["step"])
    return {
        "title": recipe.get("name", run_folder.name),
        "description": recipe.get("description", ""),
        "last": last,
        "stages": figures.stage_spans(lines, "seconds"),
        "measured": any(line["kind"] == "eval" for line in lines),
        "headline": _headline(evaluation),
        "sets": [_set_view(name, rows) for name, rows in evaluation["sets"].items()],
        "curves": _both_themes(figures.learning_curves, lines),
        "accuracy": _both_themes(figures.accuracy_over_compute, lines),
        "examples": examples,
        "protocol": evaluation["protocol"],
        "facts": _facts(evaluation),
        "shown": set_title(SHOWN),
        "seed": SEED,
    }


def _headline(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Top-1 on the shown set beside the best that needs no learning."""
    rows = evaluation["sets"][SHOWN]
    others = {name: row["top1"] for name, row in rows.items() if name != "model"}
    best = max(others, key=lambda name: others[name])
    return {
        "ours": percent(rows["model"], "top1"),
        "top5": percent(rows["model"], "top5"),
        "r1": percent(rows["model"], "t2i_r1"),
        "best": best,
        "best_value": percent(rows[best], "top1"),
        "chance": percent(rows["chance"], "top1"),
        "pictures": rows["model"]["pictures"],
        "candidates": rows["model"]["candidates"],
    }


def _set_view(name: str, rows: dict[str, Any]) -> dict[str, Any]:
    """A held-out set as bars of top-1 and as a table."""
    ours = rows["model"]
    bars = [
        {
            "name": row_name,
            "value": 100 * row["top1"],
            "text": percent(row, "top1"),
            "low": 100 * row.get("top1_ci", (row["top1"],) * 2)[0],
            "high": 100 * row.get("top1_ci", (row["top1"],) * 2)[1],
            "interval": "top1_ci" in row,
        }
        for row_name, row in rows.items()
    ]
    table = [
        {
            "label": label,
            "cells": [{"text": percent(row, metric), "value": row.get(metric, -1)} for row in rows.values()],
        }
        for metric, label in METRICS.items()
        if metric in ours
    ]
    return {
        "title": set_title(name),
        "anchor": name.replace("_", "-"),
        "pictures": ours["pictures"],
        "candidates": ours["candidates"],
        "columns": list(rows),
        "bars": bars,
        "table": table,
        "by_category": sorted(ours.get("top1_by_category", {}).items()),
    }


def _facts(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """What is needed to compute the numbers again."""
    artefact = evaluation["artefact"]
    facts = [
        ("checkpoint, SHA-256", artefact["checkpoint_sha256"]),
        ("recipe, SHA-256", artefact["recipe_sha256"] or "unknown"),
        ("commit of the code", (artefact["git"] or {}).get("commit", "not a git checkout")),
        ("command", " ".join(Path(word).name if i == 0 else word for i, word in enumerate(artefact["command"]))),
        ("libraries", ", ".join(f"{name} {found}" for name, found in artefact["libraries"].items())),
    ]
    facts += [(f"shards of {name}, SHA-256", found) for name, found in artefact["data_manifest_sha256"].items()]
    return facts


def _recipe(run_folder: Path) -> dict[str, Any]:
    path = run_folder / "recipe.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OpenVisionError(f"{path} cannot be read: {error}") from error


def _both_themes(draw: Callable[..., Any], lines: Sequence[dict[str, Any]]) -> dict[str, str]:
    return {theme.name: png_uri(figures.to_png(draw(lines, theme))) for theme in (figures.LIGHT, figures.DARK)}


def _source(picture: Picture | Any) -> str:
    """Data URI of a Picture or of RGB pixels."""
    return png_uri(figures.picture_png(picture.pixels if isinstance(picture, Picture) else picture))
