"""The model of a run: built, initialised, warm-started from given weights, distributed over the processes."""

from typing import Any

import torch
from torch import Tensor, nn

from openvision.errors import OpenVisionError
from openvision.models.openvision import OpenVision
from openvision.models.openvision2 import OpenVision2, build_model
from openvision.recipe.schema import Recipe
from openvision.runtime import Processes
from openvision.training.setup.compile import prepare_blocks
from openvision.training.setup.initialize import initialise, materialise, take_slices
from openvision.training.setup.parallel import Spread, shard, spread
from openvision.weights.load import load_checkpoint


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


def start_from(model: OpenVision | OpenVision2, source: str) -> list[str]:
    """Copy into `model`, in place, every tower that the checkpoint `source` and the model have in common.

    Returns the names of the parts taken: "vision", "text", "decoder", "logit_scale". A model of version 1 may start
    from a vision tower alone, one of version 2 from any vision tower. Raises OpenVisionError when a part has another
    shape.
    """
    loaded = load_checkpoint(source)
    whole = loaded.model if isinstance(model, OpenVision) else loaded.captioner
    _copy(model.vision, loaded.vision, "vision", source)
    taken = ["vision"]
    if whole is None:
        return taken
    for name in ("text", "decoder"):
        ours, theirs = getattr(model, name, None), getattr(whole, name, None)
        if ours is not None and theirs is not None:
            _copy(ours, theirs, name, source)
            taken.append(name)
    if isinstance(model, OpenVision) and isinstance(whole, OpenVision):
        model.logit_scale.data.copy_(whole.logit_scale.detach())
        taken.append("logit_scale")
    return taken


def _copy(ours: nn.Module, theirs: nn.Module, name: str, source: str) -> None:
    mine, given = dict(ours.named_parameters()), dict(theirs.named_parameters())
    # A head belongs to contrastive models: a vision tower may be taken without it, or keep its own.
    names = [key for key in mine if key in given or not key.startswith("head.")]
    wrong = [key for key in names if key not in given or mine[key].shape != given[key].shape]
    deeper = [key for key in given if key not in mine and not key.startswith("head.")]
    if wrong or deeper:
        raise OpenVisionError(
            f"start = {source!r}: its {name} part has another shape than the recipe's model.{name} "
            f"(first difference: {(wrong or deeper)[0]}); copy the shape from the recipe of that model"
        )
    with torch.no_grad():
        for key in names:
            mine[key].copy_(given[key])
