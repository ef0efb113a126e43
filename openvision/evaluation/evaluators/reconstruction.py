"""Reconstruction: how much of an image survives an OpenVision 3 encoder, beside two controls.

    psnr, ssim, l1, latents_l1     the model, pixels from 0 to 1, without noise on the tokens
    autoencoder_...                the frozen autoencoder alone: the ceiling
    constant_...                   one colour for all images, the median: what reconstructing nothing gives
    distance_efficientnet_lite0    perceptual distance on that network, which is not LPIPS
    fd_efficientnet_lite0          Frechet distance on it, which is not FID
    lpips, rfid                    where their weights are given

The paper reports PSNR, SSIM, LPIPS and rFID on ImageNet and COCO, images resized and cropped to 256 px.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from openvision.encoding import batch_memory, evaluating
from openvision.errors import OpenVisionError, require
from openvision.evaluation.data.images import ImageSet, spread, take
from openvision.evaluation.data.options import open_images
from openvision.evaluation.evaluators.base import Evaluator, Measured
from openvision.evaluation.evaluators.model import EvaluatedModel, prepared_batches
from openvision.evaluation.metrics.reconstruction import frechet_distance, psnr, ssim
from openvision.frozen.autoencoder import as_signed, as_uint8
from openvision.frozen.perceptual import LEAST_PIXELS, PerceptualDistance, open_perceptual, open_stand_in, resized
from openvision.models.openvision3 import OpenVision3
from openvision.runtime import send

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
"""File of torch-fidelity's Inception weights."""
# The network of the stand-in was trained at this resolution.
_FEATURE_PIXELS = 224


class Reconstruction(Evaluator):
    """Every image through the encoder and back, compared with itself."""

    needs_text: ClassVar[bool] = False
    kind: Literal["reconstruction"] = "reconstruction"
    limit: PositiveInt | None = None
    """Measure about so many images, evenly spread; all by default."""
    batch_size: PositiveInt = 16
    """Images decoded at a time."""
    stand_in: bool = True
    """Whether to measure on EfficientNet-Lite0, whose weights are a package."""
    lpips: str | None = None
    """Folder of the backbone of LPIPS."""
    inception: str | None = None
    """Folder of torch-fidelity's Inception weights, for rFID."""

    def measure(self, model: EvaluatedModel, root: str | Path) -> Measured:
        """Reconstruct; raises OpenVisionError for another model, too small images or missing weights."""
        unified = require_openvision3(model)
        if model.pixels < LEAST_PIXELS:
            raise OpenVisionError(f"reconstruction is measured from {LEAST_PIXELS} px on, not at {model.pixels}")
        images = open_images(self.data, root)
        if self.limit is not None and self.limit < len(images):
            images = take(images, spread(len(images), self.limit))
        networks = self._networks(model.device)
        found = _Sums()
        with (
            evaluating(unified) as device,
            model.precision(device),
            batch_memory(device, self.batch_size, (model.pixels, model.pixels), model.when_out_of_memory),
        ):
            colour = _median_colour(images, model)
            for _, batch in prepared_batches(images, range(len(images)), model, self.batch_size):
                _compare(unified, send(batch, device), colour.to(device), networks, found)
        model.check_rejected(len(images) - found.count, images)
        return Measured(
            values=found.means() | found.distances(),
            facts={"images": found.count, "resolution": model.pixels, "rejected": len(images) - found.count},
            data={images.name: images.identity},
        )

    def _networks(self, device: torch.device) -> "_Networks":
        networks = _Networks()
        if self.stand_in:
            stand_in = open_stand_in().to(device)
            networks.distances["distance_efficientnet_lite0"] = stand_in
            networks.features["fd_efficientnet_lite0"] = lambda x: stand_in.features(resized(x, _FEATURE_PIXELS))
        if self.lpips is not None:
            networks.distances["lpips"] = open_perceptual("lpips", self.lpips).to(device)
        if self.inception is not None:
            networks.features["rfid"] = _inception(Path(self.inception).expanduser(), device)
        return networks


@dataclass
class _Networks:
    """What compares images, by the name of the metric."""

    distances: dict[str, PerceptualDistance] = field(default_factory=dict)
    features: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


@dataclass
class _Sums:
    """Sums over images, and the features of both sides."""

    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + values.cpu().double().sum().item()

    def means(self) -> dict[str, float]:
        return {name: total / max(self.count, 1) for name, total in self.sums.items()}

    def distances(self) -> dict[str, float]:
        """Frechet distances; of fewer than two images there are none."""
        if self.count < 2:
            return {}
        names = {name.partition("/")[0] for name in self.features}
        both = {name: [np.concatenate(self.features[f"{name}/{side}"]) for side in ("true", "made")] for name in names}
        return {name: frechet_distance(*sides) for name, sides in sorted(both.items())}


def require_openvision3(model: EvaluatedModel) -> OpenVision3:
    """The model; raises OpenVisionError for one that does not reconstruct."""
    if not isinstance(model.model, OpenVision3):
        raise OpenVisionError(
            "this checkpoint cannot reconstruct: it needs the model folder of an OpenVision 3 run; released encoders "
            "come without their decoder"
        )
    return model.model


def _median_colour(images: ImageSet, model: EvaluatedModel) -> Tensor:
    """The best single colour under an L1, float32 (3, 1, 1) in [-1, 1], of about 64 images."""
    few = take(images, spread(len(images), min(64, len(images))))
    batches = [batch for _, batch in prepared_batches(few, range(len(few)), model, 16)]
    return as_signed(torch.cat(batches)).transpose(0, 1).flatten(1).median(dim=1).values[:, None, None]


def _compare(model: OpenVision3, images: Tensor, colour: Tensor, networks: _Networks, found: _Sums) -> None:
    autoencoder = model.vision.autoencoder(images.device)
    true = as_signed(images)
    latents = autoencoder.encode(images)
    features = model.vision.forward_features(latents)
    predicted = model.reconstruction(features.patch_tokens, features.grid)
    constant = colour.expand_as(true)
    made = autoencoder.decode(predicted)
    for prefix, decoded, code in (
        ("", made, predicted),
        ("autoencoder_", autoencoder.decode(latents), None),
        ("constant_", constant, autoencoder.encode(constant)),
    ):
        rounded = as_uint8(decoded)
        found.add(f"{prefix}psnr", psnr(images, rounded))
        found.add(f"{prefix}ssim", ssim(images, rounded))
        # Pixels from 0 to 1, as in PSNR; the loss has them from -1 to 1.
        found.add(f"{prefix}l1", (decoded - true).abs().mean(dim=(1, 2, 3)) / 2)
        if code is not None:
            found.add(f"{prefix}latents_l1", (code - latents).abs().mean(dim=(1, 2, 3)))
    for name, distance in networks.distances.items():
        found.add(name, distance(true, made.clamp(-1, 1)))
    for name, extract in networks.features.items():
        for side, shown in (("true", true), ("made", made.clamp(-1, 1))):
            found.features.setdefault(f"{name}/{side}", []).append(extract(shown).float().cpu().numpy())
    found.count += len(images)


def _inception(folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Images in [-1, 1] -> the 2048 features of FID, by torch-fidelity."""
    if not (folder / INCEPTION).is_file():
        raise OpenVisionError(
            f"folder {folder} has no {INCEPTION}, the Inception weights of torch-fidelity; download them there, or "
            "leave inception out"
        )
    package = require("torch_fidelity.feature_extractor_inceptionv3", extra="fid")
    network = package.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(folder / INCEPTION)
    ).to(device)
    return lambda images: network(as_uint8(images))[0]
