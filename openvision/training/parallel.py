"""Many processes: who they are and how a model is spread over them.

- torchrun starts the processes and says who is who; without it a run is one process and nothing here communicates.
- "ddp" keeps a copy of the model in every process; "fsdp" cuts every parameter, its gradient and its moments into one
  slice a process (FSDP2), or one slice a process of a group when there are several groups (`replicate`).
- Losses are scaled so that the MEAN over processes of their gradients is the gradient of the global batch.
- Small decisions (stop, save, skip) are taken by all processes together, over a gloo group of their own.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from openvision.errors import OpenVisionError
from openvision.training.recipe import Parallel


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    """For tensors of the model; None in a run of one process."""
    control: dist.ProcessGroup | None = None
    """For small decisions, on CPU tensors."""
    saving: dist.ProcessGroup | None = None
    """For the thread that writes checkpoints."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that talks, logs and writes what is written once."""
        return self.rank == 0

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Each flag, raised when any process raised it; the same answer everywhere."""
        if self.control is None:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.control)
        return [bool(vote) for vote in votes]

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean of each value over the processes."""
        if self.control is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return (total / self.size).tolist()

    def same(self, value: Any) -> Any:
        """`value` of the main process, in every process."""
        if self.control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group_src=0, group=self.control)
        return values[0]

    def gathered(self, value: Any) -> list[Any]:
        """`value` of every process, by rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def wait(self) -> None:
        """Return when all processes have come this far."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def shorten_timeouts(self, seconds: float) -> None:
        """From now on a collective operation that takes longer fails: a lost or hung process is noticed soon."""
        for group in (self.group, self.control):
            if group is not None:
                # The public constructor argument cannot be changed later; torchtitan shortens its timeouts likewise.
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


ALONE = Processes()


@contextmanager
def join_processes(parallel: Parallel) -> Iterator[Processes]:
    """The processes that torchrun started, this one among them; `ALONE` without torchrun.

    Raises OpenVisionError when their number does not fit the recipe's `parallel`.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        _check(parallel, 1)
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _check(parallel, size)
    device = _device(int(os.environ.get("LOCAL_RANK", rank)))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=parallel.start_seconds)
    dist.init_process_group(backend, store=_store(rank, size, timeout), rank=rank, world_size=size, timeout=timeout)
    # Writing a checkpoint may take as long as the file system likes.
    saving = _gloo_group(hours=2)
    control = _gloo_group(seconds=parallel.start_seconds)
    yield Processes(rank, size, device, dist.group.WORLD, control, saving)
    # Not after an error: taking leave of processes that are gone may take for ever.
    dist.destroy_process_group()


def _store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Where the processes find each other.

    torchrun keeps one store for all lives of a run: after a restart the addresses of dead processes would still be in
    it. On one machine its count of restarts tells the lives apart. On several the counts may differ, and torchrun has
    to be told to make a new store each time (docs/reliability.md).
    """
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return dist.PrefixStore(f"life-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _gloo_group(**timeout: float) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timedelta(**timeout))
    assert isinstance(group, dist.ProcessGroup)
    return group


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _check(parallel: Parallel, size: int) -> None:
    if size % parallel.replicate:
        raise OpenVisionError(
            f"parallel.replicate {parallel.replicate} does not divide the {size} processes; "
            "choose a divisor of their number, or start with torchrun --nproc-per-node"
        )


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
    processes: Processes = ALONE
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
        from openvision.training import sharding

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
