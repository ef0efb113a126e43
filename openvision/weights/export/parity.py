"""Parity of an export: the same inputs through model and export, and the largest difference of their outputs."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from openvision.errors import OpenVisionError
from openvision.models.openvision import OpenVision
from openvision.models.vision import VisionTransformer
from openvision.weights.load import Checkpoint

FLOAT32_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Parity:
    """Difference of one output between an export and its model."""

    what: str
    """Name of the output."""
    difference: float
    """Largest absolute difference over the largest absolute value, or over 1 where all values are smaller."""
    tolerance: float
    """Largest difference allowed; infinity for a known difference that is only reported."""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "TOO LARGE"
        limit = "reported only" if self.tolerance == float("inf") else f"tolerance {self.tolerance:.0e}, {verdict}"
        return f"{self.what}: largest difference {self.difference:.1e} ({limit})"


def compare(what: str, ours: Tensor, theirs: Tensor, tolerance: float = FLOAT32_TOLERANCE) -> Parity:
    """Compare two tensors of one shape; raises OpenVisionError when the shapes differ."""
    if ours.shape != theirs.shape:
        raise OpenVisionError(f"{what}: shape {tuple(theirs.shape)} after export, {tuple(ours.shape)} before")
    ours, theirs = ours.double(), theirs.double()
    scale = max(1.0, ours.abs().max().item())
    return Parity(what, (ours - theirs).abs().max().item() / scale, tolerance)


def require_parity(results: list[Parity]) -> list[Parity]:
    """Return the results; raise OpenVisionError that lists those above their tolerance."""
    failed = [str(result) for result in results if not result.passed]
    if failed:
        raise OpenVisionError(f"the export differs from the model and was not kept: {failed}")
    return results


def example_images(vision: VisionTransformer, batch: int = 2) -> Tensor:
    """Normalised images of the tower's own resolution, the same in every run: (batch, 3, R, R)."""
    side = vision.config.image_size
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def text_model(checkpoint: Checkpoint) -> OpenVision:
    """The whole model; raises OpenVisionError for a vision tower alone."""
    if checkpoint.model is None:
        raise OpenVisionError(f"{checkpoint.source} has no text tower, which this export needs; try another target")
    return checkpoint.model


def check_loading(what: str, report: Mapping[str, object]) -> None:
    """Raise OpenVisionError when a library reports missing or unexpected tensors."""
    wrong = {kind: names for kind, names in report.items() if names}
    if wrong:
        raise OpenVisionError(f"{what} did not load every tensor of the export: {wrong}")
