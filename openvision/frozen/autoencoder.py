"""Autoencoders of images, frozen: pixels to latents and back (OpenVision 3, specification section 2).

    z = scale * mean(E(x))         x in [-1, 1], (B, 3, H, W);  z (B, C, H / f, W / f)
    x = D(z / scale)

The scale is all that is applied: FLUX's own shift is left out, as in the released demo. Three kinds:

- "diffusers": `diffusers.AutoencoderKL` by folder or Hub id, FLUX.1's (16 channels, 1/8, scale 0.3611) by default.
- "conv": our own small one (`openvision autoencoder` trains it), by folder.
- "pixels": no autoencoder. Pixels are rearranged, f x f x 3 channels a place, exactly: a patch of 2 on latents of 1/8
  is then a patch of 16 on pixels, the paper's "without VAE".
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision.errors import OpenVisionError, require
from openvision.frozen.config import CONFIG, WEIGHTS, AutoencoderConfig
from openvision.frozen.conv import load_conv

# Scales are written with four digits.
_SCALE_TOLERANCE = 1e-3


class Network(Protocol):
    """What an adapter makes of an autoencoder: two functions and how they scale."""

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> mean of the latents (B, C, H / f, W / f), not scaled."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents, not scaled -> (B, 3, H, W)."""
        ...


class Autoencoder(nn.Module):
    """A frozen autoencoder: its parameters need no gradient, what goes through it does."""

    def __init__(self, network: nn.Module, config: AutoencoderConfig) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.config = config

    def train(self, mode: bool = True) -> "Autoencoder":
        """Stay in evaluation mode."""
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8 or floats in [-1, 1] -> scaled latents (B, C, H / f, W / f), float32.

        Raises ValueError for sides that the factor does not divide.
        """
        height, width = images.shape[-2:]
        if height % self.config.factor or width % self.config.factor:
            raise ValueError(
                f"images of {height} x {width} px do not divide into latents of {self.config.factor} px; "
                f"choose a resolution that is a multiple of {self.config.factor}"
            )
        return self.network.encode(as_signed(images)).float() * self.config.scale  # pyright: ignore[reportCallIssue]

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, h * f, w * f), about [-1, 1]; gradients flow."""
        return _wide(self.network.decode(latents / self.config.scale))  # pyright: ignore[reportCallIssue]


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def as_signed(images: Tensor) -> Tensor:
    """uint8 -> floats in [-1, 1]; floats stay as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def as_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1], clipped to it -> uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Pixels(nn.Module):
    """Pixels as latents, without loss."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3 * f * f, H / f, W / f)."""
        return F.pixel_unshuffle(images, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`."""
        return F.pixel_shuffle(latents, self.factor)


class FromDiffusers(nn.Module):
    """`diffusers.AutoencoderKL` with the posterior's mean as latents."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H / f, W / f)."""
        return self.model.encode(images).latent_dist.mean  # pyright: ignore[reportCallIssue]

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, h * f, w * f)."""
        return self.model.decode(latents).sample  # pyright: ignore[reportCallIssue]


def open_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """The autoencoder of a configuration, float32 on the CPU where it was not opened before.

    Raises OpenVisionError when it is missing, or has other channels, another factor or another scale.
    """
    stamp = 0
    if config.source is not None and (file := _weights_in(Path(config.source).expanduser())) is not None:
        stamp = file.stat().st_mtime_ns
    return _open(config, stamp)


def describe_autoencoder(config: AutoencoderConfig) -> str:
    """One phrase for reports and cards."""
    if config.kind == "pixels":
        return "none: pixels"
    name = "diffusers.AutoencoderKL" if config.kind == "diffusers" else "the project's own"
    return f"{name}, {config.source}, {config.channels} channels at 1/{config.factor}, scale {config.scale:g}"


@lru_cache(maxsize=2)
def _open(config: AutoencoderConfig, stamp: int) -> Autoencoder:
    if config.kind == "pixels":
        network: nn.Module = Pixels(config.factor)
    elif config.kind == "conv":
        network, found = load_conv(Path(str(config.source)).expanduser())
        _check(config, found.channels, found.factor, found.scale)
    else:
        network = _from_diffusers(config)
    return Autoencoder(network, config)


def _from_diffusers(config: AutoencoderConfig) -> FromDiffusers:
    source = str(config.source)
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / CONFIG).is_file():
        raise OpenVisionError(f"autoencoder {source} has no {CONFIG}: give the folder of a diffusers AutoencoderKL")
    if not folder.exists() and source.startswith((".", "/", "~")):
        raise OpenVisionError(f"autoencoder {source} does not exist; name its folder or its Hub id")
    diffusers = require("diffusers", extra="reconstruction")
    try:
        model = diffusers.AutoencoderKL.from_pretrained(str(folder) if folder.is_dir() else source)
    except Exception as error:  # Its own, the Hub's and safetensors' errors have no common class.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OpenVisionError(
            f"autoencoder {source} cannot be loaded by diffusers: {reason}; give the folder or Hub id of an "
            "AutoencoderKL"
        ) from error
    shape = model.config
    levels: Sequence[int] = shape.block_out_channels
    _check(config, shape.latent_channels, 2 ** (len(levels) - 1), shape.scaling_factor)
    return FromDiffusers(model)


def _check(config: AutoencoderConfig, channels: int, factor: int, scale: float) -> None:
    found = {"channels": channels, "factor": factor, "scale": scale}
    wrong = [
        f"{name} {value:g} instead of {wanted:g}"
        for name, value in found.items()
        if abs(value - (wanted := getattr(config, name))) > (_SCALE_TOLERANCE * wanted if name == "scale" else 0)
    ]
    if wrong:
        raise OpenVisionError(
            f"autoencoder {config.source} has {', '.join(wrong)}; set model.vision.autoencoder to its values, or name "
            "the one that the encoder was trained with"
        )


def _weights_in(path: Path) -> Path | None:
    names = (WEIGHTS, "diffusion_pytorch_model.safetensors")
    return next((path / name for name in names if (path / name).is_file()), None)
