"""The smoke form of a recipe: every part of it once, on a CPU, within a minute.

Kept is what the recipe is about: widths, heads, patch, resolutions, vocabulary size, text lengths, losses,
augmentation, optimizer, number of stages. Cut are the samples (two updates in the first stage, one in each later one,
of two pictures) and, where a tower is wide (B and larger) or its pictures long (patch 8), the depth of every tower to
two blocks. Data are drawn: coloured shapes with alt-text and caption, whose own small vocabulary is learnt, while the
model keeps room for all the words of the recipe.
"""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from openvision.data.shards.dataset import ALT_MEMBER, ShardWriter
from openvision.files import atomic_folder
from openvision.models.openvision2 import ModelConfig
from openvision.recipe.schema import Data, Parallel, Recipe, Run, Stage

BATCH = 2
# Of the first stage: one of warm-up, and one that finds the moments of an update before it. Later stages take one.
UPDATES = 2
# A vision tower at least this wide, or with this many patches, is cut to DEPTH blocks, and so are the towers beside it.
WIDE = 768
LONG = 1024
DEPTH = 2
_VOCABULARY = 512
_COLOURS = {"red": "#d8321e", "green": "#1eaa3c", "blue": "#283cd8", "yellow": "#f0dc28"}
_SHAPES = ("square", "circle")
_SIZE = (120, 96)


def smoke_recipe(recipe: Recipe) -> Recipe:
    """The smoke form of `recipe`, validated like any other; a pure function."""
    changed = recipe.model_copy(
        update={
            "name": f"{recipe.name}-smoke",
            "start": None,
            "model": _shallow(recipe.model),
            "data": _own_data(recipe),
            "stages": tuple(_short(stage, index) for index, stage in enumerate(recipe.stages)),
            "run": _quiet(recipe.run),
            "parallel": Parallel(),
        }
    )
    # model_copy does not validate.
    return Recipe.model_validate(changed.model_dump())


def prepare_smoke(recipe: Recipe, run_folder: Path) -> tuple[Recipe, str]:
    """The smoke form of `recipe` and the folder with its data, drawn into `run_folder`."""
    smoke, folder = smoke_recipe(recipe), run_folder / "smoke-data"
    write_smoke_data(smoke, folder)
    return smoke, str(folder)


def write_smoke_data(recipe: Recipe, folder: Path) -> None:
    """Draw the shards that a smoke recipe names, `train` and `validation`, unless they are there already."""
    if folder.exists():
        return
    with atomic_folder(folder) as temporary:
        for split, colours in (("train", tuple(_COLOURS)), ("validation", tuple(_COLOURS)[:2])):
            with ShardWriter(temporary / split) as writer:
                for colour in colours:
                    for shape in _SHAPES:
                        name = f"{colour} {shape}"
                        texts = _texts(recipe.data, name)
                        writer.write(name.replace(" ", "-"), _draw(colour, shape), "png", f"a {name}", texts)


def is_cut(model: ModelConfig) -> bool:
    """Whether the smoke form of a model has fewer blocks."""
    rows, columns = model.vision.grid()
    return model.vision.width >= WIDE or rows * columns >= LONG


def _shallow(model: ModelConfig) -> ModelConfig:
    if not is_cut(model):
        return model
    towers: dict[str, Any] = {
        name: replace(tower, depth=min(tower.depth, DEPTH))
        for name in ("vision", "text", "decoder")
        if (tower := getattr(model, name, None)) is not None
    }
    return replace(model, **towers)


def _own_data(recipe: Recipe) -> Data:
    changes = {
        "train": "train",
        "validation": "validation",
        "vocab_size": min(_VOCABULARY, recipe.vocab_size),
        "tokenizer": None,
    }
    return recipe.data.model_copy(update=changes)


def _short(stage: Stage, index: int) -> Stage:
    updates = 1 if index else UPDATES
    changes = {
        "samples": BATCH * updates,
        "batch_size": BATCH,
        "warmup_samples": min(stage.warmup_samples, BATCH * (updates - 1)),
        "accumulate": min(stage.accumulate, BATCH),
    }
    return stage.model_copy(update=changes)


def _quiet(run: Run) -> Run:
    """One line an update; one evaluation and one checkpoint a stage, at its end; no compiler, no tracker."""
    changes = {
        "log_every": 1,
        "evaluate_every": UPDATES,
        "checkpoint_every": UPDATES,
        "loader_threads": 1,
        "loader_workers": 0,
        "compile": False,
        "tensorboard": False,
        "wandb": None,
        "trackio": None,
    }
    return run.model_copy(update=changes)


def _texts(data: Data, name: str) -> dict[str, Any]:
    colour, shape = name.split()
    caption = f"A {shape} on white. The {shape} is {colour}. There is nothing else in the picture."
    texts = {"name": name, "category": shape, data.synthetic_key: caption}
    return texts if data.alt_key == ALT_MEMBER else texts | {data.alt_key: f"a {name}"}


def _draw(colour: str, shape: str) -> bytes:
    image = Image.new("RGB", _SIZE, "white")
    pen = ImageDraw.Draw(image)
    box = (36, 24, 84, 72)
    if shape == "square":
        pen.rectangle(box, fill=_COLOURS[colour])
    else:
        pen.ellipse(box, fill=_COLOURS[colour])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
