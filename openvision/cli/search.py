"""`openvision search`: find pictures in a folder by a text."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import DEFAULT_CHECKPOINT, CheckpointOption, Squash


def search(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures, searched with its subfolders.")],
    query: Annotated[str, typer.Argument(help='What to look for, e.g. "a red car".')],
    top: Annotated[int, typer.Option(help="How many pictures to show.", min=1)] = 5,
    checkpoint: CheckpointOption = DEFAULT_CHECKPOINT,
    squash: Squash = False,
) -> None:
    """Find the pictures in a folder that fit a text best."""
    from openvision.inference.load import load
    from openvision.inference.vision import image_files

    # Before the model: a wrong folder is told at once.
    image_files(folder)
    encoder = load(checkpoint, preprocessing="squash" if squash else "crop")
    result = encoder.search_folder(folder, query, top)
    for path, score in result.hits:
        typer.echo(f"{score:6.3f}  {path}")
    for _, reason in result.skipped:
        typer.echo(f"skipped: {reason}", err=True)
