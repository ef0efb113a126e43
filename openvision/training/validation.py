"""Validation during training: zero-shot and retrieval on the validation shards, or the caption loss.

The evaluators are those of the suite `heldout`, as far as the shards have the texts for them.
"""

from openvision.data.shards.dataset import ShardDataset
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import ShardImages
from openvision.evaluation.evaluators.base import Evaluator, measure_all
from openvision.evaluation.evaluators.caption_loss import CaptionLoss
from openvision.evaluation.evaluators.in_training import WHEN_OUT_OF_MEMORY
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.evaluators.retrieval import Retrieval
from openvision.evaluation.evaluators.zero_shot import ZeroShot
from openvision.evaluation.suites.held_out import PREFIXES
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
) -> dict[str, float]:
    """Numbers of the validation shards by name, the same in every process; all processes must call it.

    With a text tower `top1`, `top5` over the images' names; `t2i_r1` ... `i2t_r10` with names as texts, the same with
    `alt_` for alt-texts and `sentence_` for first sentences of synthetic captions; `category_top1` over groups. Shares
    are 0 to 1. Counts: `pictures`, `candidates`, `categories`, `rejected`. Without a text tower `caption_loss`, nats.

    `model` holds all parameters and is left in the mode it came in.
    """
    evaluated = EvaluatedModel(
        model.vision,
        model,
        tokenizer,
        resolution,
        batch_size=256 if processes.device.type == "cpu" else BATCH_BESIDE_TRAINING,
        processes=processes,
        reject_budget=1.0,
        when_out_of_memory=WHEN_OUT_OF_MEMORY,
    )
    numbers: dict[str, float] = {}
    for evaluator, measured in measure_all(validation_evaluators(dataset, evaluated.has_text), evaluated, ""):
        if isinstance(evaluator, CaptionLoss):
            return {"caption_loss": measured.values["caption_loss"]}
        prefix = PREFIXES[evaluator.title]
        wanted = ("top1",) if evaluator.title == "groups" else LOGGED
        numbers |= {f"{prefix}{name}": value for name, value in measured.values.items() if name in wanted}
        if evaluator.title == "names":
            counts = {"pictures": "images", "candidates": "classes", "rejected": "rejected"}
            numbers |= {name: int(measured.facts[fact]) for name, fact in counts.items()}
        elif evaluator.title == "groups":
            numbers["categories"] = int(measured.facts["classes"])
    return numbers


def validation_evaluators(dataset: ShardDataset, has_text: bool) -> list[Evaluator]:
    """What the texts of the shards allow to measure; raises OpenVisionError when not every image has an alt-text.

    Images without names are told apart by their alt-texts.
    """
    data, alt, synthetic = str(dataset.folder), dataset.alt_key, dataset.synthetic_key
    if not has_text:
        return [CaptionLoss(data=data, text=synthetic, alt=alt)]
    shards = ShardImages(dataset.folder)
    # Bad samples are left out, whatever is measured.
    texts = {name: shards.texts(name) for name in ("name", alt, synthetic)}
    good = [row for row in range(len(shards.places)) if row not in shards.bad]
    complete = {name: all(found[row] for row in good) for name, found in texts.items()}
    categories = shards.values("category")
    complete["category"] = all(isinstance(categories[row], str) and categories[row] for row in good)
    label = "name" if complete["name"] else alt
    if not complete[label]:
        raise OpenVisionError(
            f"{data}: not every sample has a {alt!r}; validation needs a name or an alt-text for each"
        )
    evaluators: list[Evaluator] = [
        ZeroShot(name="names", data=data, label=label),
        Retrieval(name="name retrieval", data=data, text=label, captions=1, prompts="plain"),
    ]
    if complete[alt]:
        evaluators.append(Retrieval(name="alt-texts", data=data, text=alt, captions=1))
    if complete[synthetic]:
        sentence = Retrieval(name="first sentences", data=data, text=synthetic, sentences=True, captions=1)
        evaluators.append(sentence)
    if complete["category"]:
        evaluators.append(ZeroShot(name="groups", data=data, label="category", words=True))
    return evaluators


def headline(numbers: dict[str, float]) -> str:
    """The most important numbers, for the terminal."""
    if "caption_loss" in numbers:
        return f"validation caption loss {numbers['caption_loss']:.4f}"
    top5 = f", top-5 {numbers['top5']:.1%}" if "top5" in numbers else ""
    return f"validation zero-shot top-1 {numbers['top1']:.1%}{top5}"
