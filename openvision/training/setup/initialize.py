"""Initial parameters: the same numbers at every number of processes, in every sharding mode.

A model is built on the meta device, given memory full of NaN, so that a parameter that nobody initialises is noticed at
once, and initialised on the CPU as one built in one piece. A sharded model takes its slices from the main process, the
only one that holds a full copy for a moment.
"""

import torch
from torch import nn

from openvision.errors import OpenVisionError
from openvision.runtime import Processes


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give a model on the meta device memory full of NaN."""
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter of a materialised model from `seed`, as building it after `torch.manual_seed(seed)` does.

    Raises OpenVisionError when an initialiser forgot a parameter.
    """
    torch.manual_seed(seed)
    for tower in model.children():
        # What the constructor of a tower does to the generator: its layers' own defaults, then `init_weights`.
        for module in tower.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        tower.init_weights()  # pyright: ignore[reportCallIssue]
    if callable(init := getattr(model, "init_temperature", None)):
        init()
    forgotten = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    if forgotten:
        raise OpenVisionError(f"no initialiser of {type(model).__name__} writes {', '.join(forgotten)}")


def broadcast_parameters(full: nn.Module | None, model: nn.Module, processes: Processes) -> None:
    """Fill a sharded model on the meta device with the parameters of `full`, which only the main process has."""
    # Importing this takes a second, which only runs that shard should pay.
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    materialise(model, processes.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, {} if full is None else full.state_dict(), options=options)
