"""`openvision eval`: measure checkpoints by a suite, by default on the quickstart's held-out sets."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import (
    MODEL_HELP,
    Device,
    Native,
    Offline,
    Resolution,
    Revision,
    Squash,
    Vocabulary,
    preprocessing_of,
)
from openvision.cli.progress import ProgressLine
from openvision.errors import OpenVisionError
from openvision.files import atomic_write_text
from openvision.terminal import echo


def evaluate(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help=f"{MODEL_HELP} By default runs/quickstart."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="heldout (the held-out sets of scenes or OpenMoji), own (the validation shards of the run), quick, "
            "scenes, paper, or a TOML file; by default heldout where the data have these sets, else own."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Folder with the data of the suite; by default the one that the run was trained on."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for results and page: runs/eval, for heldout and own the run's, by default.",
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help='With heldout and own: prompt template for names, e.g. "a drawing of {}"; repeatable.'),
    ] = None,
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Skip evaluators without data.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Also write a table with the columns of open_clip.")] = None,
    resolution: Resolution = None,
    squash: Squash = False,
    native: Native = False,
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1)] = 64,
    threads: Annotated[int, typer.Option(help="Decoding threads.", min=1)] = 2,
    device: Device = "auto",
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Compute in bfloat16 instead of float32.")] = False,
    vocabulary: Vocabulary = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Measure checkpoints: numbers with intervals as JSON, and one page that compares them all.

    Without --suite a run is measured beside training-free baselines, on the held-out sets of scenes or OpenMoji or
    on its own validation shards, into RUN/evaluation.json.
    """
    from openvision.evaluation.report.comparison_page import build_page
    from openvision.evaluation.report.tables import markdown_table, print_held_out, write_open_clip_table
    from openvision.evaluation.suites.own import OF_RUNS, suite_of_run
    from openvision.evaluation.suites.run import Settings, run_suite
    from openvision.runtime import resolve_device, resolve_precision
    from openvision.weights.load import Request

    where = resolve_device(device)
    resolve_precision("bfloat16" if bfloat16 else "float32", where)
    sources = checkpoints or ["runs/quickstart"]
    chosen, folder = suite_of_run(Path(sources[0]), data, suite)
    of_run = chosen.name in OF_RUNS
    if template and not of_run:
        raise OpenVisionError("--template belongs to --suite heldout or own; a suite names its prompts in its file")
    if template:
        chosen = chosen.with_prompts(template)
    into = output if output is not None or of_run else Path("runs/eval")
    results = run_suite(
        sources,
        chosen,
        folder,
        into,
        Settings(resolution, preprocessing_of(squash, native), batch_size, threads, str(where), bfloat16),
        Request(vocabulary=vocabulary, revision=revision, offline=offline),
        skip_missing,
        say=typer.echo,
        progress=_Progress(),
        command=sys.argv,
    )
    for result in results if of_run else []:
        print_held_out(result)
        echo(f"written: {result.folder / 'evaluation.json'}")
    if csv is not None:
        write_open_clip_table(results, csv)
        echo(f"open_clip's columns: {csv}")
    if into is not None:
        atomic_write_text(into / "table.md", markdown_table(results))
        echo(f"table: {into / 'table.md'}")
        echo(f"page: {build_page(results, into / 'index.html')}")


class _Progress:
    """A progress line for every set of images that is encoded."""

    def __init__(self) -> None:
        self.line: ProgressLine | None = None
        self.done = 0

    def __call__(self, done: int, total: int) -> None:
        if self.line is None or done < self.done:
            self.line = ProgressLine("image")
        self.done = done
        if done < total:
            self.line(done, done / total)
