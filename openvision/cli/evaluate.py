"""`openvision eval`: measure checkpoints by a suite, by default on the quickstart's held-out sets."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import MODEL_HELP, Device, Offline, Resolution, Revision, Squash, Vocabulary
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
        str, typer.Option(help="heldout (the quickstart's held-out sets), quick, scenes, paper, or a TOML file.")
    ] = "heldout",
    data: Annotated[str, typer.Option(help="Folder with the data of the suite.")] = "runs/openmoji",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for results and page: runs/eval, for heldout the run's own, by default.",
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help='With heldout: prompt template with {} for the name, e.g. "a drawing of {}"; repeatable.'),
    ] = None,
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Skip evaluators without data.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Also write a table with the columns of open_clip.")] = None,
    resolution: Resolution = None,
    squash: Squash = False,
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1)] = 64,
    threads: Annotated[int, typer.Option(help="Decoding threads.", min=1)] = 2,
    device: Device = "auto",
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Compute in bfloat16 instead of float32.")] = False,
    vocabulary: Vocabulary = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Measure checkpoints: numbers with intervals as JSON, and one page that compares them all.

    With --suite heldout (the default) a run is measured beside training-free baselines, on the quickstart's two
    held-out sets, into RUN/evaluation.json.
    """
    from openvision.evaluation.report.comparison_page import build_page
    from openvision.evaluation.report.tables import markdown_table, print_held_out, write_open_clip_table
    from openvision.evaluation.suites.run import Settings, run_suite
    from openvision.evaluation.suites.suite import HELD_OUT, load_suite
    from openvision.runtime import resolve_device, resolve_precision
    from openvision.weights.load import Request

    where = resolve_device(device)
    resolve_precision("bfloat16" if bfloat16 else "float32", where)
    chosen = load_suite(suite)
    if template and suite != HELD_OUT:
        raise OpenVisionError("--template belongs to --suite heldout; a suite names its prompts in its file")
    if template:
        chosen = chosen.with_prompts(template)
    into = output if output is not None or suite == HELD_OUT else Path("runs/eval")
    results = run_suite(
        checkpoints or ["runs/quickstart"],
        chosen,
        data,
        into,
        Settings(resolution, "squash" if squash else "crop", batch_size, threads, str(where), bfloat16),
        Request(vocabulary=vocabulary, revision=revision, offline=offline),
        skip_missing,
        say=typer.echo,
        progress=_Progress(),
        command=sys.argv,
    )
    for result in results if suite == HELD_OUT else []:
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
            self.line = ProgressLine("images")
        self.done = done
        if done < total:
            self.line(done, done / total)
