"""Smoke test of a recipe: every stage, loss and tower once, on a CPU, within a minute.

Kept: widths, heads, patch size, resolutions, vocabulary size, text lengths, losses, augmentation, optimizer, number of
stages. Reduced: the batch (2 images), the updates (two in the first stage, one in each later stage) and, for wide
towers (B and larger) or many patches (patch 8), the depth of every tower (2 blocks). Replaced: teachers by small towers
of random weights; the autoencoder and LPIPS of OpenVision 3, whose weights are no part of the project, by pixels and
EfficientNet-Lite0; bfloat16 by float32 on a processor that would emulate it. The data is drawn: coloured shapes with
alt-text and caption. A small vocabulary is trained on the texts; the embeddings keep the size of the recipe.
"""

import io
import os
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw

from openvision.data.shards.dataset import ALT_MEMBER, ShardWriter
from openvision.files import atomic_folder
from openvision.frozen.config import AutoencoderConfig
from openvision.models.openvision2 import ModelConfig
from openvision.models.openvision3 import OpenVision3Config
from openvision.recipe.schema import Recipe, parse_recipe
from openvision.recipe.sections import Data, Parallel, Reconstruction, Run, Stage, TeacherTable, WarmStart

BATCH = 2
# Updates of the first stage: one of warm-up, and one with the moments of an update before it. Later stages take one.
UPDATES = 2
# A model whose vision tower is at least this wide, or has this many patches, is reduced to DEPTH blocks in every tower.
WIDE = 768
LONG = 1024
DEPTH = 2
_VOCABULARY = 512
_COLOURS = {"red": "#d8321e", "green": "#1eaa3c", "blue": "#283cd8", "yellow": "#f0dc28"}
_SHAPES = ("square", "circle")
_SIZE = (120, 96)


def smoke_recipe(recipe: Recipe) -> Recipe:
    """The smoke form of `recipe`, validated; a pure function."""
    loss = recipe.loss
    if loss.reconstruction is not None:
        # What would have to be downloaded is replaced by what a package brings.
        loss = loss.model_copy(update={"reconstruction": _offline(loss.reconstruction)})
    changed = recipe.model_copy(
        update={
            "name": f"{recipe.name}-smoke",
            "start": None,
            "warm_start": _without_start(recipe.warm_start),
            "model": _without_weights(_shallow(recipe.model)),
            "loss": loss,
            "data": _own_data(recipe),
            "stages": tuple(_short(stage, index) for index, stage in enumerate(recipe.stages)),
            "teacher": _untrained(recipe.teacher),
            "run": _quiet(recipe.run),
            "parallel": Parallel(),
        }
    )
    # model_copy does not validate. As stored: towers that the recipe freezes have no weights to be filled with here.
    return parse_recipe(changed.model_dump(), changed.name, stored=True)


def prepare_smoke(recipe: Recipe, run_folder: Path) -> tuple[Recipe, str]:
    """The smoke form of `recipe` and its data folder, drawn below `run_folder` by the main process of torchrun."""
    smoke, folder = smoke_recipe(recipe), run_folder / "smoke-data"
    # The others join it before they read.
    if os.environ.get("RANK", "0") == "0":
        write_smoke_data(smoke, folder)
    return smoke, str(folder)


def write_smoke_data(recipe: Recipe, folder: Path) -> None:
    """Draw the shards of a smoke recipe, `train` and `validation`, unless `folder` exists."""
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
    """Whether the smoke form of a model has reduced depth."""
    rows, columns = model.vision.grid()
    return model.vision.width >= WIDE or rows * columns >= LONG


def _shallow(model: ModelConfig) -> ModelConfig:
    if not is_cut(model):
        return model
    shallow = model
    for name in ("vision", "text", "decoder", "reconstruction"):
        if (tower := getattr(model, name, None)) is not None and hasattr(tower, "depth"):
            shallow = replace(shallow, **{name: replace(tower, depth=min(tower.depth, DEPTH))})
    return shallow


def _without_weights(model: ModelConfig) -> ModelConfig:
    """OpenVision 3 on pixels: the same tokens without an autoencoder."""
    if not isinstance(model, OpenVision3Config) or model.vision.autoencoder.kind == "pixels":
        return model
    factor = model.vision.autoencoder.factor
    pixels = AutoencoderConfig("pixels", None, 3 * factor**2, factor, 1.0)
    return replace(model, vision=replace(model.vision, autoencoder=pixels))


def _offline(reconstruction: Reconstruction) -> Reconstruction:
    return reconstruction.model_copy(update={"perceptual": "efficientnet-lite0", "folder": None})


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
        "micro_batches": min(stage.micro_batches, BATCH),
    }
    return stage.model_copy(update=changes)


def _without_start(warm: WarmStart | None) -> WarmStart | None:
    """Towers stay frozen; there are no weights to be taken."""
    return warm and WarmStart(frozen=warm.frozen)


def _untrained(teachers: tuple[TeacherTable, ...] | None) -> tuple[TeacherTable, ...] | None:
    """Small towers with random weights in the place of the teachers: nothing is downloaded."""
    changes = {"library": "untrained", "resolution": None, "cache": None}
    return teachers and tuple(one.model_copy(update={**changes, "name": one.title}) for one in teachers)


def _quiet(run: Run) -> Run:
    """Log every update; evaluate and checkpoint at the end of each stage; no torch.compile, no trackers.

    Emulated, bfloat16 takes several times as long as float32.
    """
    changes = {
        "precision": "auto" if run.precision == "bfloat16" else run.precision,
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


def _texts(data: Data, name: str) -> dict[str, str]:
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
