"""Show, compare and check recipes: `openvision recipe show`, `diff` and `validate`."""

import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.models.openvision2 import build_model
from openvision.recipe.schema import Recipe, dump_recipe, load_recipe, read_recipe_text
from openvision.recipe.sections import Stage
from openvision.recipe.smoke import smoke_recipe
from openvision.recipe.text import flatten, places, remarks
from openvision.text.tokenizer import Tokenizer

# Differences in these keys are not reported.
_NAMES = ("name", "description")

Load = Callable[[Path, list[str] | None], Recipe]
"""Reads a recipe file with overrides; the command line gives one that also completes it as training does."""


def values_of(recipe: Recipe) -> JsonObject:
    """Dotted key -> value of a recipe, defaults included, None left out."""
    return flatten(recipe.model_dump(mode="json", exclude_none=True))


def show_recipe(path: Path, overrides: list[str] | None = None, smoke: bool = False, load: Load = load_recipe) -> str:
    """The resolved recipe as valid TOML with remarks; comments below it list the stages in updates and all remarks.

    A remark is dropped when `overrides` or the smoke form change its value.
    """
    recipe = load(path, overrides)
    if smoke:
        recipe = smoke_recipe(recipe)
    text = read_recipe_text(path)
    written, values = flatten(tomllib.loads(text)), values_of(recipe)
    kept = {
        remark.place: remark.text
        for remark in remarks(text)
        if all(values.get(key) == value for key, value in _below(written, remark.place).items())
    }
    lines = [f"{line}  # {kept[place]}" if place in kept else line for place, line in places(dump_recipe(recipe))]
    return "\n".join([*lines, "", *_stages(recipe.stages), "#", *_sources(kept)]) + "\n"


def diff_recipes(first: Path, second: Path, load: Load = load_recipe) -> list[tuple[str, str, str]]:
    """(key, first value, second value) for every resolved value that differs; "-" stands for a missing one."""
    left, right = (values_of(load(path, None)) for path in (first, second))
    keys = [*left, *(key for key in right if key not in left)]
    return [
        (key, _written(left, key), _written(right, key))
        for key in keys
        if key not in _NAMES and left.get(key) != right.get(key)
    ]


def check_recipe(path: Path, load: Load = load_recipe) -> str:
    """Validate a recipe and its smoke form, build its model on the meta device; returns a summary in one line.

    Raises OpenVisionError for the first problem. A tokenizer file that exists is checked against the model too.
    """
    recipe = load(path, None)
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
        return f"; its tokenizer {file} does not exist yet"
    tokenizer = Tokenizer.load(file)
    if tokenizer.vocab_size > recipe.vocab_size:
        raise OpenVisionError(
            f"recipe {path}: data.tokenizer {file} has {tokenizer.vocab_size} entries, the model only "
            f"{recipe.vocab_size}; raise vocab_size of its towers"
        )
    return ""


def _below(values: JsonObject, place: str) -> JsonObject:
    """The value with the key `place`, or all values of the table `place`."""
    return {key: value for key, value in values.items() if key == place or key.startswith(f"{place}.")}


def _written(values: JsonObject, key: str) -> str:
    return json.dumps(values[key]) if key in values else "-"


def _stages(stages: Sequence[Stage]) -> list[str]:
    return [
        f"# stage {index}: {stage.resolution} px, {stage.steps:,} updates of {stage.batch_size:,} samples, "
        f"{stage.warmup_steps:,} of them warm-up, peak learning rate {stage.peak_learning_rate:.4g}"
        for index, stage in enumerate(stages)
    ]


def _sources(kept: dict[str, str]) -> list[str]:
    if not kept:
        return ["# No value carries a remark on its source."]
    return [
        "# Values that are not published, or differ from the published ones:",
        *(f"#   {key}: {text}" for key, text in kept.items()),
    ]
