"""Tensors of a checkpoint: gather, stage, write and read them with torch.distributed.checkpoint (DCP).

DCP plans which process writes what and reshards on loading: a checkpoint of two processes loads in one or in four, one
of DDP in FSDP. Files are safetensors; nothing is pickled. Importing this module takes a second: import it late.
"""

import errno
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from openvision.errors import OpenVisionError
from openvision.training.checkpoint.folders import State
from openvision.training.optimizer.update import AVERAGE

# Target size of a file: on resume the processes share the files to hash.
FILE_BYTES = 2**28
# Saving in one process, without torchrun, is intended.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
_MODEL, _OPTIMIZER = "model.", "optimizer."


def gather_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, int | float]]]:
    """Parameters and optimizer state by name, and the optimizer state that is not a tensor: entry -> name -> number."""
    tensors = {f"{_MODEL}{name}": tensor.detach() for name, tensor in model.named_parameters()}
    numbers: dict[str, dict[str, int | float]] = {}
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{entry}.{name}"] = value
            else:
                numbers.setdefault(entry, {})[name] = value
    return tensors, numbers


def load_tensors(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Load a checkpoint into `model` and a fresh `optimizer`, at any number of processes and in any mode.

    Raises OpenVisionError when a shape is not that of the model.
    """
    reader = HuggingFaceStorageReader(str(path))
    stored = reader.read_metadata().state_dict_metadata
    wanted = {f"{_MODEL}{name}": parameter.detach() for name, parameter in model.named_parameters()}
    _check_shapes(path, wanted, stored)
    for name, parameter in model.named_parameters():
        moments = _moments_of(name, parameter, stored)
        wanted |= {f"{_OPTIMIZER}{entry}.{name}": tensor for entry, tensor in moments.items()}
        numbers = {entry: values[name] for entry, values in state.optimizer.items() if name in values}
        if moments or numbers:
            optimizer.state[parameter] = {**numbers, **moments}
    dcp.load(wanted, storage_reader=reader, process_group=group, no_dist=group is None)


def load_parameters(path: Path, model: nn.Module, average: bool = False) -> None:
    """Load the parameters of an unsharded model; `average` loads the averaged ones (optimizer.ema).

    Raises OpenVisionError when a shape is not that of the model, or the checkpoint has no averages.
    """
    reader = HuggingFaceStorageReader(str(path))
    stored = reader.read_metadata().state_dict_metadata
    prefix = f"{_OPTIMIZER}{AVERAGE}." if average else _MODEL
    if average and not any(name.startswith(prefix) for name in stored):
        raise OpenVisionError(f"checkpoint {path} has no averaged parameters: its recipe has no optimizer.ema")
    wanted = {f"{prefix}{name}": parameter.detach() for name, parameter in model.named_parameters()}
    _check_shapes(path, wanted, stored)
    dcp.load(wanted, storage_reader=reader, no_dist=True)


def _moments_of(name: str, parameter: Tensor, stored: Mapping[str, STORAGE_TYPES]) -> dict[str, Tensor]:
    """Zeros for the stored optimizer state of a parameter, sharded like the parameter."""
    ending, found = f".{name}", {}
    for key, metadata in stored.items():
        if key.startswith(_OPTIMIZER) and key.endswith(ending) and isinstance(metadata, TensorStorageMetadata):
            entry = key.removeprefix(_OPTIMIZER).removesuffix(ending)
            if "." not in entry:
                found[entry] = torch.zeros_like(parameter, dtype=metadata.properties.dtype)
    return found


def _check_shapes(path: Path, wanted: dict[str, Tensor], stored: Mapping[str, STORAGE_TYPES]) -> None:
    there = {name: tuple(entry.size) for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    for name, tensor in wanted.items():
        if there.get(name) != tuple(tensor.shape):
            raise OpenVisionError(
                f"checkpoint {path} is of another model: {name.removeprefix(_MODEL)} has shape {there.get(name)}, "
                f"in the recipe {tuple(tensor.shape)}; choose another run folder"
            )


class _Writer(HuggingFaceStorageWriter):
    """Writes tensors without a copy in memory.

    The stock writer first assembles a file in memory and holds the GIL, which blocks the training step. The files are
    identical to those of the stock writer, and the stock reader reads them.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and fsync the items of this process."""
        numbers: dict[str, int] = plan.storage_data["fqn_to_index_mapping"] if plan.items else {}
        files: dict[int, list[WriteItem]] = {}
        for item in plan.items:
            files.setdefault(numbers[item.index.fqn], []).append(item)
        for number, items in files.items():
            rank, last = plan.storage_data["shard_index"], max(numbers.values())
            name = f"shard-{rank:05d}-model-{number:05d}-of-{last:05d}.safetensors"
            _write_file(Path(self.path) / name, items, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done


def _write_file(path: Path, items: list[WriteItem], planner: SavePlanner) -> None:
    tensors, offsets = {}, {}
    for item in items:
        assert item.tensor_data is not None
        data = planner.resolve_data(item)
        assert isinstance(data, Tensor)
        tensors[item.index.fqn] = data.detach().contiguous()
        offsets[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
    described = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    try:
        save_file(tensors, path, metadata=described)
    except SafetensorError as error:
        raise _system_error(error) from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _system_error(error: SafetensorError) -> OSError:
    """The OSError behind a SafetensorError, which has its number only in its text."""
    number = re.search(r"os error (\d+)", str(error))
    code = int(number[1]) if number else errno.EIO
    return OSError(code, os.strerror(code))


def write_tensors(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Write tensors to `folder`, each process its shards; raises OSError when any process fails."""
    writer = _Writer(str(folder), _files_of(tensors), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise _cause(error) from None


def _cause(error: CheckpointException) -> Exception:
    """Exception of the first process that failed."""
    found = next(iter(error.failures.values()))[0]
    return found if isinstance(found, Exception) else RuntimeError(repr(found))


def _files_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Tensor name -> number of its file, from 1 on."""
    numbers, number, room = {}, 1, FILE_BYTES
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and room < FILE_BYTES:
            number, room = number + 1, FILE_BYTES
        numbers[name] = number
        room -= size
    return numbers


class Stager:
    """Copies a state to the CPU, into the same memory each time."""

    def __init__(self) -> None:
        self._pinned = torch.cuda.is_available()
        # torch's public stager around it forgets its memory after each copy in 2.11, and fails at the second.
        self._stager = StateDictStager(pin_memory=self._pinned, share_memory=False)

    def stage(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors on the CPU, complete when this returns."""
        copies = self._stager.stage(tensors, non_blocking=self._pinned)
        for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        return copies

    def close(self) -> None:
        """Free the memory."""
        self._stager.close()
