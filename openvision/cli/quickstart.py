"""`openvision quickstart`: draw the data, train in three stages, evaluate, report."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import DeviceOverride, with_device
from openvision.terminal import Console


def quickstart(
    folder: Annotated[Path, typer.Option(help="Folder for data, run and report.")] = Path("runs"),
    recipe: Annotated[Path, typer.Option(help="The recipe to train.")] = Path("recipes/quickstart.toml"),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value of the recipe; repeatable.")
    ] = None,
    device: DeviceOverride = None,
) -> None:
    """Train an encoder on drawn images in minutes, on any machine, evaluate it and write a report."""
    from openvision.training.run.startup import active_watch

    data, run = folder / "openmoji", folder / recipe.stem
    if (watch := active_watch()) is not None:
        watch.know_run(run)
    from openvision.data.sources.openmoji.make import make_openmoji
    from openvision.evaluation.report.run_page import build_report
    from openvision.evaluation.report.tables import print_held_out
    from openvision.evaluation.suites.held_out import measure_run
    from openvision.recipe.schema import load_recipe
    from openvision.runtime import resolve_device, resolve_precision
    from openvision.training.trainer import launch

    console = Console()
    loaded = load_recipe(recipe, with_device(overrides, device))
    # A device that is not there is an error before anything is drawn.
    resolve_precision(loaded.run.precision, resolve_device(loaded.run.device))
    console.print("[bold]1/4[/] drawing OpenMoji images with alt-texts and captions")
    make_openmoji(data)
    console.print("[bold]2/4[/] training vision tower, text tower and caption decoder")
    model = launch(loaded, data, run)
    if watch is not None:
        watch.begin_work("after the training")
    console.print("[bold]3/4[/] evaluating on the two held-out sets")
    print_held_out(measure_run(run, data), console)
    console.print("[bold]4/4[/] writing the report")
    report = build_report(run, data)
    console.print(f"model:  {model}", highlight=False, soft_wrap=True)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
