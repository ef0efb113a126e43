"""The model of a run: built, initialised, warm-started from given weights, distributed over the processes."""

import torch
from torch import Tensor, nn

from openvision.errors import OpenVisionError
from openvision.models.openvision import OpenVision
from openvision.models.openvision2 import ModelConfig, OpenVision2, build_model
from openvision.recipe.schema import Parallel, Run
from openvision.runtime import Processes
from openvision.training.setup.compile import prepare_blocks
from openvision.training.setup.initialize import broadcast_parameters, initialise, materialise
from openvision.training.setup.parallel import DistributedModel, distribute, shard
from openvision.weights.load import Request, load_checkpoint


def build_distributed_model(
    config: ModelConfig, run: Run, parallel: Parallel, processes: Processes, seed: int, start: str | None = None
) -> DistributedModel:
    """A model on the processes of a run with its initial parameters, those of `start` where it has them."""
    with torch.device("meta"):
        model = build_model(config)
    for parameter in model.untrained_parameters():
        # DDP waits for the gradient of everything that may have one.
        parameter.requires_grad_(False)
    prepare_blocks(model, run.activation_checkpointing, run.compile)
    if parallel.mode == "fsdp" and processes.group is not None:
        shard(model, processes, parallel.replicate)
        full = None
        if processes.is_main:
            with torch.device("meta"):
                full = build_model(config)
            fill(full, seed, start)
        broadcast_parameters(full, model, processes)
    else:
        fill(model, seed, start)
        model.to(processes.device)
    return distribute(model, processes)


def fill(model: OpenVision | OpenVision2, seed: int, start: str | None) -> None:
    """Give a model on the meta device its initial parameters, on the CPU."""
    materialise(model, torch.device("cpu"))
    initialise(model, seed)
    if start is not None:
        start_from(model, start)


def full_model(config: ModelConfig, state: dict[str, Tensor]) -> OpenVision | OpenVision2:
    """A model that holds `state`, for evaluation and writing; nothing is copied."""
    with torch.device("meta"):
        model = build_model(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def start_from(model: OpenVision | OpenVision2, source: str) -> list[str]:
    """Copy into `model`, in place, every tower that the checkpoint `source` and the model have in common.

    Returns the names of the towers taken: "vision", "text", "decoder", and "logit_scale". A model of version 1 may
    start from a vision tower alone, one of version 2 from any vision tower. A JAX tree, which does not contain its
    resolution, takes the recipe's: no parameter depends on it. Raises OpenVisionError when a tower has another shape.
    """
    loaded = load_checkpoint(source, Request(image_size=model.vision.config.image_size))
    given = loaded.model if isinstance(model, OpenVision) else loaded.captioner
    _copy(model.vision, loaded.vision, "vision", source)
    taken = ["vision"]
    if given is None:
        return taken
    for name in ("text", "decoder"):
        ours, theirs = getattr(model, name, None), getattr(given, name, None)
        if ours is not None and theirs is not None:
            _copy(ours, theirs, name, source)
            taken.append(name)
    if isinstance(model, OpenVision) and loaded.model is not None:
        model.logit_scale.data.copy_(loaded.model.logit_scale.detach())
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
            f"start = {source!r}: its {name} tower has another shape than the recipe's model.{name} "
            f"(first difference: {(wrong or deeper)[0]}); copy the shape from the recipe of that model"
        )
    # No parameter's shape shows the number of heads.
    wanted, found = (tower.config.heads for tower in (ours, theirs))  # pyright: ignore[reportAttributeAccessIssue]
    if wanted != found:
        raise OpenVisionError(
            f"start = {source!r}: its {name} tower has {found} heads, the recipe's model.{name} has {wanted}; copy the "
            "shape from the recipe of that model"
        )
    with torch.no_grad():
        for key in names:
            mine[key].copy_(given[key])
