"""`openvision plan`: estimate the cost of a recipe on given devices."""

from typing import Annotated

import typer

from openvision.cli.options import Overrides, RecipeFile
from openvision.terminal import echo


def plan(
    recipe: RecipeFile,
    devices: Annotated[int, typer.Option(help="Number of devices, or of machines with --device cpu.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="h100, h200, a100, 4090 or cpu (a machine with two cores).")] = "h100",
    mfu: Annotated[str | None, typer.Option(help="Model FLOPs utilisation, e.g. 0.4 or 0.3-0.45.")] = None,
    price: Annotated[str | None, typer.Option(help="US dollars per device-hour, e.g. 2.5 or 2-3.")] = None,
    caption_tokens: Annotated[float | None, typer.Option(help="Mean length of a caption, tokens.", min=0)] = None,
    pairs: Annotated[
        int | None, typer.Option(help="Image-text pairs in the data set; Recap-DataComp-1B by default.", min=1)
    ] = None,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Print exact numbers as JSON.")] = False,
) -> None:
    """Estimate FLOPs, memory, hours, energy, cost and data of a recipe, without running it."""
    from openvision.hardware import device_named
    from openvision.planning.arguments import range_argument
    from openvision.planning.cost import DATASET_SAMPLES
    from openvision.planning.numbers import plan_numbers
    from openvision.planning.page import print_plan
    from openvision.planning.plan import make_plan
    from openvision.planning.stage import CAPTION_TOKENS, Assumptions
    from openvision.recipe.schema import load_recipe
    from openvision.training.setup.start import shape_of

    which = device_named(device)
    assumptions = Assumptions(
        which,
        devices,
        mfu=range_argument("--mfu", mfu, which.mfu),
        price=range_argument("--price", price, which.price),
        caption_tokens=CAPTION_TOKENS if caption_tokens is None else caption_tokens,
        dataset_samples=pairs or DATASET_SAMPLES,
    )
    made = make_plan(load_recipe(recipe, overrides, fill=shape_of), assumptions)
    if json:
        import json as json_module

        echo(json_module.dumps(plan_numbers(made), indent=2))
    else:
        print_plan(made)
