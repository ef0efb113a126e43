"""A model distributed over the processes of a run: DDP or FSDP2.

- "ddp" keeps a copy of the model in every process; "fsdp" shards every parameter, its gradient and its moments, one
  slice a process, or one slice a process of a group when there are several groups (`parallel.replicate`).
- Losses are scaled so that the MEAN over processes of their gradients is the gradient of the global batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from openvision.models.openvision2 import AnyModel
from openvision.runtime import SINGLE_PROCESS, Processes, full_tensor, is_sharded


@dataclass(frozen=True)
class DistributedModel:
    """A model and how it is distributed over processes."""

    module: AnyModel
    """The model itself; under "fsdp" its parameters are DTensors."""
    processes: Processes = SINGLE_PROCESS
    ddp: DistributedDataParallel | None = None
    """Under "ddp" what a training step calls: it averages gradients during the backward pass."""
    replicated: tuple[nn.Parameter, ...] = ()
    """Under "fsdp" the parameters that are not sharded; `finish_gradients` averages their gradients."""

    @property
    def mode(self) -> str:
        """How it is distributed: "one process", "ddp" or "fsdp"."""
        if self.processes.group is None:
            return "one process"
        return "fsdp" if self.ddp is None else "ddp"

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in the context leave the gradients of "ddp" as they are, for `finish_gradients`."""
        if self.ddp is None:
            yield
            return
        with self.ddp.no_sync():
            yield

    def finish_gradients(self, synced: bool) -> None:
        """Average the gradients that the backward pass did not: all of "ddp" if it ran in `no_sync`, not `synced`."""
        if self.processes.group is None:
            return
        pending = self.replicated if synced or self.ddp is None else self.module.parameters()
        for parameter in pending:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=self.processes.group)
                parameter.grad.div_(self.processes.size)

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, Tensor]:
        """Every parameter in full, on the CPU; all processes must call it."""
        return {name: full_tensor(tensor).cpu() for name, tensor in self.module.state_dict().items()}


def distribute(model: AnyModel, processes: Processes) -> DistributedModel:
    """The model, sharded where it is to be and initialised, as a training step takes it."""
    if processes.group is None:
        return DistributedModel(model, processes)
    parameters = list(model.parameters())
    if any(map(is_sharded, parameters)):
        return DistributedModel(model, processes, replicated=tuple(p for p in parameters if not is_sharded(p)))
    # The copies are identical already (initialize.py, or a checkpoint) and there are no buffers: nothing to broadcast.
    ddp = DistributedDataParallel(model, process_group=processes.group, init_sync=False)
    return DistributedModel(model, processes, ddp)


def shard(model: nn.Module, processes: Processes, replicas: int) -> None:
    """Shard a model on the meta device over `replicas` groups of processes, each of which holds a whole model."""
    # Importing this takes a second, which only runs that shard should pay.
    from openvision.training.setup import fsdp

    fsdp.shard(model, fsdp.make_mesh(processes.device.type, processes.size, replicas))
