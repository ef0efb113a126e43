"""Random crops, colour jitter and grayscale with the original's distributions (spec section 4).

Random numbers are drawn a sample at a time from that sample's own generator, pixels are changed a batch at a time. So a
sample looks the same in any batch, thread or process, and the arithmetic is vectorised.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from openvision.images.decode import Box, SourceImage
from openvision.images.preprocess import resize, truncated

_ATTEMPTS = 100
_GRAY = (0.2989, 0.587, 0.114)

Probability = Annotated[float, Field(ge=0, le=1)]


class Augment(BaseModel):
    """Strengths of the augmentations; the defaults are the published ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    crop_sampling: Literal["original", "random_resized"] = "original"
    """How crops are drawn: as the original does, or area uniform and aspect log-uniform as RandomResizedCrop does."""
    crop_area: tuple[Probability, Probability] = (0.4, 1.0)
    """Least and greatest fraction of the image that a crop covers."""
    crop_aspect: tuple[float, float] = (0.75, 1.33)
    """Least and greatest width over height of a crop."""
    jitter: Annotated[float, Field(ge=0)] = 0.4
    """Strength: brightness, contrast and saturation by 0.8 of it, hue by 0.2 of it."""
    jitter_probability: Probability = 0.8
    """Share of samples whose colours are changed."""
    grayscale_probability: Probability = 0.2
    """Share of samples that become grey."""
    views: Annotated[int, Field(ge=1, le=2**16)] | None = None
    """Fixed views of an image, of which each time one is drawn: crop and colours follow from the sample's key and the
    number of the view, whatever the run. None draws a new view each time."""

    @model_validator(mode="after")
    def _check_ranges(self) -> "Augment":
        for name in ("crop_area", "crop_aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two positive numbers, the smaller first, not {low} and {high}")
        return self


@dataclass(frozen=True)
class Jitter:
    """The colour changes drawn for one sample: operations in order, their amounts, and whether it becomes grey."""

    order: tuple[int, ...]
    """Indices into (brightness, contrast, saturation, hue); empty for no jitter."""
    amounts: tuple[float, float, float, float]
    gray: bool


def view_generator(key: str, view: int) -> np.random.Generator:
    """What draws the crop and colours of a fixed view of the sample `key`, in any run, epoch and process."""
    number = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    return np.random.Generator(np.random.Philox(key=[number, view]))


@dataclass(frozen=True)
class Draws:
    """What is drawn at a position of a run."""

    own: np.random.Generator
    """Keyed by seed and position."""
    view: int | None
    """Number of the fixed view; None where every crop is a new one."""

    def of(self, key: str) -> np.random.Generator:
        """What draws crop and colours of the sample `key`."""
        return self.own if self.view is None else view_generator(key, self.view)


def draws_at(seed: int, position: int, augment: Augment) -> Draws:
    """What is drawn at a position, without drawing for those before it: the generator is counter-based."""
    own = np.random.Generator(np.random.Philox(key=[seed, position]))
    return Draws(own, None if augment.views is None else int(own.integers(augment.views)))


def random_crop_box(rng: np.random.Generator, height: int, width: int, augment: Augment) -> Box:
    """Draw a crop as TensorFlow's `sample_distorted_bounding_box` does: (y, x, height, width) in pixels.

    The aspect is uniform; the height is uniform between those that give the least and the greatest area, so the area
    is not. After 100 failed attempts the crop is the whole image.
    """
    low, high = (share * height * width for share in augment.crop_area)
    for _ in range(_ATTEMPTS):
        aspect = rng.uniform(*augment.crop_aspect)
        least, greatest = round(math.sqrt(low / aspect)), round(math.sqrt(high / aspect))
        if round(greatest * aspect) > width:
            greatest = int((width + 0.5 - 1e-7) / aspect)
        greatest = min(greatest, height)
        least = min(least, greatest)
        crop_height = int(rng.integers(least, greatest + 1))
        crop_width = round(crop_height * aspect)
        if crop_height * crop_width < low:
            crop_height += 1
        elif crop_height * crop_width > high:
            crop_height -= 1
        crop_width = round(crop_height * aspect)
        fits = 0 < crop_height <= height and 0 < crop_width <= width
        if fits and low <= crop_height * crop_width <= high:
            y, x = int(rng.integers(height - crop_height + 1)), int(rng.integers(width - crop_width + 1))
            return y, x, crop_height, crop_width
    return 0, 0, height, width


