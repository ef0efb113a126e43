"""What a command runs on: device, precision, and the processes of a distributed run.

- torchrun starts the processes and numbers them; without it a run is one process and nothing here communicates.
- All processes take small decisions (stop, save, skip) together, over a gloo group of their own.
- Rows of an evaluation are divided evenly: every process makes the same calls in the same order on its own rows, and
  all get the whole result.
- Parameters, heads and losses stay float32; the rest may be bfloat16 under autocast.
- A tensor may be sharded (a DTensor, under FSDP2): `local_tensor` and `full_tensor` take either kind.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from openvision.errors import OpenVisionError
from openvision.hardware import GIB

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


def autocast(device: str, precision: torch.dtype) -> torch.autocast:
    """Autocast to `precision`; float32 switches it off."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype; "auto" is bfloat16 where the hardware multiplies it faster than float32.

    Raises OpenVisionError when an accelerator is asked for bfloat16 that it does not have.
    """
    if name == "auto":
        return torch.float32 if _without_bfloat16(device) else torch.bfloat16
    lacks = _without_bfloat16(device)
    # A CPU without the instructions computes bfloat16 all the same, slowly.
    if name == "bfloat16" and lacks is not None and device.type != "cpu":
        raise OpenVisionError(f"bfloat16 on {_name(device)}: {lacks}; use float32 or auto")
    return getattr(torch, name)


def _without_bfloat16(device: torch.device) -> str | None:
    """Why "auto" does not choose bfloat16 on a device; None where it does."""
    if device.type == "cuda":
        # Emulated bfloat16 is slower than float32.
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return None if fast else "it has no bfloat16 before compute capability 8.0"
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return None if fast else "this processor has no instructions for bfloat16"
    return f"autocast on {device.type} was never tested"


DEVICES = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
"""Names of devices."""
KNOWN_DEVICES = "auto, cpu, cuda, cuda:1 or mps"
NVIDIA = Path("/dev/nvidia0")
"""Where Linux has the first NVIDIA device."""


def resolve_device(name: str = "auto") -> torch.device:
    """The device that a command runs on: "auto" (CUDA, else MPS, else CPU), "cpu", "mps", "cuda" or "cuda:1".

    "cuda" without a number is the device of this process: torchrun's local rank, 0 without torchrun. Raises
    OpenVisionError for a device that is not there, and for one with a number when torchrun started several processes.
    """
    if not DEVICES.fullmatch(name):
        raise OpenVisionError(f"device {name!r} is unknown; use {KNOWN_DEVICES}")
    kind, _, number = name.partition(":")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if number and processes > 1:
        raise OpenVisionError(
            f"device {name} is one device for {processes} processes of torchrun; use cuda, which gives each its own, "
            "and choose devices with CUDA_VISIBLE_DEVICES"
        )
    if kind == "mps" and "RANK" in os.environ:
        raise OpenVisionError(
            "device mps is not for processes of torchrun: they exchange tensors over nccl or gloo, neither of which "
            "knows it; start without torchrun, or use cpu"
        )
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if kind == "auto":
        # Alone in torchrun, too: a run goes on with as many processes as there are.
        kind = "cuda" if cuda else "mps" if mps and "RANK" not in os.environ else "cpu"
    if kind == "cuda":
        count, index = torch.cuda.device_count() if cuda else 0, int(number or _local_rank())
        if index >= count:
            found = f"{count} CUDA devices, numbered from 0" if count else "no CUDA device"
            raise OpenVisionError(f"device {name} is not there: this torch finds {found}; use auto or cpu")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if kind == "mps" and not mps:
        raise OpenVisionError(
            "device mps is not there: this machine has no Apple GPU that this torch can use; use auto"
        )
    return torch.device(kind)


def _local_rank() -> int:
    """Number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0)))


def describe_device(
    device: torch.device, precision: torch.dtype, asked: str = "auto", matmul: str | None = None
) -> str:
    """Device, precision, why this one where "auto" was `asked` for, and what lies idle: of the first line of a run.

    `matmul`, as for `use_float32_matmul`, is named on CUDA.
    """
    lacks = _without_bfloat16(device)
    why = f" (auto: {lacks or 'it multiplies that faster'})" if asked == "auto" else ""
    products = _products(device, matmul)
    return f"{str(precision).removeprefix('torch.')} on {_name(device)}{why}{products}{_idle(device)}"


def _products(device: torch.device, matmul: str | None) -> str:
    if matmul is None or device.type != "cuda":
        return ""
    return f", float32 products {'in TF32' if matmul == 'high' and has_tf32(device) else 'exact'}"


