"""The report of a run: one HTML page that needs nothing but itself, and PNGs of its figures.

    RUN/report/index.html           images inside as data URIs, no request to any server
    RUN/report/learning_curves.png  accuracy.png, retrieval.png, neighbours.png, patches.png
    RUN/report/reconstructions.png  of OpenVision 3; with a generator generated.png and generated.json

The page is written completely or not at all. Its numbers and examples are those of the run's suite (suites/own.py).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from openvision.errors import OpenVisionError
from openvision.evaluation.report import figures
from openvision.evaluation.report.gallery import (
    GALLERY,
    SEED,
    Album,
    Caption,
    Gallery,
    Map,
    Mistake,
    Neighbours,
    Query,
    read_gallery,
    write_gallery,
)
from openvision.evaluation.report.generated import Generated, reconstruction_table
from openvision.evaluation.report.parts import Cell, Maps, Row, Table, asked, chart, provenance, side_by_side
from openvision.evaluation.report.template import render
from openvision.evaluation.suites.held_out import METRICS, MODEL, HeldOut, current_result, held_out_sets
from openvision.evaluation.suites.own import recipe_of_run, suite_of_run
from openvision.evaluation.suites.results import Result
from openvision.evaluation.suites.run import Settings, evaluated
from openvision.evaluation.suites.suite import title_on, usable
from openvision.files import JsonObject, atomic_folder
from openvision.renamed import read_metrics
from openvision.weights.load import load_checkpoint

# Evaluators whose texts are shown with the images they find: the first of these that there is.
QUERIES = ("short sentences", "name retrieval", "first sentences", "alt-texts")


@dataclass(frozen=True)
class Bar:
    """Zero-shot top-1 of a row, in percent."""

    name: str
    value: float
    text: str
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SetView:
    """A held-out set as bars and tables."""

    title: str
    anchor: str
    images: int
    candidates: int
    bars: list[Bar]
    table: Table
    groups: Table | None


def build_report(
    run: Path,
    data: str | Path | None = None,
    generated: Generated | None = None,
    settings: Settings | None = None,
) -> Path:
    """Write RUN/report and return the path of its index.html; `data` is by default what the run was trained on.

    `generated` are images of a generator on the tokens of the run's encoder. Measures first, by `settings`, when
    RUN/evaluation.json is missing or about other weights. Raises OpenVisionError when the run has no model, no metrics,
    no text tower, or its data are missing.
    """
    lines = read_log(run / "metrics.jsonl")
    result = current_result(run, data, settings)
    sets = held_out_sets(result)
    if not sets:
        raise OpenVisionError(
            f"{run}: its evaluation holds no zero-shot numbers, which the report is about; a model without a text "
            "tower is measured by `openvision eval`"
        )
    if not (run / GALLERY).is_file():
        _write_missing_gallery(run, data, settings or Settings())
    gallery = read_gallery(run)
    examples = _examples(gallery, sets[0].name)
    notes = suite_of_run(run, data)[0].notes
    made = _add_generated(gallery, generated)
    page = render("report.html", _context(run, lines, result, sets, notes, gallery, examples, generated, made))
    with atomic_folder(run / "report") as folder:
        (folder / "index.html").write_text(page, encoding="utf-8")
        for name, png in _pngs(lines, gallery, examples, made).items():
            (folder / name).write_bytes(png)
        if generated is not None:
            content = {"rows": generated.rows, "facts": generated.facts}
            (folder / "generated.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return run / "report" / "index.html"


def read_log(path: Path) -> list[JsonObject]:
    """Lines of a run's metrics.jsonl; raises OpenVisionError when it is missing or holds no training step."""
    lines = read_metrics(path)
    if not any(line.get("kind") == "train" for line in lines):
        raise OpenVisionError(f"{path} holds no training steps; train the run first")
    return lines


def _write_missing_gallery(run: Path, data: str | Path | None, settings: Settings) -> None:
    """The gallery of an evaluation by an earlier version, which wrote none."""
    suite, folder = suite_of_run(run, data)
    model = evaluated(load_checkpoint(run / "model"), settings)
    chosen, _ = usable(suite.evaluators, model.has_text, model.has_decoder)
    write_gallery(run, suite.shown(chosen), model, folder)


@dataclass
class Examples:
    """What the evaluators of one set show."""

    queries: list[Query] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    neighbours: list[Neighbours] = field(default_factory=list)
    captions: list[Caption] = field(default_factory=list)
    reconstructions: list[Map] = field(default_factory=list)
    ceilings: list[Map] = field(default_factory=list)

    def reconstructed(self) -> list[Maps]:
        """Images beside what the autoencoder alone, which older galleries lack, and the encoder keep of them."""
        return side_by_side([one for one in (self.ceilings, self.reconstructions) if one])


