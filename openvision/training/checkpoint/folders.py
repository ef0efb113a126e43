"""Checkpoint folders: their files, and how to find, verify, list and prune them.

    RUN/checkpoints/step-00001200/shard-00001-model-00001-of-00001.safetensors   shards of one process
    RUN/checkpoints/step-00001200/state.json      step, position, stage, and what else an exact resume needs
    RUN/checkpoints/step-00001200/manifest.json   size and SHA-256 of every other file

A folder is renamed to step-N only when all its files are on disk. A damaged checkpoint is set aside under another name,
not deleted.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TypedDict

from openvision.errors import OpenVisionError
from openvision.files import JsonObject, check_file, read_json

STATE = "state.json"
MANIFEST = "manifest.json"
FORMAT = 2
_PREFIX = "step-"
# Copies and notes that people put beside the checkpoints have other names, and are left alone.
_NAME = re.compile(rf"{_PREFIX}\d{{8,}}")
_UNFINISHED = re.compile(rf"\.{_PREFIX}\d{{8,}}\.(tmp|old)")
_DAMAGED = "damaged-"
_BLOCK = 2**22
_MIB = 2**20


@dataclass
class Progress:
    """Progress of a run."""

    step: int = 0
    """Updates taken, over all stages."""
    stage: int = 0
    stage_step: int = 0
    """Updates taken in the current stage."""
    position: int = 0
    """Samples seen, over all stages."""
    seconds: float = 0.0
    """Training time, without evaluation."""
    tflops: float = 0.0
    """Training compute, 10^12 FLOPs."""
    skipped: int = 0
    """Updates skipped because of a loss spike."""
    skipped_in_a_row: int = 0
    """Updates skipped since the last update taken."""
    recent_losses: list[float] = field(default_factory=list)
    """Recent losses, to detect loss spikes."""
    best: dict[str, float] | None = None
    """Best `value` of the metric `run.checkpoint_best`, and its `step`."""


@dataclass(frozen=True)
class State:
    """Content of state.json."""

    progress: Progress
    optimizer: dict[str, dict[str, int | float]]
    """Optimizer state that is not a tensor: entry -> parameter name -> number."""
    written_by: JsonObject
    """Processes, mode, time and data manifest, for information."""


class FileEntry(TypedDict):
    """Entry of a file in manifest.json."""

    bytes: int
    sha256: str


class DamagedCheckpointError(Exception):
    """A checkpoint differs from what was written."""


class RemovedCheckpointError(DamagedCheckpointError):
    """A checkpoint was removed while it was read."""


def folder_of(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` updates."""
    return checkpoints / f"{_PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Number of updates before a checkpoint."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (path for path in folder.glob(f"{_PREFIX}*") if _NAME.fullmatch(path.name))
    return sorted((path for path in found if (path / MANIFEST).is_file()), key=step_of)


