"""`openvision report`: HTML report of a run."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import DEFAULT_DATA
from openvision.terminal import echo


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")] = Path("runs/quickstart"),
    data: Annotated[
        str | None, typer.Option(help="Folder with the held-out sets; by default the data of the run.")
    ] = None,
) -> None:
    """Write the report of a run as one self-contained HTML page: metrics, curves, galleries."""
    from openvision.evaluation.report.run_page import build_report
    from openvision.evaluation.suites.held_out import data_of

    echo(f"report: {build_report(run, data or data_of(run) or DEFAULT_DATA)}")
