"""What the patches of an image hold: how well each one fits a text, and their main directions as colours.

Both are grids of patches, row-major, as the tower sees the image (after its crop).
"""

import numpy as np
import torch
from numpy.typing import NDArray

from openvision.encoding import evaluating
from openvision.errors import OpenVisionError
from openvision.inference.encoder import Encoder
from openvision.inference.vision import ImageInput, VisionEncoder


def text_map(encoder: Encoder, image: ImageInput, text: str) -> NDArray[np.float32]:
    """Cosine of a text with each patch token, normed and projected as their mean is: float32 (rows, columns).

    Training projects the mean only, so a map shows a tendency, not a segmentation.
    """
    if not text.strip():
        raise OpenVisionError('the text is empty; give one, e.g. "a red car"')
    vector = encoder.encode_texts([text])[0]
    with evaluating(encoder.vision):
        features = encoder.forward_features([image])
        patches = encoder.vision.embed_patches(features.patch_tokens[0])
        return (patches.float().cpu() @ vector).reshape(features.grid).numpy()


def patch_pca(encoder: VisionEncoder, image: ImageInput) -> NDArray[np.uint8]:
    """The three main components of the patch tokens as red, green and blue: uint8 (rows, columns, 3).

    Each component is stretched to its own range; its sign is such that its largest entry is positive.
    """
    with evaluating(encoder.vision):
        features = encoder.forward_features([image])
        tokens = features.patch_tokens[0].cpu().double().numpy()
    centred = tokens - tokens.mean(axis=0)
    components = np.linalg.svd(centred, full_matrices=False)[2][:3]
    components = components * np.sign(np.take_along_axis(components, np.abs(components).argmax(1)[:, None], axis=1))
    scores = np.zeros((len(tokens), 3))
    scores[:, : len(components)] = centred @ components.T
    low, high = scores.min(axis=0), scores.max(axis=0)
    colours = (scores - low) / np.maximum(high - low, 1e-12)
    return (255 * colours).round().astype(np.uint8).reshape(*features.grid, 3)


def shown(encoder: VisionEncoder, image: ImageInput) -> NDArray[np.uint8]:
    """The image as the tower sees it, RGB uint8 (H, W, 3), without the pixels that fill no patch."""
    patch, pixels = encoder.vision.config.patch_size, encoder.preprocess(image).permute(1, 2, 0).numpy()
    height, width = (side // patch * patch for side in pixels.shape[:2])
    return pixels[:height, :width]


def overlay(pixels: NDArray[np.uint8], cosines: NDArray[np.float32]) -> NDArray[np.uint8]:
    """RGB (H, W, 3) with the best patches bright and orange, the others dim: same shape, uint8."""
    low, high = float(cosines.min()), float(cosines.max())
    heat = torch.from_numpy((cosines - low) / max(high - low, 1e-12))[None, None]
    size = pixels.shape[:2]
    weight = torch.nn.functional.interpolate(heat, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
    weight = weight[..., None]
    orange = np.array([255, 140, 0])
    dim = 0.35 * pixels
    return ((1 - weight) * dim + weight * (0.55 * pixels + 0.45 * orange)).round().astype(np.uint8)
