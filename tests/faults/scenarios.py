"""What the forked processes do: a real run of a small recipe, with one fault put into it where the test says.

Faults are named by where they strike, so that they strike at the same place every time. They are put in by replacing
single functions of the process, which is the test's own; the training code knows nothing of them.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch


def train(recipe: str, data: str, run: str, faults: dict[str, Any] | None = None, force: bool = False) -> int:
    """`openvision train` as the command line runs it; returns the exit code."""
    torch.set_num_threads(1)
    inject(faults or {})
    from openvision.cli.main import main

    sys.argv = ["openvision", "train", recipe, "--data", data, "--run", run, *(["--force"] if force else [])]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def inject(faults: dict[str, Any]) -> None:
    """Put the named faults into this process."""
    for name, value in faults.items():
        globals()[f"_{name}"](value)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_step(step: int, do: Any, saved: bool = False) -> None:
    """Do something in the step after `step` updates, between the batch and the update; once all is `saved`, or not."""
    from openvision.training.step import Step

    agree = Step._agree

    def agree_with_fault(self: Any, *arguments: Any) -> Any:
        if self.run.progress.step == step:
            if saved:
                self.run.checkpoints.finish()
            do()
        return agree(self, *arguments)

    Step._agree = agree_with_fault  # pyright: ignore[reportAttributeAccessIssue]


def _kill_at_step(step: int) -> None:
    """kill -9 in the middle of a step."""
    _at_step(step, _die)


def _signal_at_step(what: list[int]) -> None:
    """A signal (number) while a step (number) is under way."""
    step, number = what
    _at_step(step, lambda: os.kill(os.getpid(), number))


def _hang_at_step(what: list[float]) -> None:
    """No progress for some seconds in a step (number)."""
    step, seconds = what
    _at_step(int(step), lambda: time.sleep(seconds))


def _in_set_up(place: str, do: Any) -> None:
    """Do something when a function of the set-up is called, which then takes long."""
    from openvision.training.setup import parts

    def interrupted(*arguments: Any, **options: Any) -> Any:
        do()
        time.sleep(30)
        raise AssertionError("nothing ended this process")

    setattr(parts, place, interrupted)


def _signal_in_set_up(what: list[Any]) -> None:
    """A signal (number) while a function (name) of the set-up is under way."""
    place, number = what
    _in_set_up(place, lambda: os.kill(os.getpid(), number))


def _kill_in_set_up(place: str) -> None:
    """kill -9 in a function of the set-up."""
    _in_set_up(place, _die)


def _kill_in_save(call: int) -> None:
    """kill -9 at the n-th of the calls that bring a checkpoint to disk: files, state, manifest, rename, removal."""
    counted = [0]

    def counting(function: Any) -> Any:
        def call_or_die(*arguments: Any, **options: Any) -> Any:
            counted[0] += 1
            if counted[0] == call:
                _die()
            return function(*arguments, **options)

        return call_or_die

    from openvision.training.checkpoint import folders as checkpoint_files
    from openvision.training.checkpoint import manager as checkpoint
    from openvision.training.checkpoint import tensors as checkpoint_tensors

    checkpoint_tensors.dcp.save = counting(checkpoint_tensors.dcp.save)
    for name in ("write_state", "write_durably", "sync_folder", "prune", "hash_file"):
        setattr(checkpoint, name, counting(getattr(checkpoint, name)))
    for function in ("fsync", "replace"):
        setattr(os, function, counting(getattr(os, function)))
    checkpoint_files.shutil.rmtree = counting(checkpoint_files.shutil.rmtree)


def _kill_in_load(call: int) -> None:
    """kill -9 while a checkpoint is being read: after so many files were hashed, or before the tensors are."""
    from openvision.training.checkpoint import folders as checkpoint_files
    from openvision.training.checkpoint import tensors as checkpoint_tensors

    counted = [0]
    hash_file, load = checkpoint_files.hash_file, checkpoint_tensors.dcp.load

    def hash_or_die(path: Path) -> Any:
        counted[0] += 1
        if counted[0] == call:
            _die()
        return hash_file(path)

    def load_or_die(*arguments: Any, **options: Any) -> Any:
        load(*arguments, **options)
        _die()

    checkpoint_files.hash_file = hash_or_die
    checkpoint_tensors.dcp.load = load_or_die


def _file_limit_at_step(what: list[int]) -> None:
    """From a step (number) on no file may grow beyond so many bytes: what a full disk does to large files."""
    step, size = what
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # A save that is still on its way would meet the limit, too.
    _at_step(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)), saved=True)


def _file_limit_after_training(size: int) -> None:
    """From the last checkpoint on no file may grow beyond so many bytes."""
    from openvision.training.trainer import Trainer

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    write = Trainer._write_model

    def write_limited(self: Any) -> None:
        self.parts.checkpoints.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        write(self)

    Trainer._write_model = write_limited


def _descriptor_limit_at_step(step: int) -> None:
    """From a step (number) on no file can be opened."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    _at_step(step, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard)))


