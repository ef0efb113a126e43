"""Evaluators of a recipe during training: every process measures its slice, all get the same numbers.

    named = due(evaluators, step, recipe.run.evaluate_every, last=step == stage.steps)
    if named:
        numbers = measure_in_training(named, model, tokenizer, data_folder, stage.resolution)

All processes must call it at the same step, with the same weights.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.base import Evaluator, due, measure_all, metrics_line
from openvision.evaluation.evaluators.model import Subject
from openvision.models.openvision import OpenVision
from openvision.models.vision import VisionTransformer
from openvision.runtime import Processes
from openvision.text.tokenizer import Tokenizer

__all__ = ["check_evaluators", "due", "less_is_better", "measure_in_training"]


def check_evaluators(evaluators: Sequence[Evaluator], root: str | Path, has_text: bool) -> None:
    """Raise OpenVisionError, before training, for an evaluator whose data are missing or that needs a text tower."""
    for evaluator in evaluators:
        if evaluator.needs_text and not has_text:
            raise OpenVisionError(
                f"evaluator {evaluator.title!r} ({evaluator.kind}) needs a text tower, which this recipe does not train"
            )
        missing = evaluator.missing(root)
        if missing is not None:
            raise OpenVisionError(f"evaluator {evaluator.title!r}: {missing} is missing")


def measure_in_training(
    evaluators: Sequence[Evaluator],
    model: nn.Module,
    tokenizer: Tokenizer | None,
    root: str | Path,
    resolution: int,
    autocast: torch.dtype | None = None,
    batch_size: int = 64,
    threads: int = 2,
    processes: Processes | None = None,
    beat: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Numbers "name/metric" of the evaluators, the same in every process, for one line of the metrics stream.

    `model` holds all parameters (OpenVision, or anything with a `vision` tower) and is left in the mode it came in;
    `beat` is told before each evaluator, for whoever watches that the run is alive.
    """
    vision = getattr(model, "vision", None)
    if not isinstance(vision, VisionTransformer):
        raise OpenVisionError(f"a {type(model).__name__} has no vision tower to evaluate")
    subject = Subject(
        vision,
        model if isinstance(model, OpenVision) else None,
        tokenizer,
        resolution,
        batch_size=batch_size,
        threads=threads,
        processes=processes or Processes.current(),
        autocast=autocast,
    )
    results = []
    for evaluator in evaluators:
        if beat is not None:
            beat(f"measuring {evaluator.title}")
        results += measure_all([evaluator], subject, root)
    return metrics_line(results)


def less_is_better(metric: str) -> bool:
    """Whether a smaller number is the better one: losses, calibration errors, median ranks."""
    last = metric.rpartition("/")[2]
    return "loss" in last or last == "ece" or last.endswith("_median")