def random_resized_box(rng: np.random.Generator, height: int, width: int, augment: Augment) -> Box:
    """Draw a crop as torchvision's RandomResizedCrop does: (y, x, height, width) in pixels.

    After ten failed attempts the crop is the centre, as large as the aspects allow.
    """
    low, high = augment.crop_aspect
    for _ in range(10):
        area = height * width * rng.uniform(*augment.crop_area)
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            y, x = int(rng.integers(height - crop_height + 1)), int(rng.integers(width - crop_width + 1))
            return y, x, crop_height, crop_width
    aspect = min(max(width / height, low), high)
    crop_height = min(height, max(1, round(width / aspect)))
    crop_width = min(width, max(1, round(crop_height * aspect)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def random_crop(image: SourceImage, rng: np.random.Generator, size: int, augment: Augment) -> np.ndarray:
    """A random crop of an image, resized to (size, size, 3), uint8."""
    box = random_box(rng, image, augment)
    return resize(image.crop(box, size), size, size)


def random_box(rng: np.random.Generator, image: SourceImage, augment: Augment) -> Box:
    """The crop that `augment.crop_sampling` draws."""
    draw = random_crop_box if augment.crop_sampling == "original" else random_resized_box
    return draw(rng, image.height, image.width, augment)


def draw_jitter(rng: np.random.Generator, augment: Augment) -> Jitter:
    """Draw one sample's colour changes."""
    applied = augment.jitter > 0 and rng.random() < augment.jitter_probability
    order = tuple(int(index) for index in rng.permutation(4)) if applied else ()
    spread, turn = 0.8 * augment.jitter, 0.2 * augment.jitter
    factors = rng.uniform(max(0.0, 1 - spread), 1 + spread, size=3)
    hue = rng.uniform(-turn, turn)
    gray = bool(rng.random() < augment.grayscale_probability)
    return Jitter(order, (float(factors[0]), float(factors[1]), float(factors[2]), float(hue)), gray)


def apply_jitter(images: Tensor, jitters: list[Jitter]) -> Tensor:
    """uint8 (B, 3, H, W) and one `Jitter` an image -> uint8 of the same shape; values truncated, not rounded.

    Images with the same order of operations are computed together, few enough at a time to stay in the cache.
    """
    result = images.clone()
    least = max(1, _CACHED_VALUES // images[0].numel()) if len(images) else 1
    for order, rows in _by_order(jitters).items():
        for start in range(0, len(rows), least):
            some = rows[start : start + least]
            result[some] = _jittered(images[some], order, [jitters[row] for row in some])
    return result


# Floats of an image and what is computed from it: about a megabyte.
_CACHED_VALUES = 64 * 1024


def _by_order(jitters: list[Jitter]) -> dict[tuple[int, ...], list[int]]:
    """Rows of images that change, by the order of their operations."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, jitter in enumerate(jitters):
        if jitter.order or jitter.gray:
            groups.setdefault(jitter.order, []).append(row)
    return groups


def _jittered(images: Tensor, order: tuple[int, ...], jitters: list[Jitter]) -> Tensor:
    gray = [row for row, jitter in enumerate(jitters) if jitter.gray]
    pixels = images.float().div_(255)
    amounts = torch.tensor([jitter.amounts for jitter in jitters], dtype=torch.float32)
    for operation in order:
        pixels = _OPERATIONS[operation](pixels, amounts[:, operation].view(-1, 1, 1, 1)).clamp_(0, 1)
    if gray:
        weights = torch.tensor(_GRAY).view(1, 3, 1, 1)
        pixels[gray] = (pixels[gray] * weights).sum(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return truncated(pixels.mul_(255).clamp_(0, 255))


def _brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return pixels.mul_(factor)


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    return pixels.sub_(mean).mul_(factor).add_(mean)


def _saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    """Scale saturation in HSV, capped at 1. Hue and value stay, so every channel moves on a line towards the value."""
    value, chroma = _value_and_chroma(pixels)
    # Without chroma every channel equals the value, and any factor will do.
    least = torch.minimum(value / chroma.clamp(min=_TINY), factor)
    moved = value - pixels
    return torch.sub(value, moved.mul_(least), out=moved)


def _hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Rotate the hue by a fraction of the full circle; saturation and value stay."""
    red, green, blue = pixels.split(1, dim=1)
    value, chroma = _value_and_chroma(pixels)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sector = torch.where(value == green, (blue - red).div_(safe).add_(2), (red - green).div_(safe).add_(4))
    sector = torch.where(value == red, (green - blue).div_(safe), sector).add_(6 * turn)
    # Each channel is the value minus a part of the chroma that depends on the distance of hue and channel.
    return torch.cat([value - chroma * _distance(sector, offset) for offset in (5.0, 3.0, 1.0)], dim=1)


def _value_and_chroma(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Largest channel, and largest minus smallest, (B, 1, H, W)."""
    value = pixels.amax(dim=1, keepdim=True)
    return value, value - pixels.amin(dim=1, keepdim=True)


def _distance(sector: Tensor, offset: float) -> Tensor:
    # The remainder of a division by 6, to the last bit, in less than half the time of `remainder`.
    around = sector + offset
    around -= (around / 6).floor_().mul_(6)
    return torch.minimum(around, 4 - around).clamp_(0, 1)


_TINY = 1e-30
_OPERATIONS = (_brightness, _contrast, _saturation, _hue)
