"""The model of a run: built, initialised, warm-started from given weights, distributed over the processes."""

from collections.abc import Callable

import torch
from torch import Tensor

from openvision.models.openvision2 import AnyModel, ModelConfig, build_model
from openvision.recipe.schema import Parallel, Run
from openvision.runtime import Processes
from openvision.training.setup.compile import prepare_blocks
from openvision.training.setup.initialize import broadcast_parameters, initialise, materialise
from openvision.training.setup.parallel import DistributedModel, distribute, shard
from openvision.training.setup.start import describe_start, start_from


def build_distributed_model(
    config: ModelConfig,
    run: Run,
    parallel: Parallel,
    processes: Processes,
    seed: int,
    start: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> DistributedModel:
    """A model on the processes of a run with its initial parameters, those of `start` where it has them.

    `say` is told what was copied from there.
    """
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
            fill(full, seed, start, say)
        broadcast_parameters(full, model, processes)
    else:
        fill(model, seed, start, say)
        model.to(processes.device)
    return distribute(model, processes)


def fill(model: AnyModel, seed: int, start: str | None, say: Callable[[str], None]) -> None:
    """Give a model on the meta device its initial parameters, on the CPU."""
    materialise(model, torch.device("cpu"))
    initialise(model, seed)
    if start is not None:
        say(describe_start(model, start, start_from(model, start)))


def full_model(config: ModelConfig, state: dict[str, Tensor]) -> AnyModel:
    """A model that holds `state`, for evaluation and writing; nothing is copied."""
    with torch.device("meta"):
        model = build_model(config)
    model.load_state_dict(state, assign=True)
    return model.eval()
