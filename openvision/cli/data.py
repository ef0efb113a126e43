"""`openvision data`: make shards, look into them."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make data to train on; look into it.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Make data to train on; look into it."""


@app.command()
def openmoji(
    folder: Annotated[Path, typer.Argument(help="Folder to write the shards into.")],
    size: Annotated[int, typer.Option(help="Side of the pictures, pixels.", min=16, max=618)] = 96,
) -> None:
    """Draw the OpenMoji pictures with alt-texts and captions, split for training and held-out tests."""
    from openvision.data.sources.openmoji import make_openmoji

    make_openmoji(folder, size)
    typer.echo(f"shards: {folder}")


@app.command()
def unpack(
    shards: Annotated[Path, typer.Argument(help="Folder of shards.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write the pictures into, a file each.")],
) -> None:
    """Write the pictures of shards as files, named by their name or key."""
    from openvision.data.shards import ShardDataset, unpack_pictures

    typer.echo(f"{unpack_pictures(ShardDataset(shards), folder)} pictures: {folder}")
