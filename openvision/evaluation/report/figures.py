"""Figures of the pages: learning curves, accuracy over compute, calibration, galleries.

Matplotlib is used without its global state: every figure is an object of its own. Curves exist for light and for dark
pages. Galleries are drawn on white cards, as the images themselves are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from textwrap import wrap
from typing import TYPE_CHECKING

from openvision.errors import require
from openvision.evaluation.report.gallery import Neighbours, Pixels, Query, pixels_of
from openvision.evaluation.suites.results import Result
from openvision.files import JsonObject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    name: str
    surface: str
    text: str
    muted: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme("light", "#ffffff", "#1b1f27", "#667085", "#e6e8ee", ("#2b62d9", "#d1600f", "#0b8a74", "#8a3ffc"))
DARK = Theme("dark", "#171a21", "#eceef3", "#98a1b3", "#2b303b", ("#7aa5ff", "#ff9d5c", "#45cfb5", "#c39bff"))
RIGHT, ASKED = "#0b8a74", LIGHT.series[0]


def figure(width: float, height: float, theme: Theme = LIGHT) -> "Figure":
    """An empty matplotlib figure of `width` x `height` inches on the theme's surface."""
    made = require("matplotlib.figure", extra="report").Figure(figsize=(width, height), facecolor=theme.surface)
    require("matplotlib.backends.backend_agg", extra="report").FigureCanvasAgg(made)
    return made


def to_png(made: "Figure", dpi: int = 160) -> bytes:
    """A figure as PNG."""
    buffer = BytesIO()
    made.savefig(buffer, format="png", dpi=dpi, facecolor=made.get_facecolor())
    return buffer.getvalue()


_KINDS = (("alt", "alt-text"), ("sentence", "sentence"), ("joint", "both in one softmax"))
"""Kinds of the contrastive loss in the log."""


