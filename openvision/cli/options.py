"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

CHECKPOINT_HELP = "Released name, Hub id, model folder, or weights file (.safetensors, .bin, .npz)."

Checkpoint = Annotated[str, typer.Argument(help=CHECKPOINT_HELP)]
CheckpointOption = Annotated[str, typer.Option(help=CHECKPOINT_HELP)]
Vocabulary = Annotated[
    Path | None, typer.Option(help="vocab.txt of bert-base-uncased, for weights that come without a vocabulary.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Offline = Annotated[bool, typer.Option("--offline", help="Use only the local cache of the Hub.")]
ImageSize = Annotated[
    int | None, typer.Option(help="Training resolution of a JAX checkpoint, which does not store it.", min=1)
]
Decoder = Annotated[
    bool, typer.Option("--decoder", help="Load the JAX checkpoint from the Hub: only it has the caption decoder.")
]
Resolution = Annotated[int | None, typer.Option(help="Image size in pixels; by default the model's own.", min=1)]
Squash = Annotated[
    bool, typer.Option("--squash", help="Resize to a square, as the released configurations do, instead of cropping.")
]

RecipeFile = Annotated[Path, typer.Argument(help="Recipe file, e.g. recipes/quickstart.toml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a value of the recipe, e.g. --set stages.0.batch_size=64; repeatable."),
]
ShardFolders = Annotated[
    str | None, typer.Option(help="Folder or URL that contains the shard folders named in the recipe.")
]

DEFAULT_CHECKPOINT = "runs/quickstart/model"
