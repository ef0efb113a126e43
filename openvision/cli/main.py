"""Entry point of the command line: registers all commands and maps errors to exit codes.

Exit code 1 and one sentence on standard error for a user error, 130 for an interrupted job, 75 for a training run that
the scheduler stopped.
"""

import os
import sys

import typer

from openvision.cli import (
    caption,
    checkpoint,
    classify,
    compare,
    data,
    encode,
    evaluate,
    plan,
    profile,
    quickstart,
    recipe,
    report,
    search,
    tokenizer,
    train,
    vlm,
    vlm_eval,
    weights,
)
from openvision.errors import OpenVisionError
from openvision.terminal import Console

app = typer.Typer(
    name="openvision",
    help="Train, evaluate and use OpenVision: a fully open family of vision encoders.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.command(rich_help_panel="Start here")(quickstart.quickstart)
app.command(rich_help_panel="Train")(train.train)
app.command(rich_help_panel="Train")(plan.plan)
app.command(rich_help_panel="Train")(profile.profile)
app.add_typer(recipe.app, name="recipe", rich_help_panel="Train")
app.add_typer(data.app, name="data", rich_help_panel="Train")
app.add_typer(tokenizer.app, name="tokenizer", rich_help_panel="Train")
app.command("eval", rich_help_panel="Evaluate")(evaluate.evaluate)
app.command(rich_help_panel="Evaluate")(compare.compare)
app.command(rich_help_panel="Evaluate")(report.report)
app.command(rich_help_panel="Use an encoder")(classify.classify)
app.command(rich_help_panel="Use an encoder")(search.search)
app.command(rich_help_panel="Use an encoder")(encode.encode)
app.command(rich_help_panel="Use an encoder")(caption.caption)
vlm.app.command("eval")(vlm_eval.evaluate)
vlm.app.command()(vlm_eval.compare)
vlm.app.command()(vlm_eval.demo)
app.add_typer(vlm.app, name="vlm", rich_help_panel="Use an encoder")
app.add_typer(checkpoint.app, name="checkpoint", rich_help_panel="Checkpoints")
app.command(rich_help_panel="Checkpoints")(weights.models)
app.command(rich_help_panel="Checkpoints")(weights.info)
app.command(rich_help_panel="Checkpoints")(weights.convert)
app.command(rich_help_panel="Checkpoints")(weights.export)
app.command(rich_help_panel="Checkpoints")(weights.verify)


def main() -> None:
    """Run the console script."""
    from openvision.training.run.signals import Interrupted
    from openvision.training.run.watchdog import AlreadyReportedError

    try:
        app()
    except OpenVisionError as error:
        _fail(str(error), 1)
    except AlreadyReportedError:
        _leave(1)
    except Interrupted as stop:
        # One process of torchrun reports for all of them.
        _fail("" if os.environ.get("RANK", "0") != "0" else str(stop), stop.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    if message:
        Console(stderr=True).print(f"openvision: {message}", markup=False, highlight=False, soft_wrap=True)
    _leave(code)


def _leave(code: int) -> None:
    """Exit; a process of torchrun does not join threads, which may wait for the other processes."""
    if "RANK" in os.environ:
        from openvision.training.run.watchdog import exit_immediately

        exit_immediately(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
