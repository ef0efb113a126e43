"""A finished run of a tiny random model on tiny drawn data, made without training."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openvision.data.shards.dataset import ShardWriter
from openvision.models.decoders.parallel import DecoderConfig
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig
from openvision.text.tokenizer import Tokenizer
from openvision.weights.folder import save_folder

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "pink": (250, 150, 190),
    "black": (20, 20, 20),
    "brown": (130, 80, 40),
    "violet": (130, 40, 200),
}
SHAPES = {
    "square": (slice(10, 30), slice(10, 30)),
    "bar": (slice(16, 24), slice(2, 38)),
    "pole": (slice(2, 38), slice(16, 24)),
}
SPLITS = {
    "train": ("red", "green", "blue", "yellow"),
    "heldout_compositional": ("pink", "black", "brown", "violet"),
    "heldout_random": ("pink", "violet"),
}


def draw(colour: str, shape: str) -> bytes:
    pixels = np.full((40, 40, 3), 255, dtype=np.uint8)
    pixels[SHAPES[shape]] = COLOURS[colour]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def picture() -> Callable[[str, str], bytes]:
    """PNG bytes of a coloured shape."""
    return draw


@pytest.fixture(scope="session")
def fake_data(tmp_path_factory) -> Path:
    """Folder with the shards train and both held-out sets."""
    folder = tmp_path_factory.mktemp("data")
    for split, colours in SPLITS.items():
        with ShardWriter(folder / split) as writer:
            for colour in colours:
                for shape in SHAPES:
                    name = f"{colour} {shape}"
                    caption = f"A {shape} <on> white. The {shape} is {colour} & flat."
                    meta = {"name": name, "category": shape, "synthetic": caption}
                    writer.write(f"{colour}-{shape}", draw(colour, shape), "png", f"{name} clipart", meta)
    return folder


@pytest.fixture(scope="session")
def fake_run(tmp_path_factory) -> Path:
    """Run folder with a random model, a recipe and metrics of two stages."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([f"a {c} {s} is on white clipart." for c in COLOURS for s in SHAPES], 160)
    model = OpenVision(
        OpenVisionConfig(
            16,
            VisionConfig(32, 1, 64, 2, 8, 32),
            TextConfig(32, 1, 64, 2, 160, 16),
            DecoderConfig(32, 1, 64, 2, 160, 16),
        )
    )
    recipe = 'name = "a <tiny> run"\ndescription = "Nothing was trained & nothing is known."\n'
    (run / "recipe.toml").write_text(recipe)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metric_lines()))
    save_folder(run / "model", model, tokenizer, recipe, {})
    return run


def metric_lines() -> list[dict]:
    lines = []
    for step in range(1, 13):
        stage = int(step > 8)
        where = {"step": step, "stage": stage, "resolution": (16, 32)[stage], "samples": 8 * step}
        where |= {"seconds": 0.5 * step, "tflops": 0.1 * step}
        loss = {
            "loss": 9 / step,
            "contrastive": 3 / step,
            "contrastive_alt": 3 / step,
            "contrastive_sentence": 3 / step,
        }
        loss |= {"caption": 3 / step, "logit_scale": 14.0 + step, "lr": 0.001 / step, "images_per_second": 100.0}
        lines.append({"kind": "train", **where, **loss})
        if step % 4 == 0:
            lines.append({"kind": "eval", **where, "split": "validation", "top1": step / 40, "top5": step / 20})
    return lines
