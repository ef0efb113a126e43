"""`openvision profile`: time and trace a training step."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from openvision.cli.options import DeviceOverride, Overrides, RecipeFile, ShardFolders, with_device
from openvision.errors import OpenVisionError

if TYPE_CHECKING:
    from openvision.training.profile import Row


def profile(
    recipe: RecipeFile,
    data: ShardFolders = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for trace.json.")] = Path("runs/profile"),
    stage: Annotated[int, typer.Option(help="Index of the stage, from 0.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time, after one warm-up step.")] = 3,
    overrides: Overrides = None,
    device: DeviceOverride = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Profile the smoke form, on drawn images.")] = False,
) -> None:
    """Time the parts of a training step, list its slowest operations, and write a trace for Perfetto."""
    import shutil

    from openvision.files import make_folder
    from openvision.recipe.schema import load_recipe
    from openvision.recipe.smoke import prepare_smoke
    from openvision.runtime import resolve_device, resolve_precision
    from openvision.terminal import Console
    from openvision.training.profile import profile_recipe
    from openvision.training.setup.start import shape_of

    loaded = load_recipe(recipe, with_device(overrides, device), fill=shape_of)
    # A device that is not there is an error before anything is drawn.
    resolve_precision(loaded.run.precision, resolve_device(loaded.run.device))
    if smoke == (data is not None):
        raise OpenVisionError("give either the folder of your shards with --data, or --smoke")
    # Do not resume the run of an earlier profile.
    shutil.rmtree(make_folder(output) / "run", ignore_errors=True)
    if smoke:
        loaded, data = prepare_smoke(loaded, output)
    assert data is not None
    result = profile_recipe(loaded, data, output, stage, steps)
    console = Console()
    console.print(_table("part of the step", result.parts))
    console.print(_table("operation", result.operations))
    idle = "" if result.idle is None else f"; without these clocks the device is idle for {result.idle:.1%} of the time"
    console.print(f"{result.images_per_second:.1f} images/s{idle}", highlight=False)
    console.print(f"trace: {result.trace} (open it in https://ui.perfetto.dev)", highlight=False, soft_wrap=True)


def _table(what: str, rows: "Sequence[Row]") -> Table:
    """Table of name, milliseconds per step and share; long names are cut to fit 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column(what, no_wrap=True, max_width=48, overflow="ellipsis")
    table.add_column("ms/step", justify="right")
    table.add_column("share", justify="right")
    for row in rows:
        table.add_row(row.name, f"{row.milliseconds:,.1f}", f"{row.share:.1%}")
    return table
