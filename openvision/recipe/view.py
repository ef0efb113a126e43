"""Recipes for people to look at: all values with their remarks, what differs between two, whether one can be built."""

import json
from pathlib import Path
from typing import Any

import torch

from openvision.errors import OpenVisionError
from openvision.models.openvision2 import build_model
from openvision.recipe.schema import Recipe, dump_recipe, load_recipe, read_recipe_text
from openvision.recipe.smoke import smoke_recipe
from openvision.recipe.text import flatten, places, remarks
from openvision.text.tokenizer import Tokenizer

# What a recipe is called is no difference between two of them.
_NAMES = ("name", "description")


def values_of(recipe: Recipe) -> dict[str, Any]:
    """Every value of a recipe by its dotted key, defaults included; what is None is left out."""
    return flatten(recipe.model_dump(mode="json", exclude_none=True))


def show_recipe(path: Path, overrides: list[str] | None = None, smoke: bool = False) -> str:
    """The resolved recipe as TOML that can be run, remarks behind their values; below, in comments, what follows.

    What follows are the stages in updates, and the remarks together. A remark goes when `overrides` or the smoke form
    change its value.
    """
    written, recipe = load_recipe(path), load_recipe(path, overrides)
    if smoke:
        recipe = smoke_recipe(recipe)
    before, after = values_of(written), values_of(recipe)
    told = {
        remark.place: remark.text
        for remark in remarks(read_recipe_text(path))
        if _below(before, remark.place) == _below(after, remark.place)
    }
    lines = [f"{line}  # {told[place]}" if place in told else line for place, line in places(dump_recipe(recipe))]
    return "\n".join([*lines, "", *_stages(recipe), "#", *_sources(told)]) + "\n"


def diff_recipes(first: Path, second: Path) -> list[tuple[str, str, str]]:
    """Keys whose resolved values differ, with both values as TOML would write them, or "-" where there is none."""
    left, right = values_of(load_recipe(first)), values_of(load_recipe(second))
    keys = [*left, *(key for key in right if key not in left)]
    return [
        (key, _written(left, key), _written(right, key))
        for key in keys
        if key not in _NAMES and left.get(key) != right.get(key)
    ]


def check_recipe(path: Path) -> str:
    """Load a recipe, build its model and that of its smoke form without memory; returns what it is in a line.

    Raises OpenVisionError for what is wrong with it, the tokenizer's size included where its file is there.
    """
    recipe = load_recipe(path)
    smoke_recipe(recipe)
    with torch.device("meta"):
        model = build_model(recipe.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    vision = sum(parameter.numel() for parameter in model.vision.parameters())
    samples = sum(stage.steps * stage.batch_size for stage in recipe.stages)
    stages = f"{len(recipe.stages)} stage{'s' * (len(recipe.stages) > 1)}"
    return (
        f"{parameters / 1e6:,.1f}M parameters ({vision / 1e6:,.1f}M in the vision tower), {stages}, "
        f"{recipe.steps:,} updates, {samples:,} samples{_tokenizer(recipe, path)}"
    )


def _tokenizer(recipe: Recipe, path: Path) -> str:
    if recipe.data.tokenizer is None:
        return ""
    file = Path(recipe.data.tokenizer)
    if not file.exists():
        return f"; its tokenizer {file} is not here yet"
    tokenizer = Tokenizer.from_vocabulary(file) if file.suffix == ".txt" else Tokenizer.load(file)
    if tokenizer.vocab_size > recipe.vocab_size:
        raise OpenVisionError(
            f"recipe {path}: data.tokenizer {file} has {tokenizer.vocab_size} entries, the model only "
            f"{recipe.vocab_size}; raise vocab_size of its towers"
        )
    return ""


def _below(values: dict[str, Any], place: str) -> dict[str, Any]:
    """The value at a place, or all values of the table there."""
    return {key: value for key, value in values.items() if key == place or key.startswith(f"{place}.")}


def _written(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "-"


def _stages(recipe: Recipe) -> list[str]:
    return [
        f"# stage {index}: {stage.resolution} px, {stage.steps:,} updates of {stage.batch_size:,} samples, "
        f"{stage.warmup_steps:,} of them warm-up, peak learning rate {stage.peak_learning_rate:.4g}"
        for index, stage in enumerate(recipe.stages)
    ]


def _sources(told: dict[str, str]) -> list[str]:
    if not told:
        return ["# No value is marked as not published."]
    return ["# Values that no source gives, or gives otherwise:", *(f"#   {key}: {text}" for key, text in told.items())]