def _examples(gallery: Gallery, data: str) -> Examples:
    """Texts to images, mistakes by name, and the neighbours and captions of any evaluator."""
    shown = gallery["evaluators"]
    queries = [shown.get(title_on(data, name), {}).get("queries", []) for name in QUERIES]
    examples = Examples(
        next((one for one in queries if one), []), shown.get(title_on(data, "names"), {}).get("mistakes", [])
    )
    for one in shown.values():
        examples.neighbours = one.get("neighbours", examples.neighbours)
        examples.captions = one.get("captions", examples.captions)
        examples.reconstructions = one.get("reconstructions", examples.reconstructions)
        examples.ceilings = one.get("ceilings", examples.ceilings)
    return examples


def _add_generated(gallery: Gallery, generated: Generated | None) -> list[Maps]:
    """Examples of a generator, their images added to those of the gallery."""
    album = Album()
    made = generated.examples(album) if generated is not None else []
    gallery["images"] |= album.images
    return made


def _pngs(lines: list[JsonObject], gallery: Gallery, examples: Examples, made: Sequence[Maps]) -> dict[str, bytes]:
    images = gallery["images"]
    shown = {
        "patches": side_by_side([gallery["patches"]]),
        "reconstructions": examples.reconstructed(),
        "generated": made,
    }
    stacks = {name: [[one.image, *filter(None, one.maps)] for one in rows] for name, rows in shown.items() if rows}
    return {
        "learning_curves.png": figures.to_png(figures.learning_curves(lines)),
        "accuracy.png": figures.to_png(figures.accuracy_over_compute(lines)),
        "retrieval.png": figures.to_png(figures.retrieval_figure(examples.queries, images), dpi=110),
        "neighbours.png": figures.to_png(figures.neighbours_figure(examples.neighbours, images), dpi=110),
        **{f"{name}.png": figures.to_png(figures.stacked_figure(one, images), dpi=110) for name, one in stacks.items()},
    }


def _context(
    run: Path,
    lines: list[JsonObject],
    result: Result,
    sets: Sequence[HeldOut],
    notes: Sequence[str],
    gallery: Gallery,
    examples: Examples,
    generated: Generated | None,
    made: Sequence[Maps],
) -> dict[str, object]:
    """Everything the template reads."""
    recipe = recipe_of_run(run)
    return {
        "title": recipe.get("name", run.name),
        "description": recipe.get("description", ""),
        "start": recipe.get("start"),
        "notes": notes,
        "last": max((line for line in lines if line["kind"] == "train"), key=lambda line: line["step"]),
        "stages": figures.stage_spans(lines, "seconds"),
        "measured": any(line["kind"] == "eval" for line in lines),
        "headline": _headline(sets[0]),
        "sets": [_set_view(one) for one in sets],
        "curves": chart(figures.learning_curves, lines),
        "accuracy": chart(figures.accuracy_over_compute, lines),
        "examples": examples,
        "queries": asked([result.name], [examples.queries]),
        "patches": side_by_side([gallery["patches"]]),
        "reconstructions": examples.reconstructed(),
        "reconstruction_table": reconstruction_table(result.measured),
        "generated": generated,
        "generated_table": generated.table() if generated is not None else None,
        "made": made,
        "images": gallery["images"],
        "resolution": result.content["settings"]["resolution"],
        "intervals": result.content["settings"].get("intervals", "bootstrap"),
        "prompts": sets[0].prompts,
        "facts": provenance(result),
        "seed": SEED,
    }


def _headline(held_out: HeldOut) -> dict[str, str | int]:
    """Top-1 on the shown set beside the best training-free baseline."""
    others = {name: row["top1"].value for name, row in held_out.rows.items() if name != MODEL and "top1" in row}
    best = max(others, key=lambda name: others[name])
    return {
        "ours": held_out.percent(MODEL, "top1"),
        "top5": held_out.percent(MODEL, "top5"),
        "r1": held_out.percent(MODEL, "t2i_r1"),
        "best": best,
        "best_value": held_out.percent(best, "top1"),
        "chance": held_out.percent("chance", "top1"),
        "images": held_out.images,
        "candidates": held_out.candidates,
        "set": held_out.title,
    }


def _set_view(held_out: HeldOut) -> SetView:
    """A held-out set as bars of top-1 and as tables."""
    bars = []
    for name, row in held_out.rows.items():
        if (share := row.get("top1")) is not None:
            low, high = (100 * bound for bound in share.interval) if share.interval is not None else (None, None)
            bars.append(Bar(name, 100 * share.value, share.percent(), low, high))
    rows = [
        Row(
            label,
            [
                Cell(
                    held_out.percent(name, metric),
                    row[metric].value if metric in row else -1,
                    "ours" if name == MODEL else "",
                )
                for name, row in held_out.rows.items()
            ],
        )
        for metric, label in METRICS.items()
        if metric in held_out.rows[MODEL]
    ]
    groups = [Row(name, [Cell(f"{100 * value:.1f}", value)]) for name, value in sorted(held_out.by_group.items())]
    return SetView(
        held_out.title,
        held_out.name.replace("_", "-"),
        held_out.images,
        held_out.candidates,
        bars,
        Table("metric", list(held_out.rows), rows),
        Table("group", ["top-1, %"], groups) if groups else None,
    )
