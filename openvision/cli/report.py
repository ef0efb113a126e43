"""`openvision report`: the HTML report of a run."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")] = Path("runs/quickstart"),
    data: Annotated[Path, typer.Option(help="Folder with the shard folders train and heldout_*.")] = Path(
        "runs/openmoji"
    ),
) -> None:
    """Write one self-contained HTML page about a run: numbers, curves, galleries; works offline."""
    from openvision.evaluation.report.run_page import build_report

    typer.echo(f"report: {build_report(run, data)}")