def _idle(device: torch.device) -> str:
    """CUDA devices of the machine that the processes of a run leave unused."""
    if device.type != "cuda":
        return ""
    # torchrun says how many of its processes are on this machine.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
    count = torch.cuda.device_count()
    if (idle := count - processes) <= 0:
        return ""
    more = "1 more CUDA device is" if idle == 1 else f"{idle} more CUDA devices are"
    return f"; {more} idle, torchrun --nproc-per-node {count} takes all"


def _name(device: torch.device) -> str:
    """A device for a message."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    if device.type != "cpu":
        return str(device)
    threads = torch.get_num_threads()
    return f"the CPU, {threads} thread{'' if threads == 1 else 's'}{_passed_over()}"


def _passed_over() -> str:
    """Why "auto" leaves a run on the CPU; empty where there is a device that it would have taken."""
    if torch.cuda.is_available():
        return ""
    if torch.backends.mps.is_available():
        return ", mps is not for processes of torchrun" if "RANK" in os.environ else ""
    if torch.accelerator.is_available():
        return f", {_accelerator()} is not supported"
    if torch.version.cuda is None and (NVIDIA.exists() or shutil.which("nvidia-smi") is not None):
        return ", this torch is built without CUDA though the machine has an NVIDIA device"
    # Who sets the variable may hide the devices on purpose.
    if NVIDIA.exists() and "CUDA_VISIBLE_DEVICES" not in os.environ:
        return ", this torch does not find the machine's NVIDIA device; nvidia-smi tells its driver"
    return ", no accelerator found"


def _accelerator() -> str:
    """The accelerator that this torch was built for, or is extended by: "xpu"."""
    found = torch.accelerator.current_accelerator()
    return "its accelerator" if found is None else found.type


# What backends say beside torch.OutOfMemoryError, in lower case.
_OUT_OF_MEMORY = ("out of memory", "defaultcpuallocator", "status_alloc_failed", "device_allocation_failed")


def out_of_memory_on(error: BaseException) -> str | None:
    """The device that an error says has no memory left, for a message; None for an error about something else."""
    text = str(error)
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if not known and not any(sign in text.lower() for sign in _OUT_OF_MEMORY):
        return None
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "the CPU"
    if "MPS" in text:
        return "mps"
    # torch numbers them among those that are visible, as --device does.
    number = re.search(r"GPU (\d+)", text)
    return "the accelerator" if number is None else f"cuda:{number[1]}"


@contextmanager
def explain_out_of_memory(message: Callable[[], str]) -> Iterator[None]:
    """Raise OpenVisionError with the sentence of `message` when the block runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if out_of_memory_on(error) is None:
            raise
        raise OpenVisionError(message()) from error


def device_memory(device: torch.device) -> int:
    """Memory of a device, or of the machine for the CPU, bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe_memory(device: torch.device) -> str:
    """A device and its memory, for a message."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name} ({device_memory(device) / GIB:.1f} GiB)"


def use_float32_matmul(precision: str) -> None:
    """Products and convolutions of float32 on CUDA: "highest" is exact, "high" rounds their inputs to TF32."""
    torch.set_float32_matmul_precision(precision)
    # A setting of its own in torch, where it is on by default.
    torch.backends.cudnn.allow_tf32 = precision != "highest"


