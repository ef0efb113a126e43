"""Fixtures shared by the whole suite."""

import copy
import gc
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openvision.data.shards.dataset import ShardWriter
from openvision.recipe.schema import Recipe, parse_recipe
from openvision.training.trainer import Trainer

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_finish() -> None:
    """What imports and collection made stays: looking through it again and again is a tenth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Folder of reference numbers."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_tiny() -> dict[str, np.ndarray]:
    """A tiny v1 model of the original implementation: parameters, inputs, outputs, losses, gradients."""
    with np.load(GOLDEN / "openvision_tiny.npz") as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


COLOURS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
SHAPES = ("square", "bar", "pole", "corner")


def draw(colour: str, shape: str, size: int = 32) -> bytes:
    """A coloured shape on white, as PNG bytes."""
    pixels = np.full((size, size, 3), 255, dtype=np.uint8)
    quarter = size // 4
    rows, columns = {
        "square": (slice(quarter, -quarter), slice(quarter, -quarter)),
        "bar": (slice(3 * quarter // 2, -3 * quarter // 2), slice(None)),
        "pole": (slice(None), slice(3 * quarter // 2, -3 * quarter // 2)),
        "corner": (slice(0, 2 * quarter), slice(0, 2 * quarter)),
    }[shape]
    pixels[rows, columns] = COLOURS[colour]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_shapes(folder: Path) -> None:
    """Sixteen images of coloured shapes with alt-text, synthetic caption, name and category."""
    with ShardWriter(folder) as writer:
        for colour in COLOURS:
            for shape in SHAPES:
                name = f"{colour} {shape}"
                caption = f"A {shape} on white. The {shape} is {colour}. Nothing else is in the picture."
                meta = {"name": name, "category": shape, "synthetic": caption}
                writer.write(f"{colour}-{shape}", draw(colour, shape), "png", f"{name} clipart", meta)


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory) -> Path:
    """A data folder with the shards `train` and `validation`, the same sixteen images in both."""
    folder = tmp_path_factory.mktemp("shapes")
    for split in ("train", "validation"):
        write_shapes(folder / split)
    return folder


@pytest.fixture(scope="session")
def mixed_folder(tmp_path_factory) -> Path:
    """A data folder like `shapes_folder`, of sixteen squares, panoramas and receipts."""
    folder = tmp_path_factory.mktemp("mixed")
    for split in ("train", "validation"):
        with ShardWriter(folder / split) as writer:
            for number in range(16):
                buffer = io.BytesIO()
                Image.new("RGB", [(32, 32), (48, 24), (24, 48)][number % 3], (8 * number, 90, 30)).save(buffer, "PNG")
                meta = {"name": "thing", "category": "thing", "synthetic": f"This is thing {number}."}
                writer.write(f"image-{number}", buffer.getvalue(), "png", f"thing {number}", meta)
    return folder


TINY_RECIPE = {
    "name": "tiny",
    "model": {
        "embed_dim": 16,
        "vision": {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "patch_size": 8, "image_size": 32},
        "text": {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "vocab_size": 128, "context_length": 12},
        "decoder": {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "vocab_size": 128, "caption_length": 24},
    },
    "data": {"train": "train", "validation": "validation", "vocab_size": 128},
    "stages": [
        {"resolution": 16, "samples": 64, "batch_size": 8, "base_learning_rate": 0.03, "warmup_samples": 16},
        {"resolution": 32, "samples": 32, "batch_size": 8, "base_learning_rate": 0.01},
    ],
    "run": {"log_every": 2, "evaluate_every": 4, "checkpoint_every": 3, "precision": "float32"},
}


@pytest.fixture
def tiny_recipe() -> Recipe:
    """Two stages of a few steps on the shapes: all of a run in a second."""
    return parse_recipe(copy.deepcopy(TINY_RECIPE), "tiny")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, shapes_folder) -> Path:
    """A finished run of the tiny recipe."""
    run = tmp_path_factory.mktemp("run") / "tiny"
    Trainer(parse_recipe(copy.deepcopy(TINY_RECIPE), "tiny"), shapes_folder, run).run()
    return run
