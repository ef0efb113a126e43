"""Tables and plots of the statistics of shards: rich tables for the terminal, PNGs by matplotlib (extra `report`)."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from openvision.data.tools.stats import DECODER_LENGTH, TEXT_KINDS, TOWER_LENGTH, Statistics
from openvision.errors import require
from openvision.files import JsonObject, atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Mean lengths in the Recap-DataComp-1B paper (arXiv 2406.08478), which does not say whether in words or in tokens.
_RECAP = "Recap-DataComp-1B: mean 10.22, 49.43"

_TITLES = {"alt": "alt-text", "synthetic": "synthetic caption", "sentence": "its sentences"}
_COLUMNS = {"min": "min", "p5": "5 %", "median": "median", "mean": "mean", "p95": "95 %", "max": "max"}
_IMAGE_ROWS = {
    "width": "width, px",
    "height": "height, px",
    "shorter_side": "shorter side, px",
    "aspect": "width / height",
    "bytes": "bytes",
}
_LENGTH_ROWS = ("mean", "median", "p95", "max")
_SHARE_ROWS = {
    "over_80": "longer than 80, %",
    "over_128": "longer than 128, %",
    "cut_at_80": "cut in a text tower of 80, %",
    "cut_at_128": "cut in a decoder of 128, %",
}
_BYTE_TICKS = [step * 10.0**power for power in range(2, 8) for step in (1, 3)]
_INK, _MUTED, _GRID, _COLOURS = "#1b1f27", "#667085", "#e6e8ee", ("#2b62d9", "#d1600f", "#0b8a74")


def tables(summary: JsonObject) -> list[Table]:
    """The tables of images and texts that `openvision data stats` prints."""
    return [_image_table(summary), _text_table(summary)]


def _image_table(summary: JsonObject) -> Table:
    images = summary["pictures"]
    formats = ", ".join(f"{kind} {_percent(count / summary['read'])} %" for kind, count in images["formats"].items())
    of = "" if summary["read"] == summary["samples"] else f" of {summary['samples']:,}"
    title = f"{summary['read']:,}{of} images, {images['distinct']:,} distinct, {_bytes(images['total_bytes'])}"
    table = Table(
        "", title=title, caption=f"formats: {formats or 'none'}", title_justify="left", caption_justify="left"
    )
    for column in _COLUMNS.values():
        table.add_column(column, justify="right")
    for name, label in _IMAGE_ROWS.items():
        values = images[name] or {}
        table.add_row(label, *(_number(values.get(column)) for column in _COLUMNS))
    return table


def _text_table(summary: JsonObject) -> Table:
    table = Table("", title="Texts", caption=_RECAP, title_justify="left", caption_justify="left")
    for kind in TEXT_KINDS:
        table.add_column(_TITLES[kind], justify="right")
    texts = [summary["texts"][kind] for kind in TEXT_KINDS]
    table.add_row("texts", *(f"{one['texts']:,}" for one in texts))
    table.add_row("samples without", *(f"{one['samples_without']:,}" for one in texts))
    table.add_row("distinct texts", *(f"{one['distinct']:,}" for one in texts), end_section=True)
    for unit in ("words", "tokens"):
        if unit in texts[0]:
            _add_lengths(table, unit, texts)
    return table


def _add_lengths(table: Table, unit: str, texts: Sequence[JsonObject]) -> None:
    table.add_row(f"distinct {unit}", *(f"{one[f'distinct_{unit}']:,}" for one in texts))
    for name in _LENGTH_ROWS:
        label = {"p95": "95 %", "max": "longest"}.get(name, name)
        table.add_row(f"{unit}, {label}", *(_number(one[unit].get(name)) for one in texts))
    for name, label in _SHARE_ROWS.items():
        if name in texts[0][unit]:
            last = name == "over_128" and unit == "words"
            table.add_row(label, *(_percent(one[unit][name]) for one in texts), end_section=last)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _bytes(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def write_plots(found: Statistics, folder: Path) -> list[Path]:
    """Write captions.png and images.png into `folder`; needs the extra `report`."""
    figures = {"captions.png": _captions_figure(found), "images.png": _images_figure(found)}
    pngs = {name: _to_png(figure) for name, figure in figures.items()}
    for name, png in pngs.items():
        atomic_write_bytes(folder / name, png)
    return [folder / name for name in pngs]


def _captions_figure(found: Statistics) -> "Figure":
    """Histograms of text lengths, a panel for each kind, with the context lengths of the models."""
    unit = "words" if found.vocab_size is None else "tokens"
    figure = _figure(11, 3.4)
    for axis, kind, colour in zip(figure.subplots(1, 3), TEXT_KINDS, _COLOURS, strict=True):
        lengths = np.asarray(getattr(found.texts[kind], unit))
        _style(axis, _TITLES[kind], f"{unit} a text")
        axis.locator_params(axis="x", integer=True)
        if not len(lengths):
            axis.text(0.5, 0.5, "none", color=_MUTED, ha="center", transform=axis.transAxes)
            continue
        # The longest 1 % go into the last bar, or they would squeeze all others.
        end = max(float(np.quantile(lengths, 0.99)), 8.0)
        axis.hist(lengths.clip(max=end), bins=_whole_bins(end), color=colour, alpha=0.85)
        for limit in (TOWER_LENGTH, DECODER_LENGTH):
            if limit <= 1.3 * end:
                axis.axvline(limit, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
                axis.annotate(str(limit), (limit, 0.97), xycoords=("data", "axes fraction"), fontsize=8, color=_INK)
        axis.axvline(lengths.mean(), color=colour, linewidth=1.4)
        axis.set_title(f"mean {lengths.mean():.1f}", color=_MUTED, fontsize=9, loc="right", pad=10)
    figure.tight_layout(w_pad=2.0)
    return figure


def _whole_bins(end: float) -> np.ndarray:
    """Edges of at most 40 bars of integer width, so that every bar covers as many lengths."""
    width = max(1, int(np.ceil(end / 40)))
    return np.arange(0, end + width + 1, width) - 0.5


def _images_figure(found: Statistics) -> "Figure":
    """Sizes, aspect ratios and bytes of the images."""
    widths, heights = (np.asarray(values, float) for values in (found.images.widths, found.images.heights))
    sizes = np.asarray(found.images.sizes, float)
    figure = _figure(11, 3.4)
    first, second, third = figure.subplots(1, 3)
    _style(first, "sizes", "width, px")
    first.set_ylabel("height, px", color=_MUTED, fontsize=9)
    first.scatter(widths, heights, s=9, color=_COLOURS[0], alpha=max(0.05, min(0.6, 200 / max(len(widths), 1))), lw=0)
    end = 1.06 * max(widths.max(initial=1), heights.max(initial=1))
    first.set(xlim=(0, end), ylim=(0, end))
    _style(second, "width / height", "logarithmic")
    _log_histogram(second, widths / np.maximum(heights, 1), _COLOURS[1], (0.5, 1, 2), at_least=(0.4, 2.5))
    _style(third, "bytes per image", "logarithmic")
    _log_histogram(third, sizes, _COLOURS[2], _BYTE_TICKS)
    figure.tight_layout(w_pad=2.0)
    return figure


def _log_histogram(
    axis: "Axes", values: np.ndarray, colour: str, ticks: Sequence[float], at_least: tuple[float, float] | None = None
) -> None:
    """Bars of equal width on a logarithmic axis."""
    values = values[values > 0]
    if not len(values):
        axis.text(0.5, 0.5, "none", color=_MUTED, ha="center", transform=axis.transAxes)
        return
    low, high = at_least or (values.min(), values.max())
    low, high = min(low, values.min() / 1.05), max(high, values.max() * 1.05)
    axis.set_xscale("log")
    axis.hist(values, bins=np.geomspace(low, high, 42).tolist(), color=colour, alpha=0.85)
    axis.set_xlim(low, high)
    inside = [tick for tick in ticks if low <= tick <= high]
    if inside:
        axis.set_xticks(inside, [_tick(tick) for tick in inside])
        axis.minorticks_off()


def _tick(value: float) -> str:
    return f"{value:g}" if value < 1000 else _bytes(int(value)).replace(".0", "")


def _figure(width: float, height: float) -> "Figure":
    figure = require("matplotlib.figure", extra="report").Figure(figsize=(width, height), facecolor="white")
    require("matplotlib.backends.backend_agg", extra="report").FigureCanvasAgg(figure)
    return figure


def _style(axis: "Axes", title: str, label: str) -> None:
    axis.grid(True, color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=_MUTED, labelsize=8.5, length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.set_title(title, color=_INK, fontsize=10.5, fontweight="bold", loc="left", pad=10)
    axis.set_xlabel(label, color=_MUTED, fontsize=9)


def _to_png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()
