"""The command line: `openvision --help` is the table of contents, one thin file a command.

A mistake of the user ends with one sentence on standard error and exit code 1, an interrupted job with 130.
"""

import sys

import typer
from rich.console import Console

from openvision.cli import classify, data, encode, evaluate, quickstart, report, search, tokenizer, train, weights
from openvision.errors import OpenVisionError

app = typer.Typer(
    name="openvision",
    help="Train, evaluate and use OpenVision: a fully open family of vision encoders.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.command(rich_help_panel="Start here")(quickstart.quickstart)
app.command(rich_help_panel="Train")(train.train)
app.add_typer(data.app, name="data", rich_help_panel="Train")
app.add_typer(tokenizer.app, name="tokenizer", rich_help_panel="Train")
app.command("eval", rich_help_panel="Evaluate")(evaluate.evaluate)
app.command(rich_help_panel="Evaluate")(report.report)
app.command(rich_help_panel="Use an encoder")(classify.classify)
app.command(rich_help_panel="Use an encoder")(search.search)
app.command(rich_help_panel="Use an encoder")(encode.encode)
app.command(rich_help_panel="Checkpoints")(weights.models)
app.command(rich_help_panel="Checkpoints")(weights.info)
app.command(rich_help_panel="Checkpoints")(weights.convert)
app.command(rich_help_panel="Checkpoints")(weights.export)
app.command(rich_help_panel="Checkpoints")(weights.verify)


def main() -> None:
    """Entry point of the console script."""
    from openvision.training.trainer import Interrupted

    try:
        app()
    except OpenVisionError as error:
        _fail(str(error), 1)
    except Interrupted as stop:
        _fail(str(stop), 130)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    Console(stderr=True).print(f"openvision: {message}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
