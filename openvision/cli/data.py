"""`openvision data`: make shards, look into them."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli import data_picto, data_recap, data_tools
from openvision.cli.progress import ProgressLine

app = typer.Typer(help="Make data to train on; look into it.", no_args_is_help=True)
data_tools.register(app)
app.command()(data_picto.picto)
app.command()(data_recap.recap)


@app.callback()
def _group() -> None:
    """Make data to train on; look into it."""


@app.command()
def openmoji(
    folder: Annotated[Path, typer.Argument(help="Folder to write the shards into.")],
    size: Annotated[int, typer.Option(help="Side of the pictures, pixels.", min=16, max=618)] = 96,
) -> None:
    """Draw the OpenMoji pictures with alt-texts and captions, split for training and held-out tests."""
    from openvision.data.sources.openmoji.source import make_openmoji

    make_openmoji(folder, size)
    typer.echo(f"shards: {folder}")


@app.command()
def unpack(
    shards: Annotated[Path, typer.Argument(help="Folder of shards.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write the pictures into, a file each.")],
) -> None:
    """Write the pictures of shards as files, named by their name or key."""
    from openvision.data.shards.dataset import ShardDataset, unpack_pictures

    typer.echo(f"{unpack_pictures(ShardDataset(shards), folder)} pictures: {folder}")


@app.command()
def index(
    shards: Annotated[str, typer.Argument(help="Folder of shards, local or any URL that fsspec reads.")],
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Index anew what is indexed, too.")] = False,
) -> None:
    """Read every shard once and write where its samples lie; goes on where it was stopped."""
    from openvision.data.shards.manifest import index_folder
    from openvision.data.shards.store import open_store

    line = ProgressLine("shards")
    manifest = index_folder(open_store(shards), rebuild, lambda done, total: line(done, done / total))
    for reason, count in sorted(manifest.rejected.items()):
        typer.echo(f"left out, {reason}: {count}")
    samples = sum(shard.samples for shard in manifest.shards)
    typer.echo(f"{samples} samples in {len(manifest.shards)} shards, manifest {manifest.sha256()[:12]}: {shards}")
