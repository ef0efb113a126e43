"""A tiny random model as a folder, and a few pictures as files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openvision.inference.encoder import Encoder
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.text import TextConfig
from openvision.models.variants import Sizes
from openvision.models.vision import VisionConfig
from openvision.text.tokenizer import Tokenizer
from openvision.weights.folder import save_folder

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 60, 220)}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    shape: Sizes = {"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2}
    config = OpenVisionConfig(
        embed_dim=16,
        vision=VisionConfig(**shape, patch_size=8, image_size=32),
        text=TextConfig(**shape, vocab_size=120, context_length=12),
    )
    tokenizer = Tokenizer.train([f"a {colour} picture of something" for colour in COLOURS], 120)
    folder = tmp_path_factory.mktemp("models") / "model"
    save_folder(folder, OpenVision(config), tokenizer, "", {})
    return folder


@pytest.fixture
def encoder(model_folder) -> Encoder:
    return Encoder.load(model_folder)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Folder with three plain pictures, one of them in a subfolder, and a text file."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for place, (name, colour) in zip(("", "", "more"), COLOURS.items(), strict=True):
        Image.fromarray(np.full((40, 50, 3), colour, dtype=np.uint8)).save(folder / place / f"{name}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder
