"""Saving and restoring a run: sharded, in the background, at any number of processes.

- Every process writes its share, and a run goes on with another number of processes (checkpoint_tensors.py).
- Training waits only for a copy of the state; a thread writes it, hashes it and gives the folder its name.
- A save that fails (a full disk, say) is reported, and training goes on: the checkpoint before is untouched.
- Data order, crops and what else is random are functions of (seed, position): no generator state is kept.
"""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openvision.errors import OpenVisionError
from openvision.runtime import SINGLE_PROCESS, Processes, all_gather_object
from openvision.training.checkpoint.folders import (
    MANIFEST,
    STATE,
    DamagedCheckpointError,
    Progress,
    State,
    checkpoints,
    describe,
    folder_of,
    prune,
    read_state,
    remove_unfinished,
    set_aside,
    sync_folder,
    verify,
    write_durably,
    write_state,
)


class Checkpoints:
    """The checkpoints of one run; every method is called by all processes alike."""

    def __init__(
        self,
        folder: Path,
        processes: Processes = SINGLE_PROCESS,
        keep: int = 2,
        say: Callable[[str], None] = print,
        written_by: dict[str, Any] | None = None,
    ) -> None:
        """`written_by` is noted in every checkpoint; `say` is told what a person should know."""
        self.folder = folder
        self.processes = processes
        self.keep = keep
        self.say = say
        self.written_by = written_by or {}
        self._stager: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._written: int | None = None
        if processes.is_main:
            remove_unfinished(folder)
        processes.barrier()

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Copy the state after `progress.step` updates and write it in the background, unless that was done already.

        Waits for the save before, whose memory it uses again.
        """
        from openvision.training.checkpoint.tensors import gather_state, make_stager

        self.finish()
        if progress.step == self._written:
            return
        tensors, numbers = gather_state(model, optimizer)
        written_by = {**self.written_by, "processes": self.processes.size, "time": _now()}
        state = State(deepcopy(progress), numbers, written_by)
        self._stager = self._stager or make_stager()
        self._pending = self._thread.submit(self._write, self._stager.stage(tensors), state)

    @property
    def writing(self) -> bool:
        """Whether a save is still under way."""
        return self._pending is not None and not self._pending.done()

    def finish(self) -> None:
        """Wait until nothing is being written any more."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish, and let go of the memory."""
        self.finish()
        self._thread.shutdown()
        if self._stager is not None:
            self._stager.close()
            self._stager = None

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Load the newest checkpoint that is whole into `model` and a fresh `optimizer`; a new `Progress` without any.

        A damaged one is set aside, and the one before is taken. Raises OpenVisionError when all are damaged.
        """
        found = self.processes.broadcast(checkpoints(self.folder))
        for path in reversed(found):
            reason = self._load(path, model, optimizer)
            if isinstance(reason, Progress):
                self._written = reason.step
                return reason
            if self.processes.is_main:
                place = set_aside(path)
                self.say(
                    f"checkpoint {path.name} is damaged ({reason}); set aside as {place.name}, trying the one before"
                )
        if found:
            raise OpenVisionError(
                f"all {len(found)} checkpoints in {self.folder} are damaged; restore one, or remove the folder "
                "to start anew"
            )
        return Progress()

    def _load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | str:
        """The progress of a checkpoint after loading it, or what is wrong with it, everywhere the same."""
        from openvision.training.checkpoint.tensors import load_tensors

        state: State | None = None
        try:
            verify(path, self.processes.rank, self.processes.size)
            state, reason = read_state(path), ""
        except DamagedCheckpointError as error:
            reason = str(error)
        reasons = all_gather_object(reason, self.processes.control)
        if reason := next(filter(None, reasons), ""):
            return reason
        assert state is not None
        load_tensors(path, model, optimizer, state, self.processes.control)
        return state.progress

    def _write(self, tensors: dict[str, Tensor], state: State) -> None:
        """Runs in the thread: all processes together write one folder, and none leaves before it has its name."""
        from openvision.training.checkpoint.tensors import write_tensors

        step = state.progress.step
        final = folder_of(self.folder, step)
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            write_tensors(temporary, tensors, self.processes.saving)
            mine = temporary.glob(f"shard-{self.processes.rank + 1:05d}-*")
            self._agree(self._together(lambda: {path.name: describe(path) for path in mine}, temporary, final, state))
            self._written = step
        except Exception as error:
            # A lost process is noticed by training itself; here only this save is lost.
            if self.processes.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                self.say(
                    f"checkpoint of step {step} could not be written ({_reason(error)}); "
                    "the one before is kept and training goes on"
                )

    def _together(
        self, hashes: Callable[[], dict[str, Any]], temporary: Path, final: Path, state: State
    ) -> OSError | None:
        """Collect the hashes of all processes and complete the folder; the error, if any, that ended it."""
        try:
            mine: Any = hashes()
        except OSError as error:
            mine = error
        parts = all_gather_object(mine, self.processes.saving)
        failed = next((part for part in parts if isinstance(part, OSError)), None)
        if failed is not None or not self.processes.is_main:
            return failed
        try:
            self._complete({name: entry for part in parts for name, entry in part.items()}, temporary, final, state)
        except OSError as error:
            return error
        return None

    def _complete(self, files: dict[str, Any], temporary: Path, final: Path, state: State) -> None:
        write_state(temporary, state)
        files[STATE] = describe(temporary / STATE)
        write_durably(temporary / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")
        sync_folder(temporary)
        if final.exists():
            os.replace(final, final.with_name(f".{final.name}.old"))
        os.replace(temporary, final)
        sync_folder(self.folder)
        best = state.progress.best
        prune(self.folder, self.keep, [int(best["step"])] if best else [])
        remove_unfinished(self.folder)

    def _agree(self, error: OSError | None) -> None:
        """Fail everywhere when it failed anywhere."""
        failed = next((each for each in all_gather_object(error, self.processes.saving) if each is not None), None)
        if failed is not None:
            raise failed


def _reason(error: BaseException) -> str:
    """What ended a save, without the machinery around it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
