"""`openvision search`: find images in a folder by text."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import DEFAULT_CHECKPOINT, CheckpointOption, Device, Squash
from openvision.cli.progress import ProgressLine
from openvision.terminal import echo


def search(
    folder: Annotated[Path, typer.Argument(help="Folder of images, including subfolders.")],
    query: Annotated[str, typer.Argument(help='Text to search for, e.g. "a red car".')],
    top: Annotated[int, typer.Option(help="Number of images to show.", min=1)] = 5,
    checkpoint: CheckpointOption = DEFAULT_CHECKPOINT,
    squash: Squash = False,
    device: Device = "auto",
) -> None:
    """Find the images in a folder that match a text best."""
    from openvision.inference.load import load
    from openvision.inference.vision import image_files
    from openvision.runtime import resolve_device

    # Check folder and device before loading the model.
    image_files(folder)
    where = resolve_device(device)
    encoder = load(checkpoint, preprocessing="squash" if squash else "crop").to(where)
    result = encoder.search_folder(folder, query, top, progress=ProgressLine("image"))
    for path, score in result.hits:
        echo(f"{score:6.3f}  {path}")
    for _, reason in result.skipped:
        echo(f"skipped: {reason}", err=True)
