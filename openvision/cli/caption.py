"""`openvision caption`: caption images with an OpenVision 2 or 3 model."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import CheckpointOption, Device, Resolution
from openvision.terminal import echo


def caption(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    checkpoint: CheckpointOption,
    max_length: Annotated[int | None, typer.Option(help="Maximum length in tokens; by default the decoder's.")] = None,
    resolution: Resolution = None,
    device: Device = "auto",
) -> None:
    """Caption images with a model trained with a recipe of recipes/openvision2 or recipes/openvision3."""
    from openvision.inference.load import load_captioner
    from openvision.runtime import resolve_device

    where = resolve_device(device)
    captioner = load_captioner(checkpoint, resolution=resolution).to(where)
    for image, text in zip(images, captioner.caption(images, max_length), strict=True):
        echo(f"{image}\t{text}")
