"""`openvision recipe show`, `diff` and `validate`: look at recipes without running them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from openvision.errors import OpenVisionError

app = typer.Typer(help="Show, compare and check recipes.", no_args_is_help=True)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a value first, e.g. --set stages.0.batch_size=64; repeatable."),
]
Smoke = Annotated[bool, typer.Option("--smoke", help="Show the form that `openvision train --smoke` runs.")]


@app.command()
def show(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, e.g. recipes/openvision/l14.toml.")],
    overrides: Overrides = None,
    smoke: Smoke = False,
) -> None:
    """Print a recipe with every default filled in, as TOML, and list the values that no source gives."""
    from openvision.recipe.view import show_recipe
    from openvision.training.setup.evaluators import complete_evaluators

    typer.echo(show_recipe(recipe, overrides, smoke, complete_evaluators), nl=False)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="Recipe file.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Print the values in which two recipes differ, defaults filled in; a dash is a key that a recipe does not have."""
    from openvision.recipe.view import diff_recipes
    from openvision.training.setup.evaluators import complete_evaluators

    differences = diff_recipes(first, second, complete_evaluators)
    if not differences:
        typer.echo("no difference but name and description")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("", str(first), str(second)):
        table.add_column(column, overflow="fold")
    for difference in differences:
        table.add_row(*difference)
    Console(width=None if Console().is_terminal else 200).print(table, highlight=False)


@app.command()
def validate(
    recipes: Annotated[list[Path], typer.Argument(help="Recipe files.")],
) -> None:
    """Check recipes and build their models without memory; every broken one is named."""
    from openvision.recipe.view import check_recipe
    from openvision.training.setup.evaluators import complete_evaluators

    broken = 0
    for path in recipes:
        try:
            typer.echo(f"{path}: {check_recipe(path, complete_evaluators)}")
        except OpenVisionError as error:
            broken += 1
            typer.echo(f"openvision: {error}", err=True)
    if broken:
        raise OpenVisionError(f"{broken} of {len(recipes)} recipes are not valid: see above")