def has_tf32(device: torch.device) -> bool:
    """Whether a device multiplies in TF32: NVIDIA's from compute capability 8.0 on."""
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def use_deterministic_algorithms(wanted: bool) -> None:
    """Have operations on CUDA give the same bits every time, or not; one that cannot raises RuntimeError.

    To be called before the first product of matrices on CUDA, which is when cuBLAS reads its configuration.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from the CPU the host does not wait for a CUDA device that is still busy."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # From pageable memory a copy would wait until all work that was queued before it is done.
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A small tensor on its way from a CUDA device to the host, which reads it when it has arrived."""

    def __init__(self, tensor: Tensor) -> None:
        """Queue the copy behind the work that makes `tensor`."""
        self._arrived: torch.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            # Of the tensor's device, which need not be the current one.
            self._arrived = torch.cuda.current_stream(tensor.device).record_event()
        else:
            # Other devices have no event that says when a copy has arrived.
            self._host = tensor.to("cpu")

    def values(self) -> list[float]:
        """The elements as numbers; this waits until they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.flatten().tolist()


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    """For tensors of the model; None in a run of one process."""
    control: dist.ProcessGroup | None = None
    """For small decisions, on CPU tensors; None uses `group`."""
    saving: dist.ProcessGroup | None = None
    """For the thread that writes checkpoints."""

    @staticmethod
    def current() -> "Processes":
        """The processes of the default group, or this one alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return SINGLE_PROCESS
        # "nccl", or "cpu:gloo,cuda:nccl" where both kinds of tensors are exchanged.
        nccl = "nccl" in dist.get_backend()
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        return Processes(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints, logs and writes the files that exist once."""
        return self.rank == 0

    def any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """Logical or of each flag over the processes; the same answer in all of them."""
        if self.group is None:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.uint8, device=self._small_device)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._small)
        return [bool(vote) for vote in votes]

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean of each value over the processes."""
        if self.group is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._small_device)
        dist.all_reduce(total, group=self._small)
        return (total / self.size).tolist()

    def broadcast(self, value: T) -> T:
        """`value` of the main process, in every process."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group_src=0, group=self._small)
        return values[0]

    def all_gather(self, value: T) -> list[T]:
        """`value` of every process, by rank."""
        return all_gather_object(value, self._small)

    def barrier(self) -> None:
        """Return when all processes have called it."""
        if self.group is not None:
            dist.barrier(group=self._small)

    def rows(self, total: int) -> range:
        """Rows of this process among `total`: every `size`-th, from `rank` on."""
        return range(self.rank, total, self.size)

    def gather_rows(self, mine: NDArray, total: int) -> NDArray:
        """all_gather of rows: `mine`, those of `rows(total)` -> the rows of all processes in order, (total, ...)."""
        if self.group is None:
            return mine
        if mine.dtype == np.bool_:
            return self.gather_rows(mine.astype(np.uint8), total).astype(np.bool_)
        longest = -(-total // self.size)
        sent = torch.zeros(longest, *mine.shape[1:], dtype=torch.from_numpy(mine[:0]).dtype, device=self.device)
        sent[: len(mine)] = torch.from_numpy(np.ascontiguousarray(mine)).to(self.device)
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent, group=self.group)
        # Row r of process p is row r * size + p of the whole.
        return torch.stack(parts, dim=1).flatten(0, 1)[:total].cpu().numpy()

    def shorten_timeouts(self, seconds: float) -> None:
        """Fail from now on when a collective operation takes longer: a lost or hung process is noticed soon."""
        for group in (self.group, self.control):
            if group is not None:
                # The public constructor argument cannot be changed later; torchtitan shortens its timeouts likewise.
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others do."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    @property
    def _small(self) -> dist.ProcessGroup | None:
        """The group for small decisions."""
        return self.control or self.group

    @property
    def _small_device(self) -> torch.device:
        """Where its tensors are: nccl, which another library may have started alone, takes none of the CPU."""
        return self.device if self.control is None else torch.device("cpu")


SINGLE_PROCESS = Processes()


def all_gather_object(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """`value` of every process of `group`, by rank; None is a group of one."""
    if group is None:
        return [value]
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def is_sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether this is a DTensor; their module takes a second to import, which only runs that shard should pay."""
    return hasattr(tensor, "to_local")


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor, else the tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor with all its shards, without a gradient; all processes must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor.detach()


def sum_over_shards(share: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Sum of every process's `share` over the shards that `tensors` are cut into; `share` where none is sharded."""
    sharded = next((tensor for tensor in tensors if is_sharded(tensor)), None)
    if sharded is None:
        return share
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if placement.is_shard() else Replicate() for placement in sharded.placements]
    return DTensor.from_local(share, sharded.device_mesh, placements).full_tensor()


@contextmanager
def join_processes(start_seconds: float, replicate: int = 1, device: str = "auto") -> Iterator[Processes]:
    """Join the processes that torchrun started; yields this process alone without torchrun.

    `device` as for `resolve_device`. A collective operation may take `start_seconds` until
    `Processes.shorten_timeouts`. Raises OpenVisionError when `replicate` groups do not divide the processes.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        _check(replicate, 1)
        alone = resolve_device(device)
        yield SINGLE_PROCESS if alone.type == "cpu" else Processes(device=alone)
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _check(replicate, size)
    own_device = resolve_device(device)
    backend = "cpu:gloo,cuda:nccl" if own_device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=start_seconds)
    dist.init_process_group(backend, store=_store(rank, size, timeout), rank=rank, world_size=size, timeout=timeout)
    # Writing a checkpoint may take as long as the file system likes.
    saving = _gloo_group(hours=2)
    control = _gloo_group(seconds=start_seconds)
    yield Processes(rank, size, own_device, dist.group.WORLD, control, saving)
    # Not after an error: shutting down with processes that are gone may never return.
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


def _check(replicate: int, size: int) -> None:
    if size % replicate:
        raise OpenVisionError(
            f"parallel.replicate {replicate} does not divide the {size} processes; "
            "choose a divisor of their number, or start with torchrun --nproc-per-node"
        )
