"""Many processes: who they are and how a model is spread over them.

- torchrun starts the processes and says who is who; without it a run is one process and nothing here communicates.
- "ddp" keeps a copy of the model in every process; "fsdp" cuts every parameter, its gradient and its moments into one
  slice a process (FSDP2), or one slice a process of a group when there are several groups (`replicate`).
- Losses are scaled so that the MEAN over processes of their gradients is the gradient of the global batch.
- Small decisions (stop, save, skip) are taken by all processes together, over a gloo group of their own.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from openvision.recipe.schema import Parallel
from openvision.runtime import SINGLE_PROCESS, Processes


class _Replicated(DistributedDataParallel):
    """DDP under which the model's own attributes stay visible."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@dataclass
class Spread:
    """A model spread over processes."""

    module: nn.Module
    """The model itself; under "fsdp" its parameters are DTensors."""
    forward: Any
    """What a training step calls: the model, wrapped where gradients are averaged during the backward pass."""
    processes: Processes = SINGLE_PROCESS
    apart: tuple[nn.Parameter, ...] = ()
    """Parameters whose gradients nobody averages but `finish_gradients`."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes whose batches make the global one."""
        return self.processes.group

    @property
    def mode(self) -> str:
        """How it is spread, in a word."""
        if self.group is None:
            return "one process"
        return "ddp" if isinstance(self.forward, DistributedDataParallel) else "fsdp"

    def finish_gradients(self, through_forward: bool = True) -> None:
        """Average what the backward pass left; all gradients of "ddp" when it did not go through `forward`."""
        if self.group is None:
            return
        bare = self.mode == "ddp" and not through_forward
        left = [p for p in (self.module.parameters() if bare else self.apart) if p.grad is not None]
        for parameter in left:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=self.group)
            parameter.grad.div_(self.processes.size)

    @torch.no_grad()
    def whole_state(self) -> dict[str, Tensor]:
        """Every parameter in full, on the CPU; all processes must ask."""
        return {name: whole(tensor).cpu() for name, tensor in self.module.state_dict().items()}


def whole(tensor: Tensor) -> Tensor:
    """A tensor in full, whether cut into slices or not; all processes must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()  # pyright: ignore[reportAttributeAccessIssue]


def shard(model: nn.Module, parallel: Parallel, processes: Processes) -> None:
    """Cut a model on the meta device into slices where the recipe says "fsdp"."""
    if processes.group is not None and parallel.mode == "fsdp":
        from openvision.training.setup import fsdp as sharding

        sharding.shard(model, sharding.make_mesh(processes.device.type, processes.size, parallel.replicate))


def spread(model: nn.Module, parallel: Parallel, processes: Processes) -> Spread:
    """The model, sharded and filled, as a training step takes it."""
    if processes.group is None:
        return Spread(model, model, processes)
    if parallel.mode == "fsdp":
        whole_ones = tuple(parameter for parameter in model.parameters() if not hasattr(parameter, "to_local"))
        return Spread(model, model, processes, whole_ones)
    # Values are identical already (initialise.py, or a checkpoint), and there are no buffers: nothing to broadcast.
    wrapped = _Replicated(model, process_group=processes.group, init_sync=False)
    return Spread(model, wrapped, processes)
