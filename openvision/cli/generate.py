"""`openvision train-generator` and `openvision generate`: images from the tokens of an OpenVision 3 encoder."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import MODEL_HELP, Device
from openvision.terminal import echo


def train_generator(
    encoder: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    shards: Annotated[Path, typer.Argument(help="Folder of training shards.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    text: Annotated[
        str, typer.Option(help='What conditions: "name" for classes, or a field of captions.')
    ] = "synthetic",
    steps: Annotated[int, typer.Option(help="Updates.", min=1)] = 5000,
    batch_size: Annotated[int, typer.Option(help="Images an update.", min=1)] = 64,
    learning_rate: Annotated[float, typer.Option(help="Constant, of AdamW; RAE's by default.", min=0)] = 2e-4,
    limit: Annotated[int, typer.Option(help="Images to train on, kept in memory as tokens.", min=2)] = 20_000,
    seed: Annotated[int, typer.Option(help="Seed of initialisation, order and noise.", min=0)] = 0,
    device: Device = "auto",
) -> None:
    """Train a small diffusion transformer by flow matching on the tokens of an OpenVision 3 model."""
    from openvision.cli.progress import ProgressLine
    from openvision.generation.train_generator import GeneratorTraining
    from openvision.generation.train_generator import train_generator as train
    from openvision.runtime import resolve_device

    where, line = resolve_device(device), ProgressLine("steps")
    training = GeneratorTraining(text, steps, batch_size, learning_rate, limit, seed)
    loss = train(encoder, shards, output, training, where, lambda step, _: line(step, step / steps))
    echo(f"trained generator: {output}, loss {loss:.4f}")


def generate(
    generator: Annotated[Path, typer.Argument(help="Folder that `openvision train-generator` wrote.")],
    texts: Annotated[list[str], typer.Argument(help="A text for each image: class names or captions.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write, the images side by side.")],
    steps: Annotated[int, typer.Option(help="Euler steps.", min=1)] = 50,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.", min=0)] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0)] = 0,
    encoder: Annotated[str | None, typer.Option(help="Its encoder, where that is no longer where it was.")] = None,
    device: Device = "auto",
) -> None:
    """Make images for texts, through the tokens of an OpenVision 3 encoder."""
    import io

    import numpy as np
    from PIL import Image

    from openvision.files import atomic_write_bytes
    from openvision.generation.generate import open_generator
    from openvision.runtime import resolve_device

    images = open_generator(generator, resolve_device(device), encoder).images(texts, steps, guidance, seed)
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(list(images), axis=1)).save(buffer, "PNG")
    atomic_write_bytes(output, buffer.getvalue())
    echo(f"{len(images)} images: {output}")
