"""`openvision data picto`: emoji and clip art in many styles, from npm and Debian packages."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.terminal import echo


def picto(
    folder: Annotated[Path, typer.Argument(help="Folder to write the shards into.")],
    size: Annotated[int, typer.Option(help="Side of the images, pixels.", min=16, max=1024)] = 96,
    packages: Annotated[
        Path | None,
        typer.Option(help="Folder of the packages; missing ones are fetched into it. Default: in your cache folder."),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Fetch nothing; use the packages in their folder.")
    ] = False,
) -> None:
    """Render emoji in ten styles and clip art, with texts, split by vendor and by concept for held-out tests."""
    from openvision.data.sources.picto.make import make_picto

    make_picto(folder, size, packages, offline, say=typer.echo)
    echo(f"shards: {folder}")
