"""The model of a run: built, cut, given its first values, spread over the processes."""

from typing import Any

import torch
from torch import Tensor, nn

from openvision.models.openvision2 import OpenVision2, build_model
from openvision.training.execution import prepare_blocks
from openvision.training.initialise import initialise, materialise, take_slices
from openvision.training.parallel import Processes, Spread, shard, spread
from openvision.training.recipe import Recipe
from openvision.training.start import start_from


def build_spread(recipe: Recipe, processes: Processes, fresh: bool) -> Spread:
    """The recipe's model on the processes of the run, at its first values.

    A run that is not `fresh` will be filled from a checkpoint: `recipe.start` is not read again.
    """
    with torch.device("meta"):
        model = build_model(recipe.model)
    if isinstance(model, OpenVision2):
        # Nothing in captioning reads the pooled embedding. DDP waits for the gradient of everything that may have one.
        model.vision.fc_norm.requires_grad_(False)
    prepare_blocks(model, recipe.run.activation_checkpointing, recipe.run.compile)
    shard(model, recipe.parallel, processes)
    materialise(model, processes.device)
    initialise(model, recipe.seed)
    if fresh and recipe.start is not None:
        _start(recipe, model)
    return spread(model, recipe.parallel, processes)


def whole_model(recipe: Recipe, state: dict[str, Tensor]) -> Any:
    """A model of the recipe that holds `state`, for measuring and writing; nothing is copied."""
    with torch.device("meta"):
        model = build_model(recipe.model)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _start(recipe: Recipe, model: nn.Module) -> None:
    """Put the weights of `recipe.start` over the first values, whole, and keep this process's slices."""
    assert recipe.start is not None
    with torch.device("meta"):
        given = build_model(recipe.model)
    materialise(given, torch.device("cpu"))
    initialise(given, recipe.seed)
    start_from(given, recipe.start)
    take_slices(model, given.state_dict())