def remove_unfinished(folder: Path) -> None:
    """Remove the files of an interrupted save."""
    for path in folder.glob(f".{_PREFIX}*"):
        if not _UNFINISHED.fullmatch(path.name):
            continue
        shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep: int, keep_steps: Iterable[int]) -> None:
    """Remove all checkpoints but the newest `keep` and those of `keep_steps`."""
    kept = set(keep_steps)
    for old in checkpoints(folder)[:-keep]:
        if step_of(old) not in kept:
            # Remove the manifest first: a folder without it is not taken for a checkpoint.
            (old / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that it is not loaded again; returns its new path. Raises OpenVisionError."""
    place = checkpoint.with_name(_DAMAGED + checkpoint.name)
    shutil.rmtree(place, ignore_errors=True)
    try:
        os.replace(checkpoint, place)
    except OSError as error:
        raise OpenVisionError(
            f"damaged checkpoint {checkpoint} cannot be renamed ({error.strerror}); move it away"
        ) from error
    return place


def damaged(folder: Path) -> list[Path]:
    """Damaged checkpoints that were set aside."""
    return sorted(folder.glob(f"{_DAMAGED}{_PREFIX}*"))


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def read_manifest(checkpoint: Path) -> dict[str, FileEntry]:
    """Name -> entry of the files of a checkpoint; raises DamagedCheckpointError."""
    try:
        files = dict(read_json(checkpoint / MANIFEST)["files"])
        for name, entry in files.items():
            if Path(name).name != name or type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
                raise ValueError(f"the entry of {name!r:.100} is no file of this folder with its size and SHA-256")
        return files
    except (OpenVisionError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{MANIFEST} cannot be read: {error}") from error


def verify(checkpoint: Path, part: int = 0, parts: int = 1) -> int:
    """Compare the files of a checkpoint with its manifest; returns the bytes read.

    Reads files `part`, `part + parts`, ...: processes share the work. Raises DamagedCheckpointError naming the file.
    """
    total = 0
    for name, wanted in sorted(read_manifest(checkpoint).items())[part::parts]:
        try:
            check_file(checkpoint / name)
            found = hash_file(checkpoint / name)
        except OpenVisionError as error:
            raise DamagedCheckpointError(str(error)) from error
        except OSError as error:
            raise DamagedCheckpointError(f"{name} cannot be read: {error.strerror}") from error
        if found["bytes"] != wanted["bytes"]:
            raise DamagedCheckpointError(f"{name} has {found['bytes']} bytes, {wanted['bytes']} were written")
        if found["sha256"] != wanted["sha256"]:
            raise DamagedCheckpointError(f"{name} differs from what was written (SHA-256)")
        total += found["bytes"]
    return total


def write_state(folder: Path, state: State) -> None:
    """Write state.json to `folder`."""
    content = {"format": FORMAT, **asdict(state)}
    write_durably(folder / STATE, json.dumps(content, indent=1) + "\n")


def read_state(checkpoint: Path) -> State:
    """Read state.json; raises DamagedCheckpointError."""
    try:
        content = read_json(checkpoint / STATE)
        known = {each.name for each in fields(Progress)}
        progress = Progress(**{key: value for key, value in content["progress"].items() if key in known})
        if progress.step != step_of(checkpoint):
            raise DamagedCheckpointError(f"{STATE} is of step {progress.step}: the folder was renamed or copied")
        state = State(progress, content["optimizer"], content["written_by"])
        _check_state(state)
        return state
    except DamagedCheckpointError:
        raise
    except (OpenVisionError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{STATE} cannot be read: {error}") from error


def _check_state(state: State) -> None:
    """Raise ValueError for a value that no run has written."""
    progress = state.progress
    for name in ("step", "stage", "stage_step", "position", "skipped", "skipped_in_a_row"):
        value = getattr(progress, name)
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError(f"progress.{name} is {value!r:.80} instead of a count")
    numbers = [progress.seconds, progress.tflops, *progress.recent_losses]
    numbers += (progress.best or {"step": 0, "value": 0}).values()
    numbers += [value for values in state.optimizer.values() for value in values.values()]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in numbers):
        raise ValueError("a number of its progress or of its optimizer is none")
    if not isinstance(state.written_by, dict):
        raise ValueError("written_by is no object")


def write_durably(path: Path, text: str) -> None:
    """Write a file and fsync it."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Fsync a folder, i.e. the names in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_checkpoint(run: Path, which: str) -> Path:
    """Checkpoint "newest", "best", or of a number of steps.

    Raises OpenVisionError when the run has no such checkpoint.
    """
    folder = run / "checkpoints"
    found = checkpoints(folder)
    if not found:
        raise OpenVisionError(f"{run} has no checkpoint; give the folder of a run, or wait for its first save")
    if which == "newest":
        return found[-1]
    there = {step_of(path): path for path in found}
    if which == "best":
        best = _read(found[-1]).progress.best
        if best is None:
            raise OpenVisionError(f"{run} has no best checkpoint; set run.checkpoint_best to a metric")
        step = int(best["step"])
    elif which.isdigit():
        step = int(which)
    else:
        raise OpenVisionError(f"{which!r} is not a checkpoint; give newest, best or a number of steps")
    if step not in there:
        raise OpenVisionError(f"{run} has no checkpoint of step {step}; choose one of {', '.join(map(str, there))}")
    return there[step]


def _read(checkpoint: Path) -> State:
    try:
        return read_state(checkpoint)
    except DamagedCheckpointError as error:
        raise OpenVisionError(f"checkpoint {checkpoint}: {error}") from error


def verify_beside_training(checkpoint: Path) -> int:
    """`verify` while a training may prune or replace the checkpoint; raises RemovedCheckpointError, too."""
    while True:
        before = _manifest_bytes(checkpoint)
        try:
            return verify(checkpoint)
        except DamagedCheckpointError as error:
            # `prune` removes the manifest first.
            now = _manifest_bytes(checkpoint)
            if now is None:
                raise RemovedCheckpointError(str(error)) from error
            if now == before:
                raise


def _manifest_bytes(checkpoint: Path) -> bytes | None:
    try:
        return (checkpoint / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedCheckpointError(f"{MANIFEST} cannot be read: {error.strerror}") from error


def table_of(run: Path) -> list[str]:
    """Lines of a table: header, one line per checkpoint, damaged ones last. Raises OpenVisionError without any."""
    folder = run / "checkpoints"
    find_checkpoint(run, "newest")
    lines = [f"{'step':>10}  {'stage':>5}  {'samples':>14}  {'size':>12}  {'processes':>9}  {'mode':<12} written"]
    best = None
    for path in checkpoints(folder):
        try:
            state, size = read_state(path), sum(file["bytes"] for file in read_manifest(path).values())
        except DamagedCheckpointError as error:
            if not (path / MANIFEST).exists():
                # A training has pruned it since.
                continue
            lines.append(f"{step_of(path):>10}  damaged: {error}")
            continue
        progress, by = state.progress, state.written_by
        best = progress.best
        lines.append(
            f"{progress.step:>10}  {progress.stage + 1:>5}  {progress.position:>14,}  {size / _MIB:>8.1f} MiB  "
            f"{by.get('processes', 1):>9}  {by.get('mode', ''):<12} {by.get('time', '')}"
        )
    if best is not None:
        lines.append(f"best: step {int(best['step'])} ({best['value']:.4g})")
    lines += [f"set aside as damaged: {path.name}" for path in damaged(folder)]
    return lines


def verify_all(run: Path, which: str) -> Iterator[str]:
    """Verify one checkpoint or "all", one line each; raises OpenVisionError at the end if any is damaged."""
    newest = find_checkpoint(run, "newest" if which == "all" else which)
    broken = []
    for path in checkpoints(run / "checkpoints") if which == "all" else [newest]:
        try:
            yield f"{path.name}: intact, {verify_beside_training(path) / _MIB:.1f} MiB read"
        except RemovedCheckpointError:
            yield f"{path.name}: removed meanwhile by the training"
        except DamagedCheckpointError as error:
            broken.append(path.name)
            yield f"{path.name}: DAMAGED, {error}"
    if broken:
        raise OpenVisionError(
            f"{', '.join(broken)} in {run / 'checkpoints'}: damaged; the run resumes from the newest intact one"
        )
