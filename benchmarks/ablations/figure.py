"""A table as a picture: accuracy against seconds, or against how much alt-texts say, on held-out scenes."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ablations.rows import spread, values_of
from ablations.variants import VARIANTS
from openvision.evaluation.report.figures import LIGHT, figure, style, to_png
from openvision.files import JsonObject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Titles and metrics of the bars: what one asks an encoder first.
BARS = (
    ("single objects", "top1", "single objects\nnamed"),
    ("heldout_combinations, short sentences", "t2i_r1", "short sentence\nto scene, R@1"),
    ("heldout_combinations, short sentences", "t2i_r5", "R@5"),
)
# Beside them where recipes are compared: what patches tell.
PATCHES = ("heldout_combinations, masks", "linear_miou", "object masks\nby patch, mIoU")
# Metrics of the lines, measured between stages.
CURVES = (("sentence_t2i_r1", "caption sentence to scene, R@1"), ("top1", "main object named, top-1"))
# One hue for each side; ours are the first two.
COLOURS = ("#2b62d9", "#7aa5ff", "#d1600f", "#e8a15c", "#0b8a74", "#8a3ffc")


def is_drawn(row: JsonObject) -> bool:
    """Whether pictures show a row: one of equal time, of a model that names and finds, not only captions."""
    return bool(row["planned_seconds"]) and all(metric in point for point in row["curve"] for metric, _ in CURVES)


def picture(rows: Sequence[JsonObject]) -> bytes:
    """PNG of rows of equal planned time, that of what they start from included: every line or bar a variant, its mean
    over seeds and the range of them.
    """
    sides: dict[str, list[JsonObject]] = {}
    for row in rows:
        sides.setdefault(row["title"], []).append(row)
    made = figure(14.4, 3.9)
    *lines, right = made.subplots(1, 3, width_ratios=(1, 1, 2))
    for axis, (metric, label) in zip(lines, CURVES, strict=True):
        for colour, (title, own) in zip(COLOURS, sides.items(), strict=False):
            _line(axis, own, metric, colour, title)
        style(axis, LIGHT, f"{label}, %")
        axis.set_xlabel("planned seconds of one core; validation scenes", color=LIGHT.muted, fontsize=9)
        axis.set_ylim(bottom=0)
    lines[0].legend(frameon=False, labelcolor=LIGHT.text, fontsize=8.5, loc="upper left")
    width, bars = 0.8 / max(len(sides), 1), (*BARS, PATCHES)
    for number, (colour, own) in enumerate(zip(COLOURS, sides.values(), strict=False)):
        for place, (title, metric, _) in enumerate(bars):
            if values := values_of(own, title, metric):
                _bar(right, place + (number - (len(sides) - 1) / 2) * width, values, width, colour)
    style(right, LIGHT, "held-out scenes, at the end, %")
    right.set_xticks(range(len(bars)), [label for _, _, label in bars], color=LIGHT.text, fontsize=9)
    right.margins(y=0.15)
    made.tight_layout(w_pad=2.0)
    return to_png(made)


def crossing(rows: Sequence[JsonObject]) -> bytes:
    """PNG of the full recipe, without its decoder, and plain CLIP against the share of alt-texts that say anything."""
    made = figure(10.4, 3.6)
    sides = {"full": "full recipe", "no_decoder": "without decoder", "clip": "plain CLIP"}
    for axis, (title, metric, label) in zip(made.subplots(1, len(BARS)), BARS, strict=True):
        for colour, (side, text) in zip(COLOURS, sides.items(), strict=False):
            shares: dict[float, list[float]] = {}
            for row in rows:
                if row["variant"].partition("_alt")[0] == side:
                    share = 100 * VARIANTS[row["variant"]].world.informative
                    shares.setdefault(share, []).extend(values_of([row], title, metric))
            points = sorted((share, values) for share, values in shares.items() if values)
            places, means = [share for share, _ in points], [statistics.mean(values) for _, values in points]
            axis.plot(places, means, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=text)
            axis.fill_between(
                places,
                [min(values) for _, values in points],
                [max(values) for _, values in points],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
        style(axis, LIGHT, label.replace("\n", " ") + ", %")
        axis.set_xlabel("alt-texts that say anything, %", color=LIGHT.muted, fontsize=9)
        axis.set_ylim(bottom=0)
    made.axes[0].legend(frameon=False, labelcolor=LIGHT.text, fontsize=8.5)
    made.tight_layout(w_pad=2.0)
    return to_png(made)


def _line(axis: "Axes", rows: Sequence[JsonObject], metric: str, colour: str, title: str) -> None:
    curves = [[(_planned(row, point), 100 * point[metric]) for point in row["curve"]] for row in rows]
    # What a run starts from was not measured here, so its line begins where it was.
    fresh = not any(_before(row) for row in rows)
    seconds, means, lows, highs = ([0.0] * fresh for _ in range(4))
    for seeds in zip(*curves, strict=False):
        values = [value for _, value in seeds]
        seconds.append(statistics.mean(second for second, _ in seeds))
        means.append(statistics.mean(values))
        lows.append(min(values))
        highs.append(max(values))
    axis.plot(seconds, means, color=colour, linewidth=1.8, marker="o", markersize=3.2, label=title)
    axis.fill_between(seconds, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _planned(row: JsonObject, point: JsonObject) -> float:
    """Planned seconds at a point of a run, which took longer beside other work or on another machine."""
    return _before(row) + row["planned_seconds"] * point["seconds"] / row["seconds"]


def _before(row: JsonObject) -> float:
    """Planned seconds of the run that this one starts from."""
    return row.get("start_seconds") or 0.0


def _bar(axis: "Axes", place: float, values: Sequence[float], width: float, colour: str) -> None:
    mean = statistics.mean(values)
    axis.bar(place, mean, width * 0.92, color=colour)
    axis.plot([place, place], [min(values), max(values)], color=LIGHT.text, linewidth=1)
    axis.text(
        place, max(values), spread([mean]), ha="center", va="bottom", fontsize=7.5, color=LIGHT.text, clip_on=False
    )
