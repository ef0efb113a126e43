"""Classify images with the graph beside this file: python run.py IMAGE...

Needs numpy, Pillow and onnxruntime. Prints probabilities of the labels in labels.json, or without it the embedding.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FOLDER = Path(__file__).parent
CONFIG = json.loads((FOLDER / "onnx.json").read_text())


def pixels(path):
    """An image as the graph reads it: float32 (1, 3, side, side)."""
    side, how = CONFIG["image_size"], CONFIG["preprocessing"]
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
    values = (np.asarray(image) * how["scale"] - how["mean"]) / how["std"]
    return values.transpose(2, 0, 1)[None].astype(np.float32)


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(str(FOLDER / "vision.onnx"), providers=["CPUExecutionProvider"])
    first = session.get_outputs()[0].name
    stored = json.loads((FOLDER / "labels.json").read_text()) if (FOLDER / "labels.json").is_file() else None
    for path in sys.argv[1:] or sys.exit("give image files: python run.py IMAGE..."):
        vector = np.asarray(session.run([first], {"images": pixels(path)})[0])[0]
        if stored is None:
            print(repr(path)[1:-1], *vector, sep="\t")
            continue
        logits = CONFIG["logit_scale"] * np.array(stored["vectors"]) @ vector
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        for row in np.argsort(-shares)[:5]:
            # As a literal: a name must not send control characters to a terminal.
            print(f"{repr(path)[1:-1]}\t{shares[row]:.3f}\t{repr(stored['labels'][row])[1:-1]}")
