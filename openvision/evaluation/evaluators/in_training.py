"""Evaluators during training: every process measures its slice, all get the same numbers.

    named = due(evaluators, step, recipe.run.evaluate_every, last=step == stage.steps)
    if named:
        numbers = measure_in_training(named, model, tokenizer, data_folder, stage.resolution)

All processes must call it at the same step, with the same weights.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.base import Evaluator, due, measure_all, metrics_line
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.models.protocols import Model
from openvision.runtime import Processes
from openvision.text.tokenizer import Tokenizer

WHEN_OUT_OF_MEMORY = (
    "leave data.validation and [[evaluate]] out of the recipe, resume with --force, and measure the checkpoints with "
    "`openvision eval`"
)

_DISTANCES = (
    *("ece", "caption_perplexity", "l1", "latents_l1", "lpips", "rfid"),
    *("distance_efficientnet_lite0", "fd_efficientnet_lite0"),
)

__all__ = ["WHEN_OUT_OF_MEMORY", "check_evaluators", "due", "less_is_better", "measure_in_training"]


def check_evaluators(
    evaluators: Sequence[Evaluator], root: str | Path, has_text: bool, has_decoder: bool = True
) -> None:
    """Raise OpenVisionError for an evaluator whose data are missing or that needs a part which the model lacks."""
    for evaluator in evaluators:
        for needed, there, part in (
            (evaluator.needs_text, has_text, "text tower"),
            (evaluator.needs_decoder, has_decoder, "caption decoder"),
        ):
            if needed and not there:
                raise OpenVisionError(
                    f"evaluator {evaluator.title!r} ({evaluator.kind}) needs a {part}, which this recipe does not train"
                )
        missing = evaluator.missing(root)
        if missing is not None:
            raise OpenVisionError(f"evaluator {evaluator.title!r}: {missing} is missing")


def measure_in_training(
    evaluators: Sequence[Evaluator],
    model: Model,
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

    `model` holds all parameters and is left in the mode it came in; `beat` is called before each evaluator, for a
    watchdog.
    """
    evaluated = EvaluatedModel(
        model.vision,
        model,
        tokenizer,
        resolution,
        batch_size=batch_size,
        threads=threads,
        processes=processes or Processes.current(),
        autocast=autocast,
        when_out_of_memory=WHEN_OUT_OF_MEMORY,
    )
    results = []
    for evaluator in evaluators:
        if beat is not None:
            beat(f"measuring {evaluator.title}")
        results += measure_all([evaluator], evaluated, root)
    return metrics_line(results)


def less_is_better(metric: str) -> bool:
    """Whether a smaller number is the better one: losses, distances, perplexities, calibration errors, median ranks."""
    last = metric.rpartition("/")[2]
    return "loss" in last or last in _DISTANCES or last.endswith("_median")
