"""`openvision train`: run a recipe, or go on with a run."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, e.g. recipes/quickstart.toml.")],
    data: Annotated[str, typer.Option(help="Folder or URL that holds the shard folders named in the recipe.")],
    run: Annotated[Path, typer.Option(help="Folder for checkpoints, metrics and the trained model.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a value of the recipe, e.g. --set stages.0.batch_size=64; repeatable."),
    ] = None,
) -> None:
    """Train an encoder by a recipe; the same command goes on with an interrupted run."""
    from openvision.training.recipe import load_recipe
    from openvision.training.trainer import Trainer

    trainer = Trainer(load_recipe(recipe, overrides), data, run)
    trainer.run()
    typer.echo(f"trained model: {trainer.model_folder}")
