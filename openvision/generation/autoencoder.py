"""Train our own small autoencoder on the images of shards: L1 on pixels, and a pull of the latents towards 0.

The result is a folder that a recipe names as `model.vision.autoencoder.source`, with a scale of 1: the deviation of the
latents of training images is divided out of the weights at the end, so that latents reach the encoder with a spread of
about 1, as FLUX.1's do after their scale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import ImageSet, ShardImages
from openvision.frozen.autoencoder import as_signed
from openvision.frozen.conv import ConvAutoencoder, ConvConfig, save_conv
from openvision.images.decode import BadSampleError
from openvision.images.preprocess import prepare, to_batch
from openvision.runtime import autocast, resolve_precision

# Against an L1 of pixels of about 0.05: latents stay of the order of 1, and little is lost.
PULL = 1e-4
PEAK_RATE, WARMUP = 1e-3, 100
# Images whose latents say what the scale is.
SCALED = 256


@dataclass(frozen=True)
class AutoencoderTraining:
    """How long, and on what."""

    resolution: int = 64
    steps: int = 3000
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        factor = ConvConfig().factor
        if self.resolution % factor or self.resolution < factor:
            raise OpenVisionError(
                f"resolution {self.resolution} does not divide into latents of {factor} px; choose a multiple"
            )


def train_autoencoder(
    shards: Path,
    folder: Path,
    training: AutoencoderTraining,
    device: torch.device,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Train on all images of `shards` and write `folder`; returns the mean L1 of the last 50 steps, pixels in [-1, 1].

    `report` is called after each step with its number and its L1. Raises OpenVisionError when the folder exists or the
    shards hold no image that can be read.
    """
    if folder.exists():
        raise OpenVisionError(f"{folder} exists; choose another place or remove it")
    images = ShardImages(shards).images()
    rng = np.random.default_rng(training.seed)
    torch.manual_seed(training.seed)
    model = ConvAutoencoder(ConvConfig()).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.0)
    precision, losses = resolve_precision("auto", device), []
    for step in range(training.steps):
        ramp = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + np.cos(np.pi * step / training.steps))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * ramp
        batch = as_signed(_batch(images, rng, training).to(device))
        with autocast(device.type, precision):
            latents = model.encode(batch)
            decoded = model.decode(latents)
        pixels = (decoded.float() - batch).abs().mean()
        loss = pixels + PULL * latents.float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(pixels.item())
        if not np.isfinite(losses[-1]):
            raise OpenVisionError(f"the autoencoder diverged at step {step + 1}; train it with another --seed")
        report(step + 1, losses[-1])
    with torch.no_grad():
        sample = AutoencoderTraining(training.resolution, 1, min(SCALED, 4 * training.batch_size), training.seed)
        spread = model.encode(as_signed(_batch(images, rng, sample).to(device))).std().item()
    final = float(np.mean(losses[-50:]))
    facts: dict[str, object] = {**vars(training), "images": len(images), "identity": images.identity, "l1": final}
    with torch.no_grad():
        last, first = model.encoder[-1], model.decoder[0]
        assert isinstance(last, torch.nn.Conv2d)
        assert isinstance(first, torch.nn.Conv2d)
        assert last.bias is not None
        last.weight.div_(spread)
        last.bias.div_(spread)
        first.weight.mul_(spread)
    save_conv(folder, model, 1.0, facts)
    return final


def _batch(images: ImageSet, rng: np.random.Generator, training: AutoencoderTraining) -> Tensor:
    """Random images, uint8 (B, 3, R, R); those that cannot be read are passed over."""
    found: list[np.ndarray] = []
    tries = 0
    while len(found) < training.batch_size:
        tries += 1
        try:
            found.append(prepare(images.load(int(rng.integers(len(images)))), training.resolution))
        except BadSampleError as bad:
            if tries > 10 * training.batch_size:
                raise OpenVisionError(f"{images.name}: hardly any image can be read, e.g. {bad}") from bad
    return to_batch(found)
