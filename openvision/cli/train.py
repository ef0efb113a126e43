"""`openvision train`: run a recipe, or go on with a run."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.errors import OpenVisionError


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, e.g. recipes/quickstart.toml.")],
    run: Annotated[Path, typer.Option(help="Folder for checkpoints, metrics and the trained model.")],
    data: Annotated[
        str | None, typer.Option(help="Folder or URL that holds the shard folders named in the recipe.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a value of the recipe, e.g. --set stages.0.batch_size=64; repeatable."),
    ] = None,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Run every part of the recipe once, on drawn pictures, instead of --data."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Go on though recipe or data are not those the run was begun with.")
    ] = False,
) -> None:
    """Train an encoder by a recipe; the same command goes on with an interrupted run.

    For several processes: torchrun --nproc-per-node 8 -m -- openvision.cli.main train ...
    """
    from openvision.recipe.schema import load_recipe
    from openvision.recipe.smoke import prepare_smoke
    from openvision.training.trainer import launch

    loaded = load_recipe(recipe, overrides)
    if smoke:
        if data is not None:
            raise OpenVisionError("--smoke draws its own pictures: leave --data out")
        loaded, data = prepare_smoke(loaded, run)
    if data is None:
        raise OpenVisionError("give the folder of your shards with --data, or try the recipe with --smoke")
    model = launch(loaded, data, run, force)
    if model is not None:
        typer.echo(f"trained model: {model}")
