"""`openvision eval`: measure a run on the held-out sets."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")] = Path("runs/quickstart"),
    data: Annotated[Path, typer.Option(help="Folder with the shard folders train and heldout_*.")] = Path(
        "runs/openmoji"
    ),
    template: Annotated[
        list[str] | None,
        typer.Option(help='Prompt template with {} for the name, e.g. "a drawing of {}"; repeatable, averaged.'),
    ] = None,
) -> None:
    """Measure a run on the held-out sets beside baselines that need no learning; writes RUN/evaluation.json."""
    from openvision.evaluation.suite import evaluate_run, print_tables
    from openvision.evaluation.zero_shot import PLAIN, check_templates

    templates = tuple(template or PLAIN)
    check_templates(templates)
    print_tables(evaluate_run(run, data, templates=templates))
    typer.echo(f"written: {run / 'evaluation.json'}")
