"""What patch tokens see: their first three principal components as red, green and blue.

Patches are coarse, so an image is encoded several times, shifted by a fraction of a patch, at the resolution the
model knows, and the tokens are interleaved to a finer map. The mean over images at every place is taken away first:
without that the fixed positions, not the content, would be the first components.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from openvision.encoding import evaluating
from openvision.models.protocols import ContrastiveModel
from openvision.models.vision import VisionTransformer


def dense_patch_tokens(tower: VisionTransformer, images: Tensor, factor: int = 4, batch_size: int = 128) -> Tensor:
    """uint8 (n, 3, R, R) -> float32 (n, rows * factor, columns * factor, D), un-normalised patch tokens.

    `factor` must divide the patch size: the image is shifted by patch / factor pixels both ways, its border
    repeated outwards, and encoded factor^2 times.
    """
    patch = tower.config.patch_size
    if patch % factor:
        raise ValueError(f"factor {factor} does not divide the patch size {patch}")
    stride, margin = patch // factor, patch // 2
    height, width = images.shape[-2:]
    rows, columns = tower.config.grid(height, width)
    padded = F.pad(images.float(), (margin,) * 4, mode="replicate").to(torch.uint8)
    result = torch.empty(len(images), rows, factor, columns, factor, tower.config.width)
    with evaluating(tower) as device:
        for a in range(factor):
            for b in range(factor):
                top, left = (margin - (patch - stride) // 2 + shift * stride for shift in (a, b))
                shifted = padded[..., top : top + height, left : left + width]
                tokens = torch.cat(
                    [
                        tower.forward_features(batch.to(device)).patch_tokens.float().cpu()
                        for batch in shifted.split(batch_size)
                    ]
                )
                result[:, :, a, :, b] = tokens.unflatten(1, (rows, columns))
    return result.flatten(3, 4).flatten(1, 2)


def principal_components(tokens: Tensor, components: int = 3) -> NDArray[np.float64]:
    """(n, h, w, D) -> (n, h, w, components), of tokens with the mean of every place taken away.

    Signs are fixed by making the largest loading of each component positive.
    """
    centred = (tokens - tokens.mean(dim=0, keepdim=True)).double()
    flat = centred.flatten(0, 2)
    _, vectors = torch.linalg.eigh(flat.T @ flat)
    axes = vectors.flip(1)[:, :components]
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return (centred @ (axes * largest.sign())).numpy()


def as_colours(components: NDArray[np.floating], clip: float = 2.0) -> NDArray[np.uint8]:
    """(n, h, w, 3) -> uint8, every component stretched between its `clip` and 100 - `clip` percentiles."""
    low, high = np.percentile(components.reshape(-1, 3), [clip, 100 - clip], axis=0)
    scaled = (components - low) / np.maximum(high - low, 1e-12)
    return np.rint(255 * np.clip(scaled, 0, 1)).astype(np.uint8)


def text_maps(model: ContrastiveModel, tokens: Tensor, texts: NDArray[np.floating]) -> NDArray[np.float32]:
    """How near each place of image i is to text i: tokens (n, h, w, D), unit vectors (n, E) -> cosines (n, h, w).

    A token goes through the norm and the head that the mean token was trained with. From each map the mean over all
    images is taken away for that text, so that what is shown is the content and not the place.
    """
    device = model.logit_scale.device
    with torch.inference_mode():
        placed = model.vision.embed_patches(tokens.to(device)).float().cpu().numpy()
    own = np.einsum("nhwe,ne->nhw", placed, texts)
    mean = np.einsum("hwe,ne->nhw", placed.mean(axis=0), texts)
    return (own - mean).astype(np.float32)


# Dark blue, teal, yellow: readable in grey and by the colour-blind.
_HEAT = np.array([[20, 24, 70], [33, 120, 140], [250, 225, 60]], dtype=np.float64)


def heat_over(pixels: NDArray[np.uint8], values: NDArray[np.floating], clip: float = 2.0) -> NDArray[np.uint8]:
    """A map (h, w) as colours over the grey image (H, W, 3), stretched between its percentiles."""
    low, high = np.percentile(values, [clip, 100 - clip])
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(_HEAT) - 1)
    rows = np.minimum(np.arange(pixels.shape[0]) * values.shape[0] // pixels.shape[0], values.shape[0] - 1)
    columns = np.minimum(np.arange(pixels.shape[1]) * values.shape[1] // pixels.shape[1], values.shape[1] - 1)
    scaled = scaled[rows][:, columns]
    below = np.minimum(scaled.astype(int), len(_HEAT) - 2)
    colour = _HEAT[below] + (scaled - below)[..., None] * (_HEAT[below + 1] - _HEAT[below])
    grey = pixels.astype(np.float64).mean(axis=2, keepdims=True)
    return np.rint(0.65 * colour + 0.35 * grey).astype(np.uint8)
