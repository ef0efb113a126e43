"""Options that several commands share: which checkpoint, and how it is loaded."""

from pathlib import Path
from typing import Annotated

import typer

CHECKPOINT_HELP = "Released name, Hub id, model folder, or file of weights (.safetensors, .bin, .npz)."

Checkpoint = Annotated[str, typer.Argument(help=CHECKPOINT_HELP)]
CheckpointOption = Annotated[str, typer.Option(help=CHECKPOINT_HELP)]
Vocabulary = Annotated[
    Path | None, typer.Option(help="bert-base-uncased's vocab.txt, for weights that bring no vocabulary.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Offline = Annotated[bool, typer.Option("--offline", help="Read the Hub's local cache only.")]
ImageSize = Annotated[
    int | None, typer.Option(help="Resolution a JAX tree was trained at, which it does not say itself.", min=1)
]
Decoder = Annotated[
    bool, typer.Option("--decoder", help="From the Hub: read the JAX tree, which alone holds the caption decoder.")
]
Resolution = Annotated[int | None, typer.Option(help="Pixels a side; the model's own by default.", min=1)]
Squash = Annotated[
    bool, typer.Option("--squash", help="Squash pictures to a square, as the released configurations say, not crop.")
]

DEFAULT_CHECKPOINT = "runs/quickstart/model"
