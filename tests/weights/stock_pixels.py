"""How much the preprocessing of another library differs from ours on images that are not plain RGB."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

import openvision
from openvision.weights.load import Checkpoint


def odd_images() -> dict[str, Image.Image]:
    """An opaque image, and three that stock preprocessing does not show as they are."""
    y, x = np.mgrid[:60, :60]
    pixels = np.stack([4 * x, 4 * y, 120 + x], axis=-1).astype(np.uint8)
    pixels[:30] //= 3
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(pixels)))
    turned.getexif()[0x0112] = 6
    alpha = np.where(x + y < 60, 0, 255).astype(np.uint8)
    return {
        "opaque": Image.fromarray(pixels),
        "turned": turned,
        "transparent": Image.fromarray(np.dstack([pixels, alpha])),
        "16 bits": Image.fromarray(pixels[..., 0].astype(np.uint16) * 257),
    }


def cosines(checkpoint: Checkpoint, card: str, stock: Callable[[Image.Image], torch.Tensor]) -> dict[str, list[float]]:
    """Cosine of our embedding and that after stock preprocessing, alone and behind the card's function."""
    block = card.split("## Images")[1].split("```python")[1].split("```")[0]
    names: dict[str, Callable[[Image.Image], Image.Image]] = {}
    exec(block, names)
    encoder = openvision.Encoder.from_checkpoint(checkpoint)
    found = {}
    for kind, image in odd_images().items():
        ours = encoder.encode_images([image])[0]
        batches = [stock(given)[None] for given in (image, names["upright_rgb"](image))]
        with torch.inference_mode():
            theirs = [encoder.model.encode_image(batch)[0] for batch in batches]
        found[kind] = [float(ours @ vector) for vector in theirs]
    return found
