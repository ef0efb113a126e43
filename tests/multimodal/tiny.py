"""An encoder, models and images small enough for every test; the language model is `multimodal.model.toy`'s."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from openvision.models.vision import VisionConfig, VisionTransformer
from openvision.multimodal.model.build import BuildOptions, Built, assemble, save
from openvision.multimodal.model.llm import LanguageModel, load_llm
from openvision.multimodal.model.towers import VisionTower, tower_of
from openvision.weights.load import Checkpoint

VISION = VisionConfig(width=48, depth=3, mlp_dim=96, heads=3, patch_size=8, image_size=44)


def encoder(config: VisionConfig = VISION, seed: int = 0) -> Checkpoint:
    """A random vision tower in which every parameter matters."""
    torch.manual_seed(seed)
    tower = VisionTransformer(config, None).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return Checkpoint(tower, None, None, "test", {})


def build_tiny(llm: Path, framework: str = "llava-1.5") -> Built:
    """A whole model in memory."""
    return assemble(tiny_tower(framework), tiny_llm(llm), BuildOptions(framework=framework))  # pyright: ignore[reportArgumentType]


def tiny_tower(framework: str = "llava-1.5") -> VisionTower:
    """The random encoder as a stock tower, or as one that reads native shapes of up to 25 patches."""
    return tower_of(encoder(), max_tokens=25 if framework == "llava-native" else None)


def tiny_llm(llm: Path) -> LanguageModel:
    """The random language model."""
    return load_llm(llm)


def write_model(llm: Path, folder: Path, framework: str = "llava-1.5") -> Path:
    """A whole model on disk."""
    folder.mkdir(parents=True)
    save(build_tiny(llm, framework), folder, {}, BuildOptions(framework=framework))  # pyright: ignore[reportArgumentType]
    return folder


def write_data(folder: Path, count: int = 12) -> Path:
    """Conversations about coloured images of several shapes; the last one has no image."""
    images = folder / "images"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        height, width = ((40, 40), (30, 60), (64, 28))[number % 3]
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
        colour = ("red", "green", "blue")[number % 3]
        rows.append(
            {
                "id": f"s{number}",
                "image": f"{number}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat colour?" + "?" * (number % 5)},
                    {"from": "gpt", "value": f"It is {colour}."},
                    {"from": "human", "value": "Sure?"},
                    {"from": "gpt", "value": "Yes."},
                ],
            }
        )
    turns = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello, you."}]
    rows.append({"id": "text", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows))
    return folder
