"""`openvision encode`: embed the images of a folder or of shards."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import DEFAULT_CHECKPOINT, CheckpointOption, Device, Offline, Resolution, Revision, Squash
from openvision.cli.progress import ProgressLine
from openvision.terminal import counted, echo
from openvision.untrusted import one_line


def encode(
    source: Annotated[Path, typer.Argument(help="Folder of images, including subfolders, or of tar shards.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output file: .safetensors or .parquet.")],
    checkpoint: CheckpointOption = DEFAULT_CHECKPOINT,
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1)] = 64,
    threads: Annotated[int, typer.Option(help="Decoding threads.", min=1)] = 2,
    device: Device = "auto",
    resolution: Resolution = None,
    squash: Squash = False,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Embed images into vectors. The same command resumes after a stop."""
    from openvision.inference.embed import embed, images_of
    from openvision.inference.load import load_vision
    from openvision.runtime import resolve_device

    # Check folder and device before loading the model.
    images_of(source)
    where = resolve_device(device)
    encoder = load_vision(
        checkpoint,
        resolution=resolution,
        preprocessing="squash" if squash else "crop",
        revision=revision,
        offline=offline,
    ).to(where)
    line = ProgressLine("image")
    result = embed(encoder, source, output, batch_size, threads, progress=lambda done, total: line(done, done / total))
    for name, reason in result.skipped:
        echo(f"skipped: {one_line(name)}: {one_line(reason)}", err=True)
    echo(f"{counted(result.encoded, 'image')} encoded, {len(result.skipped)} skipped: {output}")
