"""`openvision plan`: what a recipe costs on given devices, before anything starts."""

from pathlib import Path
from typing import Annotated

import typer


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, e.g. recipes/quickstart.toml.")],
    devices: Annotated[int, typer.Option(help="Number of devices; of machines with --device cpu.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="h100, h200, a100, 4090 or cpu (a machine of two cores).")] = "h100",
    mfu: Annotated[str | None, typer.Option(help="Utilisation of forward and backward, e.g. 0.4 or 0.3-0.45.")] = None,
    price: Annotated[str | None, typer.Option(help="US dollars a device-hour, e.g. 2.5 or 2-3.")] = None,
    caption_tokens: Annotated[
        float | None, typer.Option(help="Mean number of target tokens of a caption.", min=0)
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(help="Pairs in the data set; by default those of Recap-DataComp-1B.", min=1)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a value of the recipe, e.g. --set stages.0.batch_size=64; repeatable."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Exact numbers instead of the page.")] = False,
) -> None:
    """Work out FLOPs, memory, hours, energy, cost and data of a recipe; nothing is run."""
    from openvision.hardware import device_named
    from openvision.planning.arguments import range_argument
    from openvision.planning.cost import DATASET_SAMPLES
    from openvision.planning.numbers import plan_numbers
    from openvision.planning.page import print_plan
    from openvision.planning.plan import make_plan
    from openvision.planning.stage import CAPTION_TOKENS, Assumptions
    from openvision.recipe.schema import load_recipe

    which = device_named(device)
    assumptions = Assumptions(
        which,
        devices,
        mfu=range_argument("--mfu", mfu, which.mfu),
        price=range_argument("--price", price, which.price),
        caption_tokens=CAPTION_TOKENS if caption_tokens is None else caption_tokens,
        dataset_samples=pairs or DATASET_SAMPLES,
    )
    made = make_plan(load_recipe(recipe, overrides), assumptions)
    if json:
        import json as json_module

        typer.echo(json_module.dumps(plan_numbers(made), indent=2))
    else:
        print_plan(made)
