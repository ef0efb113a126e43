"""Validation during training: zero-shot and retrieval on the validation shards, or the caption loss.

The evaluators are those of the suite `own`: as far as the shards have the texts for them.
"""

from openvision.data.shards.dataset import ShardDataset
from openvision.evaluation.evaluators.base import measure_all
from openvision.evaluation.evaluators.caption_loss import CaptionLoss
from openvision.evaluation.evaluators.in_training import WHEN_OUT_OF_MEMORY
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.suites.held_out import PREFIXES
from openvision.evaluation.suites.own import validation_evaluators
from openvision.models.protocols import Model
from openvision.runtime import SINGLE_PROCESS, Processes
from openvision.text.tokenizer import Tokenizer

# Images at a time on an accelerator, whose memory also holds the state of the run.
BATCH_BESIDE_TRAINING = 64
# Metrics in the log; medians, calibration and means over classes are left to suites.
LOGGED = ("top1", "top5", *(f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)))


def validate(
    model: Model,
    tokenizer: Tokenizer,
    dataset: ShardDataset,
    resolution: int,
    processes: Processes = SINGLE_PROCESS,
    native: bool = False,
) -> dict[str, float]:
    """Numbers of the validation shards by name, the same in every process; all processes must call it.

    With a text tower `top1`, `top5` over the images' names; `t2i_r1` ... `i2t_r10` with names as texts, the same with
    `alt_` for alt-texts and `sentence_` for first sentences of synthetic captions; `category_top1` over groups. Shares
    are 0 to 1. Counts: `images`, `candidates`, `categories`, `rejected`. Without a text tower `caption_loss`, nats, and
    both counts of images.

    `model` holds all parameters and is left in the mode it came in. `native` keeps the aspect of images.
    """
    evaluated = EvaluatedModel(
        model.vision,
        model,
        tokenizer,
        resolution,
        "native" if native else "crop",
        batch_size=256 if processes.device.type == "cpu" else BATCH_BESIDE_TRAINING,
        processes=processes,
        reject_budget=1.0,
        when_out_of_memory=WHEN_OUT_OF_MEMORY,
    )
    numbers: dict[str, float] = {}
    for evaluator, measured in measure_all(validation_evaluators(dataset, evaluated.has_text), evaluated, ""):
        if isinstance(evaluator, CaptionLoss):
            facts = {name: int(measured.facts[name]) for name in ("images", "rejected")}
            return {"caption_loss": measured.values["caption_loss"], **facts}
        prefix = PREFIXES[evaluator.title]
        wanted = ("top1",) if evaluator.title == "groups" else LOGGED
        numbers |= {f"{prefix}{name}": value for name, value in measured.values.items() if name in wanted}
        if evaluator.title == "names":
            counts = {"images": "images", "candidates": "classes", "rejected": "rejected"}
            numbers |= {name: int(measured.facts[fact]) for name, fact in counts.items()}
        elif evaluator.title == "groups":
            numbers["categories"] = int(measured.facts["classes"])
    return numbers


def headline(numbers: dict[str, float]) -> str:
    """The most important numbers, for the terminal."""
    rejected, read = int(numbers.get("rejected", 0)), int(numbers.get("images", 0))
    without = f"; {rejected} of {read + rejected} images left out, unreadable or too elongated" if rejected else ""
    if "caption_loss" in numbers:
        return f"validation caption loss {numbers['caption_loss']:.4f}{without}"
    top5 = f", top-5 {numbers['top5']:.1%}" if "top5" in numbers else ""
    return f"validation zero-shot top-1 {numbers['top1']:.1%}{top5}{without}"
