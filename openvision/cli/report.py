"""`openvision report`: HTML report of a run."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import Device
from openvision.terminal import echo


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")] = Path("runs/quickstart"),
    data: Annotated[
        str | None, typer.Option(help="Folder of the run's shards; by default the one that it was trained on.")
    ] = None,
    generator: Annotated[
        Path | None, typer.Option(help="Generator on the run's encoder, whose images are shown and measured.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Write the report of a run as one self-contained HTML page: metrics, curves, galleries."""
    from openvision.evaluation.report.run_page import build_report
    from openvision.evaluation.suites.run import Settings
    from openvision.runtime import resolve_device

    where, generated = resolve_device(device), None
    if generator is not None:
        from openvision.generation.nearness import measure_for_run

        generated = measure_for_run(generator, run, data, where)
    echo(f"report: {build_report(run, data, generated, Settings(device=str(where)))}")
