"""Curves of the comparison page: accuracy while training, and whether models are right as often as they are sure."""

from collections.abc import Sequence
from typing import Any

from openvision.evaluation.figures import LIGHT, Theme, figure, style
from openvision.evaluation.results import Result

# Of the numbers measured while training, those worth a curve, in this order.
_SHOWN = (("top1", "zero-shot top-1"), ("t2i_r1", "text to image R@1"))
# Distinguishable in both themes; further checkpoints begin anew.
_COLOURS = ("#2b62d9", "#d1600f", "#0b8a74", "#8a3ffc", "#c2185b", "#7a8aa0")


def colour(number: int) -> str:
    """The colour of a checkpoint, by its place."""
    return _COLOURS[number % len(_COLOURS)]


def has_history(results: Sequence[Result]) -> bool:
    """Whether any checkpoint was measured while it was trained."""
    return any(metric in line for result in results for line in result.content["history"] for metric, _ in _SHOWN)


def training_curves(results: Sequence[Result], theme: Theme = LIGHT) -> Any:
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


def reliability(results: Sequence[Result], evaluator: str, theme: Theme = LIGHT) -> Any:
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
