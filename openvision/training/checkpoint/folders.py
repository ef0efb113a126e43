"""Checkpoints as folders: which there are, which are whole, and which may go.

    RUN/checkpoints/step-00001200/shard-00001-model-00001-of-00001.safetensors   a process's share of every tensor
    RUN/checkpoints/step-00001200/state.json      step, position, stage, clock, what else an exact continuation needs
    RUN/checkpoints/step-00001200/manifest.json   size and SHA-256 of every other file

A folder takes its name only when everything in it is on disk. One that turns out to be damaged is set aside under
another name, never deleted.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from openvision.errors import OpenVisionError

STATE = "state.json"
MANIFEST = "manifest.json"
FORMAT = 2
_PREFIX = "step-"
_DAMAGED = "damaged-"
_BLOCK = 2**22


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """Finished updates over all stages."""
    stage: int = 0
    stage_step: int = 0
    """Finished updates of the current stage."""
    position: int = 0
    """Samples consumed over all stages."""
    seconds: float = 0.0
    """Time spent training, evaluation not counted."""
    tflops: float = 0.0
    """Compute spent training, in 10^12 operations."""
    skipped: int = 0
    """Updates left out because the loss had jumped."""
    skipped_in_a_row: int = 0
    """Those of them since the newest update that was made."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the newest steps, which a jump is measured against."""
    best: dict[str, float] | None = None
    """`value` of the metric that says which checkpoint is best, and its `step`."""


@dataclass(frozen=True)
class State:
    """What state.json says."""

    progress: Progress
    optimizer: dict[str, dict[str, int | float]]
    """Numbers the optimizer keeps beside its tensors: entry -> parameter -> number."""
    written_by: dict[str, Any]
    """Processes, mode, time and versions: for people."""


class DamagedCheckpointError(Exception):
    """A checkpoint is not what was written."""


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return checkpoints / f"{_PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Updates before a checkpoint."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / MANIFEST).is_file())


def remove_unfinished(folder: Path) -> None:
    """Remove what an interrupted save left."""
    for path in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep: int, spared: Iterable[int]) -> None:
    """Remove all but the newest `keep` checkpoints and those of the steps `spared`."""
    kept = set(spared)
    for old in checkpoints(folder)[:-keep]:
        if step_of(old) not in kept:
            # The manifest goes first: a folder removed in part is no checkpoint any more.
            (old / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that nobody takes it for a good one; returns its new name."""
    place = checkpoint.with_name(_DAMAGED + checkpoint.name)
    shutil.rmtree(place, ignore_errors=True)
    os.replace(checkpoint, place)
    return place


def damaged(folder: Path) -> list[Path]:
    """Checkpoints that were set aside."""
    return sorted(folder.glob(f"{_DAMAGED}{_PREFIX}*"))


def describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as the manifest lists them."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Files of a checkpoint; raises DamagedCheckpointError."""
    try:
        return dict(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{MANIFEST} cannot be read: {error}") from error


def verify(checkpoint: Path, part: int = 0, parts: int = 1) -> int:
    """Read every file of a checkpoint and compare it with the manifest; returns the bytes read.

    With `parts`, only every so many files from number `part` on. Raises DamagedCheckpointError naming the file.
    """
    total = 0
    for name, wanted in sorted(read_manifest(checkpoint).items())[part::parts]:
        try:
            found = describe(checkpoint / name)
        except OSError as error:
            raise DamagedCheckpointError(f"{name} cannot be read: {error.strerror}") from error
        if found["bytes"] != wanted["bytes"]:
            raise DamagedCheckpointError(f"{name} has {found['bytes']} bytes, {wanted['bytes']} were written")
        if found["sha256"] != wanted["sha256"]:
            raise DamagedCheckpointError(f"{name} does not hold what was written (SHA-256 differs)")
        total += found["bytes"]
    return total


def write_state(folder: Path, state: State) -> None:
    """Write state.json into a folder."""
    content = {"format": FORMAT, **asdict(state)}
    write_durably(folder / STATE, json.dumps(content, indent=1) + "\n")


def read_state(checkpoint: Path) -> State:
    """What state.json says; raises DamagedCheckpointError."""
    try:
        content = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        known = {each.name for each in fields(Progress)}
        progress = Progress(**{key: value for key, value in content["progress"].items() if key in known})
        return State(progress, content["optimizer"], content["written_by"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{STATE} cannot be read: {error}") from error


def write_durably(path: Path, text: str) -> None:
    """Write a file and wait until it is on disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_checkpoint(run: Path, which: str) -> Path:
    """The checkpoint of a run that `which` names: "newest", "best", or a number of steps.

    Raises OpenVisionError when there is none.
    """
    folder = run / "checkpoints"
    found = checkpoints(folder)
    if not found:
        raise OpenVisionError(f"{run} holds no checkpoint; give the folder of a run, or wait for its first save")
    if which == "newest":
        return found[-1]
    there = {step_of(path): path for path in found}
    if which == "best":
        best = _read(found[-1]).progress.best
        if best is None:
            raise OpenVisionError(f"{run} marks no best checkpoint; set run.checkpoint_best to a metric of the recipe")
        step = int(best["step"])
    elif which.isdigit():
        step = int(which)
    else:
        raise OpenVisionError(f"{which!r} is no checkpoint; give newest, best or a number of steps")
    if step not in there:
        raise OpenVisionError(f"{run} keeps no checkpoint of step {step}; it has {', '.join(map(str, there))}")
    return there[step]


def _read(checkpoint: Path) -> State:
    try:
        return read_state(checkpoint)
    except DamagedCheckpointError as error:
        raise OpenVisionError(f"checkpoint {checkpoint}: {error}") from error


_MIB = 2**20


def table_of(run: Path) -> list[str]:
    """One line a checkpoint, under a header; damaged ones last. Raises OpenVisionError when there is none."""
    folder = run / "checkpoints"
    find_checkpoint(run, "newest")
    lines = [f"{'step':>10}  {'stage':>5}  {'samples':>14}  {'size':>12}  {'processes':>9}  {'mode':<12} written"]
    best = None
    for path in checkpoints(folder):
        try:
            state, size = read_state(path), sum(file["bytes"] for file in read_manifest(path).values())
        except DamagedCheckpointError as error:
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
    """Verify one checkpoint or all of them, a line each; raises OpenVisionError at the end when any is damaged."""
    newest = find_checkpoint(run, "newest" if which == "all" else which)
    broken = []
    for path in checkpoints(run / "checkpoints") if which == "all" else [newest]:
        try:
            yield f"{path.name}: whole, {verify(path) / _MIB:.1f} MiB read"
        except DamagedCheckpointError as error:
            broken.append(path.name)
            yield f"{path.name}: DAMAGED, {error}"
    if broken:
        raise OpenVisionError(
            f"{', '.join(broken)} in {run / 'checkpoints'}: damaged; the run goes on from the newest whole one"
        )
