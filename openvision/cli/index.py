"""`openvision index`: make a large folder of vectors answer in milliseconds."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.terminal import echo


def index(
    folder: Annotated[Path, typer.Argument(help="Folder of vectors that `openvision encode` wrote.")],
    recall: Annotated[
        float, typer.Option(help="Share of the ten nearest images that a search finds, on a sample.", min=0.01, max=1)
    ] = 0.95,
) -> None:
    """Build an approximate index with FAISS; `openvision search` then uses it."""
    from openvision.inference.index import build_approximate

    built = build_approximate(folder, recall, say=lambda line: echo(line, err=True))
    echo(
        f"{built.lists} lists, of which a query reads {built.probes}; recall at 10 {built.recall:.3f}, "
        f"built in {built.seconds:.0f} s: {folder}"
    )
