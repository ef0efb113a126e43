"""`openvision report`: HTML report of a run."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.terminal import echo


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")] = Path("runs/quickstart"),
    data: Annotated[
        str | None, typer.Option(help="Folder of the run's shards; by default the one that it was trained on.")
    ] = None,
) -> None:
    """Write the report of a run as one self-contained HTML page: metrics, curves, galleries."""
    from openvision.evaluation.report.run_page import build_report

    echo(f"report: {build_report(run, data)}")
