"""`openvision recipe show`, `diff` and `validate`: inspect recipes without running them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from openvision.cli.options import Overrides, RecipeFile
from openvision.errors import OpenVisionError
from openvision.terminal import Console, echo

if TYPE_CHECKING:
    from openvision.recipe.schema import Recipe

app = typer.Typer(help="Show, compare and validate recipes.", no_args_is_help=True)


@app.command()
def show(
    recipe: RecipeFile,
    overrides: Overrides = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Show the smoke form of `openvision train --smoke`.")] = False,
) -> None:
    """Print a recipe as TOML with all defaults, and list the values that are not as published."""
    from openvision.recipe.view import show_recipe

    echo(show_recipe(recipe, overrides, smoke, _as_trained), nl=False)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="Recipe file.")],
    second: Annotated[Path, typer.Argument(help="Recipe file to compare with.")],
) -> None:
    """Print the values that differ between two recipes, defaults included; "-" stands for a missing key."""
    from openvision.recipe.view import diff_recipes

    differences = diff_recipes(first, second, _as_trained)
    if not differences:
        echo("no differences, except perhaps name and description")
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
    """Validate recipes and build their models on the meta device; reports every invalid one."""
    from openvision.recipe.view import check_recipe

    invalid = 0
    for path in recipes:
        try:
            echo(f"{path}: {check_recipe(path, _as_trained)}")
        except OpenVisionError as error:
            invalid += 1
            echo(f"openvision: {error}", err=True)
    if invalid:
        raise OpenVisionError(f"{invalid} of {len(recipes)} recipes are invalid; see above")


def _as_trained(path: Path, overrides: list[str] | None) -> "Recipe":
    """A recipe as training takes it: the shape comes from its start where it has no [model], evaluators are checked."""
    from openvision.recipe.schema import load_recipe
    from openvision.training.setup.evaluators import complete_evaluators
    from openvision.training.setup.start import shape_of

    return complete_evaluators(load_recipe(path, overrides, fill=shape_of), f"recipe {path}")
