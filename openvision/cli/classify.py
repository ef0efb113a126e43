"""`openvision classify`: zero-shot classification of an image."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from openvision.cli.options import (
    DEFAULT_CHECKPOINT,
    CheckpointOption,
    Device,
    Native,
    Squash,
    preprocessing_of,
    tell_shapes,
)
from openvision.terminal import Console


def classify(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    labels: Annotated[str, typer.Option(help='Labels, separated by commas: "a cat,a dog".')],
    checkpoint: CheckpointOption = DEFAULT_CHECKPOINT,
    squash: Squash = False,
    native: Native = False,
    device: Device = "auto",
) -> None:
    """Classify an image zero-shot: probabilities of your labels."""
    from openvision.inference.encoder import distinct_labels
    from openvision.inference.load import load
    from openvision.runtime import resolve_device

    chosen, where = distinct_labels(labels.split(",")), resolve_device(device)
    how = preprocessing_of(squash, native)
    encoder = load(checkpoint, preprocessing=how).to(where)
    tell_shapes(encoder.vision.config.aspects, how)
    console = Console()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, probability in encoder.classify(image, chosen):
        table.add_row(f"{probability:.1%}", f"[green]{'█' * round(20 * probability):<20}[/]", Text(label))
    console.print(table, highlight=False)