def learning_curves(lines: Sequence[JsonObject], theme: Theme = LIGHT) -> "Figure":
    """Loss terms, logit scale and learning rate over samples seen; stages shaded and named by resolution."""
    train = [line for line in lines if line["kind"] == "train"]
    made = figure(9.6, 5.4, theme)
    axes = made.subplots(2, 2, sharex=True)
    panels = (
        ("contrastive loss", tuple((f"contrastive_{key}", label) for key, label in _KINDS)),
        ("caption loss", (("caption", "caption"),)),
        (
            "logit scale, exp of the learned parameter",
            (("logit_scale", "logit scale"), ("logit_scale_sentence", "of sentences")),
        ),
        ("learning rate", (("lr", "learning rate"),)),
    )
    for axis, (title, series) in zip(axes.flat, panels, strict=True):
        present = [(key, label) for key, label in series if any(line.get(key) is not None for line in train)]
        for colour, (key, label) in zip(theme.series, present, strict=False):
            points = [(line["samples"] / 1000, line[key]) for line in train if line.get(key) is not None]
            axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, label=label)
        style(axis, theme, title)
        _mark_stages(axis, train, "samples", 1000, theme)
        if len(present) > 1:
            axis.legend(frameon=False, labelcolor=theme.text, fontsize=8.5, loc="best")
        if not present:
            axis.text(0.5, 0.5, "not part of this recipe", color=theme.muted, ha="center", transform=axis.transAxes)
    axes[1][1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes[1][1].yaxis.get_offset_text().set(color=theme.muted, fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("samples seen, thousands", color=theme.muted, fontsize=9)
    made.tight_layout(h_pad=1.6, w_pad=2.0)
    return made


def accuracy_over_compute(lines: Sequence[JsonObject], theme: Theme = LIGHT) -> "Figure":
    """Validation accuracy against training compute and against training time."""
    measured = [line for line in lines if line["kind"] == "eval"]
    made = figure(9.6, 3.7, theme)
    axes = made.subplots(1, 2, sharey=True)
    series = (("top5", "zero-shot top-5"), ("top1", "zero-shot top-1"), ("t2i_r1", "text to image R@1"))
    for axis, key, label, divisor in (
        (axes[0], "tflops", "training compute, TFLOP", 1),
        (axes[1], "seconds", "training time, minutes", 60),
    ):
        for colour, (metric, name) in zip(theme.series, series, strict=False):
            points = [(line[key] / divisor, 100 * line[metric]) for line in measured if metric in line]
            if points:
                axis.plot(
                    *zip(*points, strict=True), color=colour, linewidth=1.8, marker="o", markersize=3.2, label=name
                )
        style(axis, theme, "validation, %" if key == "tflops" else " ")
        axis.set_xlabel(label, color=theme.muted, fontsize=9)
        axis.set_ylim(bottom=0)
        _mark_stages(axis, lines, key, divisor, theme)
    if measured:
        axes[1].legend(frameon=False, labelcolor=theme.text, fontsize=8.5, loc="best")
    made.tight_layout(w_pad=2.0)
    return made


def style(axis: "Axes", theme: Theme, title: str) -> None:
    """Give axes the theme: a quiet grid, no frame, the title at the left."""
    axis.set_facecolor(theme.surface)
    axis.grid(True, color=theme.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=theme.muted, labelsize=8.5, length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    if title:
        axis.set_title(title, color=theme.text, fontsize=10.5, fontweight="bold", loc="left", pad=14)


def stage_spans(lines: Sequence[JsonObject], key: str, divisor: float = 1) -> list[tuple[float, float, str]]:
    """Begin, end and label of every stage along `key` ("samples", "tflops", "seconds")."""
    spans: list[tuple[float, float, str]] = []
    begin = 0.0
    for stage in sorted({line["stage"] for line in lines}):
        members = [line for line in lines if line["stage"] == stage]
        resolution = next((line["resolution"] for line in members if "resolution" in line), None)
        end = max(line[key] for line in members) / divisor
        spans.append((begin, end, f"{resolution} px" if resolution else f"stage {stage + 1}"))
        begin = end
    return spans


def _mark_stages(axis: "Axes", lines: Sequence[JsonObject], key: str, divisor: float, theme: Theme) -> None:
    """Shade every other stage and write its resolution above the plot."""
    for number, (begin, end, label) in enumerate(stage_spans(lines, key, divisor)):
        if number % 2:
            axis.axvspan(begin, end, color=theme.grid, alpha=0.55, linewidth=0)
        if number:
            axis.axvline(begin, color=theme.muted, linewidth=0.8, linestyle=(0, (3, 3)))
        axis.set_xlim(0, end)
        axis.annotate(
            label,
            ((begin + end) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            color=theme.muted,
        )


def retrieval_figure(queries: Sequence[Query], images: dict[str, str], columns: int = 5) -> "Figure":
    """Texts and the images nearest to them, the right one framed; `images` are those of the gallery."""
    made = figure(1.25 * columns + 3.1, 1.32 * len(queries) + 0.5)
    grid = _grid(made, len(queries), columns, 2.3)
    for row, query in enumerate(queries):
        _write(grid[row][0], query["text"], LIGHT.text)
        for axis, found in zip(grid[row][1:], query["found"], strict=False):
            _show(axis, pixels_of(images[found["image"]]), RIGHT if found["right"] else None)
        if not any(found["right"] for found in query["found"]):
            note = f"right one: place {query['place']}"
            grid[row][0].text(0, 0.08, note, fontsize=7.5, color=LIGHT.muted, transform=grid[row][0].transAxes)
    return made


def neighbours_figure(examples: Sequence[Neighbours], images: dict[str, str], columns: int = 5) -> "Figure":
    """Held-out images (left) and the training images nearest to them."""
    made = figure(1.35 * (columns + 1) + 0.6, 1.55 * len(examples) + 0.4)
    grid = _grid(made, len(examples), columns + 1, 0)
    for row, example in enumerate(examples):
        cells = [(example["image"], example["name"], True)]
        cells += [(found["image"], found["name"], False) for found in example["nearest"]]
        for axis, (image, name, held_out) in zip(grid[row], cells, strict=False):
            _show(axis, pixels_of(images[image]), ASKED if held_out else None)
            title = wrap(name, 24, max_lines=2, placeholder=" ...")
            axis.set_title("\n".join(title), fontsize=6, color=LIGHT.muted, pad=3)
    return made


def stacked_figure(stacks: Sequence[Sequence[str]], images: dict[str, str], columns: int = 6) -> "Figure":
    """Stacks of equally many images, e.g. one above its map; the names are those of `images`."""
    rows, height = -(-len(stacks) // columns), max((len(stack) for stack in stacks), default=1)
    made = figure(1.5 * columns, 1.55 * height * rows)
    grid = _grid(made, height * rows, columns, 0)
    for index, stack in enumerate(stacks):
        row, column = divmod(index, columns)
        for below, name in enumerate(stack):
            _show(grid[height * row + below][column], pixels_of(images[name]))
    return made


def _grid(made: "Figure", rows: int, columns: int, text_width: float) -> list[list["Axes"]]:
    """Axes without frames; a first column `text_width` times as wide as an image when that is not 0."""
    widths = ([text_width] if text_width else []) + [1.0] * columns
    spec = made.add_gridspec(
        rows, len(widths), width_ratios=widths, left=0.02, right=0.98, top=0.97, bottom=0.02, wspace=0.12, hspace=0.22
    )
    grid = [[made.add_subplot(spec[row, column]) for column in range(len(widths))] for row in range(rows)]
    for axis in (axis for line in grid for axis in line):
        axis.set_axis_off()
    return grid


def _write(axis: "Axes", text: str, colour: str) -> None:
    axis.text(0, 0.5, "\n".join(wrap(text, 24)), fontsize=11, color=colour, va="center", transform=axis.transAxes)


def _show(axis: "Axes", pixels: Pixels, frame: str | None = None) -> None:
    axis.set_axis_on()
    axis.imshow(pixels, interpolation="nearest" if min(pixels.shape[:2]) < 64 else "antialiased")
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_color(frame or LIGHT.grid)
        side.set_linewidth(2.6 if frame else 0.8)


# Of the numbers measured while training, those worth a curve, in this order.
_SHOWN = (("top1", "zero-shot top-1"), ("t2i_r1", "text to image R@1"))
# Distinguishable in both themes; further checkpoints start over.
_COLOURS = ("#2b62d9", "#d1600f", "#0b8a74", "#8a3ffc", "#c2185b", "#7a8aa0")


def colour(number: int) -> str:
    """The colour of a checkpoint, by its place."""
    return _COLOURS[number % len(_COLOURS)]


def has_history(results: Sequence[Result]) -> bool:
    """Whether any checkpoint was measured while it was trained."""
    return any(metric in line for result in results for line in result.content["history"] for metric, _ in _SHOWN)


def training_curves(results: Sequence[Result], theme: Theme = LIGHT) -> "Figure":
    """Validation accuracy over samples seen, a curve a checkpoint."""
    made = figure(9.6, 3.7, theme)
    axes = made.subplots(1, 2)
    for axis, (metric, label) in zip(axes, _SHOWN, strict=True):
        for number, result in enumerate(results):
            points = [
                (line["samples"] / 1000, 100 * line[metric]) for line in result.content["history"] if metric in line
            ]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour(number), linewidth=1.7, label=result.name)
        style(axis, theme, f"{label}, %")
        axis.set_xlabel("samples seen, thousands", color=theme.muted, fontsize=9)
        axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False, labelcolor=theme.text, fontsize=8.5, loc="best")
    made.tight_layout(w_pad=2.0)
    return made


def reliability(results: Sequence[Result], evaluator: str, theme: Theme = LIGHT) -> "Figure":
    """Share of right answers over how sure the model was; on the diagonal a model knows what it knows."""
    made = figure(4.8, 3.7, theme)
    axis = made.subplots()
    axis.plot([0, 100], [0, 100], color=theme.muted, linewidth=0.9, linestyle=(0, (3, 3)))
    for number, result in enumerate(results):
        found = result.measured.get(evaluator, {}).get("details", {}).get("reliability")
        if found:
            sure, right = ([100 * value for value in found[key]] for key in ("confidence", "accuracy"))
            axis.plot(sure, right, color=colour(number), linewidth=1.7, marker="o", markersize=3.4, label=result.name)
    style(axis, theme, "right answers, %")
    axis.set_xlabel("confidence, %", color=theme.muted, fontsize=9)
    axis.set_xlim(0, 100)
    axis.set_ylim(0, 100)
    axis.legend(frameon=False, labelcolor=theme.text, fontsize=8.5, loc="upper left")
    made.tight_layout()
    return made
