"""Save and restore a run: sharded, in the background, at any number of processes.

- Every process writes its shards; a run can be resumed with another number of processes (tensors.py).
- Training waits only for a copy of the state. A thread writes and hashes the files and renames the folder.
- A failed save (e.g. a full disk) is reported and training continues; the previous checkpoint is untouched.
- No generator state is saved: data order, crops and all other randomness are functions of (seed, position).
"""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.runtime import SINGLE_PROCESS, Processes, all_gather_object
from openvision.terminal import echo
from openvision.training.checkpoint.folders import (
    MANIFEST,
    STATE,
    DamagedCheckpointError,
    FileEntry,
    Progress,
    State,
    checkpoints,
    folder_of,
    hash_file,
    prune,
    read_state,
    remove_unfinished,
    set_aside,
    sync_folder,
    verify,
    write_durably,
    write_state,
)

if TYPE_CHECKING:
    from openvision.training.checkpoint.tensors import Stager

T = TypeVar("T")


class Checkpoints:
    """Checkpoints of one run. All processes must call every method together."""

    def __init__(
        self,
        folder: Path,
        processes: Processes = SINGLE_PROCESS,
        keep: int = 2,
        say: Callable[[str], None] = echo,
        written_by: JsonObject | None = None,
    ) -> None:
        """`written_by` is stored in every checkpoint; `say` receives messages for the user."""
        self.folder = folder
        self.processes = processes
        self.keep = keep
        self.say = say
        self.written_by = written_by or {}
        self.restored: JsonObject = {}
        """`written_by` of the checkpoint that `restore` loaded."""
        self._stager: Stager | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._written: int | None = None
        if processes.is_main:
            remove_unfinished(folder)
        processes.barrier()

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, again: bool = False) -> None:
        """Copy the state after `progress.step` updates and write it in the background; once per step unless `again`.

        Waits for the previous save, whose staging memory it reuses.
        """
        from openvision.training.checkpoint.tensors import Stager, gather_state

        self.finish()
        if progress.step == self._written and not again:
            return
        tensors, numbers = gather_state(model, optimizer)
        time = datetime.now(UTC).isoformat(timespec="seconds")
        state = State(deepcopy(progress), numbers, {**self.written_by, "processes": self.processes.size, "time": time})
        self._stager = self._stager or Stager()
        copies = self._stager.stage(tensors)
        self._pending = self._thread.submit(self._write, copies, state)

    @property
    def writing(self) -> bool:
        """Whether a save is in progress."""
        return self._pending is not None and not self._pending.done()

    def finish(self) -> None:
        """Wait for the save in progress."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the save in progress and free the staging memory."""
        self.finish()
        self._thread.shutdown()
        if self._stager is not None:
            self._stager.close()
            self._stager = None

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Load the newest intact checkpoint into `model` and a fresh `optimizer`; without one return `Progress()`.

        A damaged checkpoint is set aside and the one before is tried. Raises OpenVisionError when all are damaged.
        """
        found = self.processes.broadcast(checkpoints(self.folder))
        for path in reversed(found):
            loaded = self._load(path, model, optimizer)
            if isinstance(loaded, Progress):
                self._written = loaded.step
                return loaded
            if self.processes.is_main:
                place = set_aside(path)
                self.say(
                    f"checkpoint {path.name} is damaged ({loaded}); set aside as {place.name}, trying the one before"
                )
        if found:
            raise OpenVisionError(
                f"all {len(found)} checkpoints in {self.folder} are damaged; restore one, or remove the folder "
                "to train from the start"
            )
        return Progress()

    def _load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | str:
        """Progress of a checkpoint after loading it, or its damage; the same in every process."""
        from openvision.training.checkpoint.tensors import load_tensors

        state: State | None = None
        try:
            verify(path, self.processes.rank, self.processes.size)
            state, damage = read_state(path), ""
        except DamagedCheckpointError as error:
            damage = str(error)
        if damage := next(filter(None, all_gather_object(damage, self.processes.control)), ""):
            return damage
        assert state is not None
        load_tensors(path, model, optimizer, state, self.processes.control)
        self.restored = state.written_by
        return state.progress

    def _write(self, tensors: dict[str, Tensor], state: State) -> None:
        """Write a checkpoint together with the other processes; runs in the background thread."""
        from openvision.training.checkpoint.tensors import write_tensors

        step = state.progress.step
        final = folder_of(self.folder, step)
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            write_tensors(temporary, tensors, self.processes.saving)
            mine = temporary.glob(f"shard-{self.processes.rank + 1:05d}-*")
            shards = self._together(lambda: {path.name: hash_file(path) for path in mine})
            files = {name: entry for part in shards for name, entry in part.items()}
            # No process returns before the folder has its final name.
            self._together(lambda: self._complete(files, temporary, final, state) if self.processes.is_main else None)
            self._written = step
        except Exception as error:
            # Training itself notices a lost process; here only this save fails.
            if self.processes.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                self.say(
                    f"checkpoint of step {step} could not be written ({_reason(error)}); "
                    "the previous one is kept and training continues"
                )

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Results of `work` in all processes, by rank; an OSError in any of them is raised in all."""
        try:
            mine: T | OSError = work()
        except OSError as error:
            mine = error
        results: list[T] = []
        for result in all_gather_object(mine, self.processes.saving):
            if isinstance(result, OSError):
                raise result
            results.append(result)
        return results

    def _complete(self, files: dict[str, FileEntry], temporary: Path, final: Path, state: State) -> None:
        """Add state and manifest, rename the folder, and remove old checkpoints."""
        write_state(temporary, state)
        files[STATE] = hash_file(temporary / STATE)
        write_durably(temporary / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")
        sync_folder(temporary)
        if final.exists():
            os.replace(final, final.with_name(f".{final.name}.old"))
        os.replace(temporary, final)
        sync_folder(self.folder)
        best = state.progress.best
        prune(self.folder, self.keep, [int(best["step"])] if best else [])
        remove_unfinished(self.folder)


def _reason(error: Exception) -> str:
    """Cause of a failed save in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
