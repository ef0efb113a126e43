"""The reconstruction losses of OpenVision 3 (its equation 4): pixels, latents, and a perceptual distance.

    |x - x'|_1 + beta |z - z'|_1 + lambda LPIPS(x, x')         means over all elements, x in [-1, 1]

The autoencoder's decoder costs more memory than all else when its activations are kept. It decodes a few images at a
time and is computed again in the backward pass, so that it never holds more than those (`at_once`).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Decode = Callable[[Tensor], Tensor]
"""Latents (B, C, h, w) -> images (B, 3, H, W) about [-1, 1]."""
Distance = Callable[[Tensor, Tensor], Tensor]
"""Images twice, (B, 3, H, W) -> distances (B,)."""


def latent_loss(latents: Tensor, predicted: Tensor) -> Tensor:
    """Mean absolute difference of latents, shape ()."""
    return (predicted - latents).abs().mean()


def pixel_losses(
    decode: Decode, images: Tensor, predicted: Tensor, distance: Distance | None = None, at_once: int | None = None
) -> Tensor:
    """Sums over images of the mean absolute difference of pixels and of the perceptual distance, float32 (2,).

    Args:
        decode: the autoencoder's decoder.
        images: (B, 3, H, W) in [-1, 1].
        predicted: (B, C, h, w), latents that are decoded and compared with the images.
        distance: None leaves the second sum at 0, and nothing is computed for it.
        at_once: images decoded at a time, recomputed in the backward pass; None decodes all and keeps the activations.
    """
    if not len(images):
        return predicted.sum() * torch.zeros(2, device=predicted.device)

    def compare(own: Tensor, latents: Tensor) -> Tensor:
        decoded = decode(latents)
        pixels = (decoded - own).abs().mean(dim=(1, 2, 3)).sum()
        return torch.stack([pixels, decoded.new_zeros(()) if distance is None else distance(own, decoded).sum()])

    if at_once is None:
        return compare(images, predicted)
    # There is no randomness to restore.
    parts = [
        checkpoint(compare, own, latents, use_reentrant=False, preserve_rng_state=False)
        for own, latents in zip(images.split(at_once), predicted.split(at_once), strict=True)
    ]
    return torch.stack(parts).sum(dim=0)
