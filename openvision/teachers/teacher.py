"""What a frozen teacher is: its own preprocessing, and features of a batch of the student's images.

A teacher sees the crop that the student sees, so that their patches cover the same places: uint8 pixels, resized to
the size that the teacher reads and normalised as it was trained. That is known from its config or refused.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision.errors import OpenVisionError
from openvision.models.layers import unit

Interpolation = Literal["bilinear", "bicubic"]
Read = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Normalised images (B, 3, S, S) -> pooled vectors (B, P), and a map of patch features (B, C, rows, columns)."""


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 pixels of any square to what a teacher reads."""

    size: int
    """Side of the square, pixels."""
    mean: tuple[float, ...]
    """Of each channel, of values from 0 to 1."""
    deviation: tuple[float, ...]
    interpolation: Interpolation

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, size, size), on the tensor's own device."""
        pixels = images.float() / 255
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(
                pixels, (self.size, self.size), mode=self.interpolation, antialias=True, align_corners=False
            ).clamp(0, 1)
        # Filled in on the device: a tensor made from a list would be copied there at every call.
        mean, deviation = (
            torch.stack([torch.full((1, 1), value, device=images.device) for value in values])
            for values in (self.mean, self.deviation)
        )
        return (pixels - mean) / deviation


def three_numbers(values: object) -> tuple[float, float, float] | None:
    """A mean or deviation of three channels as a config has it; None for anything else."""
    if isinstance(values, Sequence) and len(values) == 3 and all(isinstance(value, (int, float)) for value in values):
        return (float(values[0]), float(values[1]), float(values[2]))
    return None


@dataclass(frozen=True)
class TeacherFeatures:
    """What a teacher says of B images."""

    pooled: Tensor
    """(B, P), unit vectors, float32."""
    patches: Tensor | None
    """(B, C, rows, columns), each place with mean 0 and variance 1 over its channels, float32; None without a map."""


class Teacher:
    """A frozen encoder with its preprocessing. The widths of its features are found by one image."""

    def __init__(
        self,
        source: str,
        module: nn.Module,
        read: Read,
        preprocessing: Preprocessing,
        pooled_is_trained: bool = True,
    ) -> None:
        """`read` calls `module`; a model that only captions trains no pooled vector.

        Raises OpenVisionError when the teacher cannot read an image of its own size.
        """
        self.source = source
        self.module = module.eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.pooled_is_trained = pooled_is_trained
        self._read = read
        size = preprocessing.size
        try:
            probe = self(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, AssertionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise OpenVisionError(f"teacher {source} cannot read an image of {size} pixels: {reason}") from error
        self.pooled_width = probe.pooled.shape[1]
        """Channels of a pooled vector."""
        self.patch_map = None if probe.patches is None else tuple(probe.patches.shape[1:])
        """Channels, rows and columns of the map of patches; None without a map."""

    @property
    def patch_width(self) -> int | None:
        """Channels of a patch; None without a map."""
        return None if self.patch_map is None else self.patch_map[0]

    def to(self, device: torch.device) -> "Teacher":
        """Move the weights; images must be on the same device."""
        self.module.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> TeacherFeatures:
        """Features of the student's images, uint8 (B, 3, H, W)."""
        pooled, patches = self._read(self.preprocessing(images))
        if patches is not None:
            # Whitened like this the few channels of a transformer that are a hundred times the others do not decide.
            patches = F.layer_norm(patches.float().movedim(1, -1), patches.shape[1:2]).movedim(-1, 1)
        return TeacherFeatures(unit(pooled.float()), patches)

    def fingerprint(self) -> str:
        """SHA-256 of names and values of the weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line: what it is and how it reads images."""
        weights = sum(parameter.numel() for parameter in self.module.parameters())
        how = self.preprocessing
        return (
            f"teacher {self.source}: {weights / 1e6:.1f}M frozen parameters, reads {how.size} px, {how.interpolation}, "
            f"mean {_written(how.mean)}, deviation {_written(how.deviation)}"
        )


def _written(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.3g}" for value in values)


def to_map(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Patch tokens (B, rows * columns, C), row-major -> map (B, C, rows, columns)."""
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))
