"""`openvision data`: make and inspect training data."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli import data_picto, data_recap, data_scenes, data_teach, data_tools
from openvision.cli.progress import ProgressLine
from openvision.terminal import counted, echo

app = typer.Typer(help="Make and inspect training data.", no_args_is_help=True)
data_tools.register(app)
app.command()(data_picto.picto)
app.command()(data_scenes.scenes)
app.command()(data_recap.recap)
app.command()(data_teach.teach)


@app.callback()
def _group() -> None:
    """Make and inspect training data."""


@app.command()
def openmoji(
    folder: Annotated[Path, typer.Argument(help="Folder to write the shards into.")],
    size: Annotated[int, typer.Option(help="Side of the images, pixels.", min=16, max=618)] = 96,
) -> None:
    """Render OpenMoji with alt-texts and captions, split for training and held-out tests."""
    from openvision.data.sources.openmoji.make import make_openmoji

    make_openmoji(folder, size)
    echo(f"shards: {folder}")


@app.command()
def unpack(
    shards: Annotated[Path, typer.Argument(help="Folder of shards.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write the image files into.")],
) -> None:
    """Write the images of shards as files, named by their name or key."""
    from openvision.data.shards.dataset import ShardDataset, unpack_images

    dataset = ShardDataset(shards)
    rejected = dataset.left_out
    written = unpack_images(dataset, folder, rejected)
    for reason, count in sorted(rejected.items()):
        echo(f"left out, {reason}: {count}")
    echo(f"{counted(written, 'image')}: {folder}")


@app.command()
def index(
    shards: Annotated[str, typer.Argument(help="Folder of shards, local or any fsspec URL.")],
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Index all shards again.")] = False,
) -> None:
    """Read every shard once and write its index; resumes where it was stopped."""
    from openvision.data.shards.manifest import index_folder
    from openvision.data.shards.store import open_store

    line = ProgressLine("shard")
    manifest = index_folder(open_store(shards), rebuild, lambda done, total: line(done, done / total))
    for reason, count in sorted(manifest.rejected.items()):
        echo(f"left out, {reason}: {count}")
    samples = sum(shard.samples for shard in manifest.shards)
    written = f"{counted(samples, 'sample')} in {counted(len(manifest.shards), 'shard')}"
    echo(f"{written}, manifest {manifest.sha256()[:12]}: {shards}")
