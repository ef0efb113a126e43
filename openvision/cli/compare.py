"""`openvision compare`: compare two checkpoints with a paired bootstrap."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.terminal import echo


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of results of `openvision eval --suite`.")],
    second: Annotated[Path, typer.Argument(help="Folder of results to compare with.")],
    page: Annotated[Path | None, typer.Option(help="Also write an HTML page.")] = None,
) -> None:
    """Compare two checkpoints: differences with intervals from a paired bootstrap over the same images."""
    from rich import box
    from rich.table import Table

    from openvision.evaluation.report.comparison_page import build_page
    from openvision.evaluation.report.labels import shown
    from openvision.evaluation.suites.compare import compare as run
    from openvision.evaluation.suites.results import distinct, read_result
    from openvision.terminal import Console

    results = distinct([read_result(first), read_result(second)])
    found = run(*results)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", no_wrap=True)
    for column in (found.first, found.second, "difference", "p", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found.rows:
        low, high = 100 * row.difference.low, 100 * row.difference.high
        table.add_row(
            f"{row.evaluator}: {row.metric}",
            shown(row.metric, row.first),
            shown(row.metric, row.second),
            f"{100 * row.difference.value:+.1f} ({low:+.1f} to {high:+.1f})",
            f"{row.corrected_p:.2g}" if row.corrected_p >= 0.001 else "<0.001",
            "differs" if row.differs else "noise",
            style=None if row.differs else "dim",
        )
    if found.rows:
        Console().print(table)
    for note in found.left_out:
        echo(f"left out: {note}")
    echo(f"{found.verdict()}.")
    if page is not None:
        echo(f"page: {build_page(results, page)}")
