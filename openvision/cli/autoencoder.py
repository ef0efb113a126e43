"""`openvision autoencoder`: train the small autoencoder that can stand before an OpenVision 3 encoder."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import Device
from openvision.terminal import echo


def autoencoder(
    shards: Annotated[Path, typer.Argument(help="Folder of training shards.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    resolution: Annotated[int, typer.Option(help="Pixels a side, a multiple of 8.", min=8)] = 64,
    steps: Annotated[int, typer.Option(help="Updates.", min=1)] = 3000,
    batch_size: Annotated[int, typer.Option(help="Images an update.", min=1)] = 32,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and order.", min=0)] = 0,
    device: Device = "auto",
) -> None:
    """Train a convolutional autoencoder, 16 channels at 1/8, on the images of shards. Minutes on a CPU."""
    from openvision.cli.progress import ProgressLine
    from openvision.generation.autoencoder import AutoencoderTraining, train_autoencoder
    from openvision.runtime import resolve_device

    where, training = resolve_device(device), AutoencoderTraining(resolution, steps, batch_size, seed)
    line = ProgressLine("steps")
    loss = train_autoencoder(shards, output, training, where, lambda step, _: line(step, step / steps))
    echo(f"trained autoencoder: {output}, mean absolute error {loss / 2:.4f} of the range of pixels")
