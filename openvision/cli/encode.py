"""`openvision encode`: a folder of pictures or shards into one file of vectors."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import DEFAULT_CHECKPOINT, CheckpointOption, Offline, Resolution, Revision, Squash


def encode(
    source: Annotated[Path, typer.Argument(help="Folder of pictures, with its subfolders, or of tar shards.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .safetensors or .parquet.")],
    checkpoint: CheckpointOption = DEFAULT_CHECKPOINT,
    batch_size: Annotated[int, typer.Option(help="Pictures a step.", min=1)] = 64,
    threads: Annotated[int, typer.Option(help="Threads that decode.", min=1)] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, ...")] = "cpu",
    resolution: Resolution = None,
    squash: Squash = False,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Encode pictures into vectors; the same command goes on after a stop."""
    from openvision.inference.embed import embed, pictures_of
    from openvision.inference.load import load_vision

    # Before the model: a wrong folder is told at once.
    pictures_of(source)
    encoder = load_vision(
        checkpoint,
        resolution=resolution,
        preprocessing="squash" if squash else "crop",
        revision=revision,
        offline=offline,
    ).to(device)
    result = embed(encoder, source, output, batch_size, threads, progress=_Progress())
    for name, reason in result.skipped:
        typer.echo(f"skipped: {name}: {reason}", err=True)
    typer.echo(f"{result.encoded} pictures encoded, {len(result.skipped)} skipped: {output}")


class _Progress:
    """One line on standard error: done, rate, time left; rewritten in a terminal, now and then elsewhere."""

    def __init__(self) -> None:
        self.start = self.said = time.monotonic()
        self.first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.start = done, now
        terminal = sys.stderr.isatty()
        if done < total and now - self.said < (0.2 if terminal else 10):
            return
        self.said = now
        rate = (done - self.first) / max(now - self.start, 1e-6)
        minutes, seconds = divmod(round((total - done) / rate) if rate else 0, 60)
        line = f"{done}/{total} pictures  {rate:.0f} images/s  {minutes}:{seconds:02d} left"
        typer.echo(f"\r{line}  " if terminal else line, err=True, nl=not terminal or done == total)
