"""The commands of the command line, in the groups of `openvision --help`."""

from typing import Annotated

import typer

from openvision.cli import (
    autoencoder,
    bench,
    caption,
    checkpoint,
    classify,
    compare,
    data,
    demo,
    doctor,
    encode,
    evaluate,
    generate,
    index,
    plan,
    profile,
    quickstart,
    recaption,
    recipe,
    report,
    search,
    serve,
    tokenizer,
    train,
    vlm,
    vlm_eval,
    weights,
)
from openvision.terminal import echo

app = typer.Typer(
    name="openvision",
    help="Train, evaluate and use OpenVision: a fully open family of vision encoders.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        from openvision.provenance import library_versions

        found = library_versions()
        echo(", ".join(f"{name} {found[name]}" for name in ("openvision-encoders", "torch") if name in found))
        raise typer.Exit


@app.callback()
def _options(
    asked: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the versions of this package and torch.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


app.command(rich_help_panel="Start here")(quickstart.quickstart)
app.command(rich_help_panel="Start here")(demo.demo)
app.command(rich_help_panel="Start here")(doctor.doctor)
app.command(rich_help_panel="Train")(train.train)
app.command(rich_help_panel="Train")(autoencoder.autoencoder)
app.command("train-generator", rich_help_panel="Train")(generate.train_generator)
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
app.command(rich_help_panel="Use an encoder")(index.index)
app.command(rich_help_panel="Use an encoder")(caption.caption)
app.command(rich_help_panel="Use an encoder")(generate.generate)
app.command(rich_help_panel="Use an encoder")(recaption.recaption)
app.command(rich_help_panel="Use an encoder")(serve.serve)
app.command("recaption-progress", rich_help_panel="Use an encoder")(recaption.progress)
app.command("recaption-report", rich_help_panel="Use an encoder")(recaption.report)
vlm.app.command("eval")(vlm_eval.evaluate)
vlm.app.command()(vlm_eval.compare)
vlm.app.command()(vlm_eval.demo)
app.add_typer(vlm.app, name="vlm", rich_help_panel="Use an encoder")
app.add_typer(checkpoint.app, name="checkpoint", rich_help_panel="Checkpoints")
app.command(rich_help_panel="Checkpoints")(weights.models)
app.command(rich_help_panel="Checkpoints")(weights.info)
app.command(rich_help_panel="Checkpoints")(weights.convert)
app.command(rich_help_panel="Checkpoints")(weights.export)
app.command(rich_help_panel="Checkpoints")(bench.bench)
app.command(rich_help_panel="Checkpoints")(weights.verify)
