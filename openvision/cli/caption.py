"""`openvision caption`: what an OpenVision 2 model writes about pictures."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import Resolution


def caption(
    pictures: Annotated[list[Path], typer.Argument(help="Pictures to caption.")],
    checkpoint: Annotated[str, typer.Option(help="Model folder of an OpenVision 2 run.")],
    max_length: Annotated[int | None, typer.Option(help="Tokens at most; all the decoder reads by default.")] = None,
    resolution: Resolution = None,
) -> None:
    """Caption pictures with a model trained by recipes/openvision2."""
    from openvision.inference.load import load_captioner

    captioner = load_captioner(checkpoint, resolution=resolution)
    for picture, text in zip(pictures, captioner.caption(pictures, max_length), strict=True):
        typer.echo(f"{picture}\t{text}")
