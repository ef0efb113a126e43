"""`openvision checkpoint`: list, verify and export the checkpoints of a run."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.terminal import echo

app = typer.Typer(help="List, verify and export the checkpoints of a run.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(help="Run folder, as given to `openvision train --run`.")]
Which = Annotated[str, typer.Option("--step", help="newest, best, or a number of steps.")]


@app.command()
def ls(run: Run) -> None:
    """List the checkpoints of a run, oldest first."""
    from openvision.terminal import Console
    from openvision.training.checkpoint.folders import table_of

    for line in table_of(run):
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def verify(
    run: Run, step: Annotated[str, typer.Option("--step", help="all, newest, best, or a number of steps.")] = "all"
) -> None:
    """Verify checkpoints: compare every file with its SHA-256."""
    from openvision.terminal import Console
    from openvision.training.checkpoint.folders import verify_all

    for line in verify_all(run, step):
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def export(
    run: Run,
    output: Annotated[Path, typer.Option("-o", "--output", help="Model folder to write.")],
    step: Which = "newest",
    average: Annotated[bool, typer.Option("--average", help="Export the averaged parameters (optimizer.ema).")] = False,
) -> None:
    """Export a checkpoint as a model folder, for all other commands."""
    from openvision.training.checkpoint.export import export_checkpoint

    export_checkpoint(run, step, output, average)
    echo(f"model: {output}")