def _full_file_at_step(what: list[Any]) -> None:
    """From a step (number) on a file (path) is on a full disk."""
    step, path = what

    def fill() -> None:
        os.replace(path, f"{path}.real")
        os.symlink("/dev/full", path)

    _at_step(step, fill)


def _free_file_at_step(what: list[Any]) -> None:
    """Somebody made room for that file."""
    step, path = what
    _at_step(step, lambda: os.replace(f"{path}.real", path))


def _closed_output_at_step(step: int) -> None:
    """From a step (number) on nobody reads standard output."""

    def close() -> None:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)

    _at_step(step, close)


def _free_files_at_step(step: int) -> None:
    """The limit is gone: somebody made room."""
    _at_step(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)))


def _nan_at_step(step: int) -> None:
    """A batch whose pixels are not a number."""
    from openvision.models import vision
    from openvision.training.step import Step

    normalize = vision.normalize
    now = [False]

    def poisoned(images: torch.Tensor) -> torch.Tensor:
        pixels = normalize(images)
        return pixels * float("nan") if now[0] else pixels

    vision.normalize = poisoned
    take_step = Step.__call__

    def step_with_fault(self: Any, *arguments: Any) -> Any:
        now[0] = self.run.progress.step == step
        return take_step(self, *arguments)

    Step.__call__ = step_with_fault  # pyright: ignore[reportAttributeAccessIssue]


def _nan_gradient_at_step(step: int) -> None:
    """A gradient that is not a number though the loss is fine."""
    from openvision.training import step as steps

    backward = steps.forward_backward
    counted = [0]

    def poisoned(model: Any, *arguments: Any) -> Any:
        losses = backward(model, *arguments)
        if counted[0] == step:
            next(model.module.parameters()).grad.fill_(float("nan"))
        counted[0] += 1
        return losses

    steps.forward_backward = poisoned


def _jump_at_step(what: list[float]) -> None:
    """Losses and gradients of a step (number) multiplied."""
    step, factor = what
    from openvision.training import step as steps

    backward = steps.forward_backward
    counted = [0]

    def raised(model: Any, *arguments: Any) -> Any:
        losses = backward(model, *arguments)
        if counted[0] == step:
            losses.total = losses.total * factor
            for parameter in model.module.parameters():
                parameter.grad.mul_(factor)
        counted[0] += 1
        return losses

    steps.forward_backward = raised


def _slow_loader(seconds: float) -> None:
    """Every batch comes late."""
    from openvision.data.loader import Loader

    following = Loader.__next__

    def late(self: Any) -> Any:
        time.sleep(seconds)
        return following(self)

    Loader.__next__ = late


def _clock_jumps(seconds: float) -> None:
    """The wall clock is set forward, then back, every time anybody looks."""
    true, looks = time.time, [0]

    def jumping() -> float:
        looks[0] += 1
        return true() + (seconds if looks[0] % 2 else -seconds)

    time.time = jumping


def _note_batches(path: str) -> None:
    """Write the keys of every batch of this process to a file."""
    from openvision.data.loader import Loader

    following = Loader.__next__

    def noting(self: Any) -> Any:
        batch = following(self)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"first": int(batch.positions[0]), "keys": batch.keys}) + "\n")
        return batch

    Loader.__next__ = noting
