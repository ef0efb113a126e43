"""`openvision caption`: caption images with an OpenVision 2 or 3 or GenLIP model."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import CheckpointOption, Device, Native, Resolution, preprocessing_of, tell_shapes
from openvision.terminal import echo


def caption(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    checkpoint: CheckpointOption,
    max_length: Annotated[int | None, typer.Option(help="Maximum length in tokens; by default the decoder's.")] = None,
    resolution: Resolution = None,
    native: Native = False,
    device: Device = "auto",
) -> None:
    """Caption images with a model of OpenVision 2, OpenVision 3 or GenLIP."""
    from openvision.inference.load import load_captioner
    from openvision.runtime import resolve_device

    where = resolve_device(device)
    how = preprocessing_of(squash=False, native=native)
    captioner = load_captioner(checkpoint, resolution=resolution, preprocessing=how).to(where)
    tell_shapes(captioner.vision.config.aspects, how)
    for image, text in zip(images, captioner.caption(images, max_length), strict=True):
        echo(f"{image}\t{text}")
