"""`openvision eval`: measure checkpoints by a suite, or a run on the quickstart's held-out sets."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import Offline, Resolution, Revision, Squash, Vocabulary
from openvision.cli.progress import ProgressLine
from openvision.errors import OpenVisionError
from openvision.files import atomic_write_text


def evaluate(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(help="Checkpoints; with --suite heldout, folders of finished runs."),
    ] = None,
    suite: Annotated[
        str, typer.Option(help="heldout (the quickstart's held-out sets), quick, paper, or a TOML file.")
    ] = "heldout",
    data: Annotated[str, typer.Option(help="Folder with the data sets of the suite.")] = "runs/openmoji",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results and page.")] = Path("runs/eval"),
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
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, ...")] = "cpu",
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Compute in bfloat16 instead of float32.")] = False,
    vocabulary: Vocabulary = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Measure checkpoints: numbers with intervals as JSON, and one page that compares them all.

    With --suite heldout (the default) a run is measured beside baselines that need no learning, on the quickstart's
    two held-out sets, into RUN/evaluation.json.
    """
    if suite == "heldout":
        _held_out([Path(one) for one in checkpoints or ["runs/quickstart"]], Path(data), template)
        return
    if template:
        raise OpenVisionError("--template belongs to --suite heldout; a suite names its prompts in its file")
    from openvision.evaluation.report.comparison_page import build_page
    from openvision.evaluation.report.tables import markdown_table, write_open_clip_table
    from openvision.evaluation.suites.run import Settings, run_suite
    from openvision.evaluation.suites.suite import load_suite
    from openvision.weights.load import Request

    results = run_suite(
        checkpoints or ["runs/quickstart/model"],
        load_suite(suite),
        data,
        output,
        Settings(resolution, "squash" if squash else "crop", batch_size, threads, device, bfloat16),
        Request(vocabulary=vocabulary, revision=revision, offline=offline),
        skip_missing,
        say=typer.echo,
        progress=_Progress(),
        command=sys.argv,
    )
    atomic_write_text(output / "table.md", markdown_table(results))
    if csv is not None:
        write_open_clip_table(results, csv)
        typer.echo(f"open_clip's columns: {csv}")
    typer.echo(f"table: {output / 'table.md'}")
    typer.echo(f"page: {build_page(results, output / 'index.html')}")


class _Progress:
    """A line for every set of pictures that is encoded, begun anew with each."""

    def __init__(self) -> None:
        self.line: ProgressLine | None = None
        self.done = 0

    def __call__(self, done: int, total: int) -> None:
        if self.line is None or done < self.done:
            self.line = ProgressLine("pictures")
        self.done = done
        if done < total:
            self.line(done, done / total)


def _held_out(runs: list[Path], data: Path, template: list[str] | None) -> None:
    from openvision.encoding import PLAIN, check_templates
    from openvision.evaluation.suites.held_out import evaluate_run, print_tables

    templates = tuple(template or PLAIN)
    check_templates(templates)
    for run in runs:
        print_tables(evaluate_run(run, data, templates=templates))
        typer.echo(f"written: {run / 'evaluation.json'}")
