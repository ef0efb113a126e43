"""`openvision data picto`: drawings of many styles and artists, from packages of npm and Debian."""

from pathlib import Path
from typing import Annotated

import typer


def picto(
    folder: Annotated[Path, typer.Argument(help="Folder to write the shards into.")],
    size: Annotated[int, typer.Option(help="Side of the drawings, pixels.", min=16, max=1024)] = 96,
    packages: Annotated[
        Path | None,
        typer.Option(help="Folder the packages lie in or are fetched into; by default one in your cache folder."),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Fetch nothing; packages lie in their folder.")] = False,
) -> None:
    """Draw emoji of ten styles and clip art, with texts, split by vendor and by concept for held-out tests."""
    from openvision.data.sources.picto.source import make_picto

    make_picto(folder, size, packages, offline, say=typer.echo)
    typer.echo(f"shards: {folder}")
