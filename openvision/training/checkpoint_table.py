"""The checkpoints of a run as a person wants to see them."""

from collections.abc import Iterator
from pathlib import Path

from openvision.errors import OpenVisionError
from openvision.training.checkpoint_files import (
    DamagedCheckpointError,
    checkpoints,
    damaged,
    find_checkpoint,
    read_manifest,
    read_state,
    step_of,
    verify,
)

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
