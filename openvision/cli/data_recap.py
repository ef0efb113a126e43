"""`openvision data recap`: join Recap-DataComp-1B with what img2dataset wrote."""

from pathlib import Path
from typing import Annotated

import typer


def recap(
    shards: Annotated[str, typer.Argument(help="Folder (or URL) of the shards img2dataset wrote.")],
    table: Annotated[Path, typer.Argument(help="Recaption table: a parquet file or a folder of them.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write new shards here; without it captions tars beside the shards."),
    ] = None,
    by: Annotated[str, typer.Option(help="What to join by: hash, key or url.")] = "hash",
    caption: Annotated[
        list[str] | None,
        typer.Option(
            help="Column to take, or COLUMN=NAME to store it under another name; repeatable, the first must not be "
            "empty. By default re_caption and org_caption."
        ),
    ] = None,
    placeholders: Annotated[
        int, typer.Option(help="A picture whose hash comes this often is an error picture and dropped.")
    ] = 10,
    report: Annotated[Path | None, typer.Option(help="Write the report as JSON here.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for what is between, kept; otherwise in the output and removed.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Processes to work in.", min=1)] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report without writing captions.")] = False,
) -> None:
    """Join recaption tables with shards: captions tars beside them, or new shards that hold all captions.

    Stopped at any point, the same command goes on.
    """
    import json

    from rich.console import Console

    from openvision.data.recap.join import RecapOptions, recap
    from openvision.data.recap.report import print_report
    from openvision.files import atomic_write_text

    pairs = [text.partition("=") for text in caption or ("re_caption", "org_caption")]
    options = RecapOptions(
        by=by,
        captions=tuple((column, name or column) for column, _, name in pairs),
        placeholders=placeholders,
        output=output,
        work=work,
        dry_run=dry_run,
        processes=processes,
    )
    console = Console()

    def show(step: str, done: int, of: int) -> None:
        # A hundred lines a step at most, and the first and last of it.
        if done == of or done % max(1, of // 100) == 0:
            console.print(f"{step}: {done} of {of}", highlight=False)

    result = recap(shards, table, options, progress=show)
    print_report(result, console)
    if report:
        atomic_write_text(report, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        console.print(f"written: {report}", highlight=False, soft_wrap=True)
