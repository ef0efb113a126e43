"""The data a recipe names, opened: its sources with their weights, captions and order."""

from dataclasses import replace
from pathlib import Path

import torch

from openvision.data.loader import Batch
from openvision.data.mixture import Mixture, Ordering
from openvision.data.shards.dataset import ShardDataset
from openvision.data.shards.store import join_folder
from openvision.recipe.schema import Recipe, Source


def open_training_data(recipe: Recipe, folder: str | Path) -> Mixture:
    """The training shards of `recipe` below `folder`, a path or a URL.

    Raises OpenVisionError for a folder that is missing or holds no captions of the names asked for.
    """
    train = recipe.data.train
    sources = (Source(folder=train),) if isinstance(train, str) else train
    datasets = [_open(recipe, folder, source) for source in sources]
    for dataset in datasets:
        wanted = (dataset.alt_key, dataset.synthetic_key) if recipe.reads_synthetic else (dataset.alt_key,)
        dataset.require_captions(*wanted)
    if recipe.data.order == "blocks":
        for dataset in datasets:
            dataset.read_ahead()
    return Mixture(datasets, [source.weight for source in sources], [source.folder for source in sources])


def open_validation_data(recipe: Recipe, folder: str | Path) -> ShardDataset | None:
    """The shards measured during training; None when the recipe names none."""
    name = recipe.data.validation
    return _open(recipe, folder, Source(folder=name)) if name else None


def ordering_of(recipe: Recipe) -> Ordering:
    """How the run goes through its samples."""
    return Ordering(recipe.data.order, recipe.data.block, recipe.data.window)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with what the model reads on `device`; places in the stream stay on the CPU."""
    if device.type == "cpu":
        return batch
    names = ("images", "alt_ids", "sentence_ids", "labels", "label_mask")
    return replace(batch, **{name: getattr(batch, name).to(device, non_blocking=True) for name in names})


def _open(recipe: Recipe, folder: str | Path, source: Source) -> ShardDataset:
    return ShardDataset(
        join_folder(folder, source.folder),
        synthetic_key=source.synthetic_key or recipe.data.synthetic_key,
        alt_key=source.alt_key or recipe.data.alt_key,
    )
