"""`openvision train`: train a recipe, or resume a run."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import DeviceOverride, Overrides, RecipeFile, ShardFolders, with_device
from openvision.errors import OpenVisionError
from openvision.terminal import echo


def train(
    recipe: RecipeFile,
    run: Annotated[Path, typer.Option(help="Run folder: checkpoints, metrics and the trained model.")],
    data: ShardFolders = None,
    overrides: Overrides = None,
    device: DeviceOverride = None,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Smoke test: every stage of the recipe once, on drawn images instead of --data."),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Resume although recipe or data changed; the difference is recorded."),
    ] = False,
) -> None:
    """Train an encoder with a recipe. The same command resumes an interrupted run.

    Several processes: torchrun --nproc-per-node 8 -m -- openvision.cli.main train ...
    """
    from openvision.training.run.startup import active_watch

    if (watch := active_watch()) is not None:
        watch.know_run(run)
    from openvision.recipe.schema import load_recipe
    from openvision.recipe.smoke import prepare_smoke
    from openvision.runtime import resolve_device, resolve_precision
    from openvision.training.setup.start import shape_of
    from openvision.training.trainer import launch

    loaded = load_recipe(recipe, with_device(overrides, device), fill=shape_of)
    # A device that is not there is an error before anything is drawn.
    resolve_precision(loaded.run.precision, resolve_device(loaded.run.device))
    if smoke:
        if data is not None:
            raise OpenVisionError("--smoke draws its own images; leave --data out")
        loaded, data = prepare_smoke(loaded, run)
    if data is None:
        raise OpenVisionError("no data; give the folder of your shards with --data, or test the recipe with --smoke")
    model = launch(loaded, data, run, force)
    if model is not None:
        echo(f"trained model: {model}")
