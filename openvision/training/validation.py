"""What is measured during training, on the validation shards: zero-shot and retrieval, or the caption loss.

With several processes each computes its rows of every batch of pictures and texts, and all get all features: the
numbers are the same everywhere. Pictures are read by every process.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from openvision.data.shards.dataset import ShardDataset
from openvision.evaluation.data.split import read_split
from openvision.evaluation.evaluators.captioning import caption_nats
from openvision.evaluation.suites.held_out import evaluate_split
from openvision.models.openvision2 import OpenVision2
from openvision.objectives.gather import gather
from openvision.runtime import SINGLE_PROCESS, Processes
from openvision.text.tokenizer import Tokenizer
from openvision.training.setup.parallel import DistributedModel


def validate(
    spread: DistributedModel, model: Any, tokenizer: Tokenizer, dataset: ShardDataset, resolution: int
) -> dict[str, float]:
    """Numbers of the split by name: those of `evaluate_split`, or `caption_loss` for a model without a text tower.

    `model` holds the parameters of `spread` in full; all processes must ask.
    """
    if isinstance(model, OpenVision2):
        return {"caption_loss": caption_loss_of(model, tokenizer, dataset, resolution, processes=spread.processes)}
    if spread.processes.group is not None:
        model.vision.forward = _in_slices(model.vision.forward, spread)
        model.encode_text = _in_slices(model.encode_text, spread)
    result = evaluate_split(model, tokenizer, dataset, resolution)
    return {name: value for name, value in result.items() if isinstance(value, (int, float))}


def _in_slices(encode: Callable[[Tensor], Tensor], spread: DistributedModel) -> Callable[[Tensor], Tensor]:
    """`encode` with its rows divided among the processes; every process gets all results."""
    rank, size = spread.processes.rank, spread.processes.size

    def encode_slice(rows: Tensor) -> Tensor:
        share = -(-len(rows) // size)
        # All slices are equally long: the last rows are encoded more than once where they do not divide.
        own = [min(rank * share + index, len(rows) - 1) for index in range(share)]
        return gather(encode(rows[own]).clone(), spread.processes.group)[: len(rows)]

    return encode_slice


def headline(numbers: dict[str, float]) -> str:
    """The numbers a person looks at first."""
    if "caption_loss" in numbers:
        return f"validation caption loss {numbers['caption_loss']:.4f}"
    return f"validation zero-shot top-1 {numbers['top1']:.1%}, top-5 {numbers['top5']:.1%}"


def caption_loss_of(
    model: OpenVision2,
    tokenizer: Tokenizer,
    dataset: ShardDataset,
    resolution: int,
    batch_size: int = 16,
    processes: Processes = SINGLE_PROCESS,
) -> float:
    """Mean cross-entropy of all target tokens of the split, nats; the decoder reads all patches.

    The target is the synthetic caption, or the alt-text of a sample without one, as in training.
    """
    split = read_split(dataset, resolution)
    rows = [slice(start, start + batch_size) for start in range(0, len(split), batch_size)]
    nats, tokens = processes.mean([*caption_nats(model, tokenizer, split, rows[processes.rank :: processes.size])])
    return nats / tokens
