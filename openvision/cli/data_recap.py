"""`openvision data recap`: join Recap-DataComp-1B with the shards that img2dataset wrote."""

from pathlib import Path
from typing import Annotated

import typer


def recap(
    shards: Annotated[str, typer.Argument(help="Folder (or URL) of the shards img2dataset wrote.")],
    table: Annotated[Path, typer.Argument(help="Recaption table: a parquet file or a folder of them.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write new shards into this folder; default: captions tars beside the shards."
        ),
    ] = None,
    by: Annotated[str, typer.Option(help="Join key: hash, key or url.")] = "hash",
    caption: Annotated[
        list[str] | None,
        typer.Option(
            help="Caption column, or COLUMN=NAME to store it under another name; repeatable. Rows whose first one "
            "is empty are dropped. Default: re_caption and org_caption."
        ),
    ] = None,
    placeholders: Annotated[
        int, typer.Option(help="An image whose hash occurs this often is a placeholder and dropped.")
    ] = 10,
    report: Annotated[Path | None, typer.Option(help="JSON file to write the report into.")] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for intermediate files, kept; default: in the output, removed at the end."),
    ] = None,
    processes: Annotated[int, typer.Option(help="Number of processes.", min=1)] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report without writing captions.")] = False,
) -> None:
    """Join a recaption table with shards: write captions tars beside them, or new shards with all captions.

    If stopped at any point, the same command resumes.
    """
    from openvision.data.recap.join import RecapOptions, recap
    from openvision.data.recap.report import print_report
    from openvision.files import atomic_write_text
    from openvision.terminal import Console
    from openvision.untrusted import json_text

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
        # At most a hundred lines a step, including the last.
        if done == of or done % max(1, of // 100) == 0:
            console.print(f"{step}: {done} of {of}", highlight=False)

    result = recap(shards, table, options, progress=show)
    print_report(result, console)
    if report:
        atomic_write_text(report, json_text(result, indent=2) + "\n")
        console.print(f"written: {report}", highlight=False, soft_wrap=True)
