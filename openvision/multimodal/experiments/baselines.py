"""What an encoder must beat: one of the same shape that was never trained, and a language model without pictures."""

import json
from pathlib import Path
from typing import Any

import torch

from openvision.errors import OpenVisionError
from openvision.files import atomic_write_text
from openvision.models.vision import VisionTransformer
from openvision.multimodal.model.llm import IMAGE_TOKEN
from openvision.multimodal.recipe import VlmRecipe
from openvision.weights.folder import save_folder
from openvision.weights.load import Request, load_checkpoint

BLIND = "blind"


def random_encoder(source: str, folder: Path, seed: int, request: Request | None = None) -> Path:
    """Write a vision tower of the shape of the OpenVision checkpoint `source`, with weights as training starts from."""
    shape = load_checkpoint(source, request or Request(vision_only=True)).vision.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = VisionTransformer(shape, None)
        tower.init_weights()
    save_folder(folder, tower, None, "", {"random_weights_of_the_shape_of": source, "seed": seed})
    return folder


def blind_recipe(recipe: VlmRecipe) -> VlmRecipe:
    """The stages that train the language model; a projector that no picture reaches learns nothing."""
    stages = []
    for stage in recipe.stages:
        if stage.hub is not None:
            raise OpenVisionError(f"stage {stage.name} reads a data set from the Hub; blind needs conversation files")
        if stage.learning_rate.llm is not None:
            rates = stage.learning_rate.model_copy(update={"projector": None, "encoder": None})
            stages.append(stage.model_copy(update={"learning_rate": rates}))
    if not stages:
        raise OpenVisionError("no stage of the recipe trains the language model; a blind model would learn nothing")
    return recipe.model_copy(update={"stages": tuple(stages)})


def blind_data(recipe: VlmRecipe, data: Path, folder: Path) -> Path:
    """Write the recipe's conversations without their pictures into `folder`."""
    for name in {name for stage in recipe.stages for name in stage.files}:
        text = (data / name).read_text(encoding="utf-8")
        lines = name.endswith(".jsonl")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
        stripped = [_without_pictures(row) for row in rows]
        content = "".join(json.dumps(row) + "\n" for row in stripped) if lines else json.dumps(stripped)
        atomic_write_text(folder / name, content)
    return folder


def _without_pictures(row: dict[str, Any]) -> dict[str, Any]:
    row = {key: value for key, value in row.items() if key not in ("image", "images")}
    for name, text in (("conversations", "value"), ("messages", "content")):
        if name in row:
            row[name] = [turn | {text: turn[text].replace(IMAGE_TOKEN, "").strip()} for turn in row[name]]
    return row
