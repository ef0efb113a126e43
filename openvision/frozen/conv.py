"""A small convolutional autoencoder of our own: trains in minutes on a CPU, for tests and demonstration.

Its latents have the shape of FLUX.1's, 16 channels at 1/8, so that everything behind it is as with the paper's. It is
no substitute for that one: it has learnt the images of one small data set.
"""

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openvision.errors import OpenVisionError
from openvision.files import atomic_folder
from openvision.frozen.config import CONFIG, MAX_CHANNELS, WEIGHTS, read_shape
from openvision.untrusted import check_count

_GROUPS = 8
# Pixels are rearranged 2 x 2 before the first convolution: at full resolution it would cost most.
_STEM = 2


@dataclass(frozen=True)
class ConvConfig:
    """Shape of the autoencoder and, once it is trained, the scale of its latents."""

    channels: int = 16
    widths: tuple[int, ...] = (32, 64, 128)
    """Channels of the levels at 1/2, 1/4, 1/8 of the resolution."""
    scale: float = 1.0
    """1 / standard deviation of the latents of the training images."""

    def __post_init__(self) -> None:
        check_count("channels", self.channels, 1, MAX_CHANNELS)
        if not self.widths or not self.scale > 0:
            raise ValueError("an autoencoder needs at least one width and a scale above 0")
        for width in self.widths:
            if check_count("widths", width, _GROUPS, MAX_CHANNELS) % _GROUPS:
                raise ValueError(f"widths must be multiples of {_GROUPS}, not {width}")

    @property
    def factor(self) -> int:
        """Pixels a latent, each way."""
        return _STEM * 2 ** (len(self.widths) - 1)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(_GROUPS, width), nn.GroupNorm(_GROUPS, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class ConvAutoencoder(nn.Module):
    """Convolutions to latents and back."""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        self.config = config
        widths, pixels = config.widths, 3 * _STEM**2
        down: list[nn.Module] = [nn.PixelUnshuffle(_STEM), nn.Conv2d(pixels, widths[0], 3, padding=1)]
        for width, wider in pairwise(widths):
            down += [ResidualBlock(width), nn.Conv2d(width, wider, 3, stride=2, padding=1)]
        down += [ResidualBlock(widths[-1]), nn.Conv2d(widths[-1], config.channels, 3, padding=1)]
        up: list[nn.Module] = [nn.Conv2d(config.channels, widths[-1], 3, padding=1), ResidualBlock(widths[-1])]
        for wide, width in pairwise(reversed(widths)):
            up += [nn.Upsample(scale_factor=2), nn.Conv2d(wide, width, 3, padding=1), ResidualBlock(width)]
        up += [nn.Conv2d(widths[0], pixels, 3, padding=1), nn.PixelShuffle(_STEM)]
        self.encoder, self.decoder = nn.Sequential(*down), nn.Sequential(*up)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, C, H / f, W / f), not scaled."""
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents, not scaled -> (B, 3, H, W)."""
        return self.decoder(latents)


def save_conv(folder: Path, model: ConvAutoencoder, scale: float, facts: dict[str, object]) -> None:
    """Write the autoencoder as a folder, atomically; `facts` say how it was trained."""
    with atomic_folder(folder) as temporary:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        content = {**asdict(model.config), "scale": scale, "training": facts}
        (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def load_conv(folder: Path) -> tuple[ConvAutoencoder, ConvConfig]:
    """Read an autoencoder and its shape; raises OpenVisionError that names the file."""
    content = read_shape(folder)
    content.pop("training", None)
    try:
        config = ConvConfig(**{**content, "widths": tuple(content["widths"])})
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise OpenVisionError(
            f"{folder / CONFIG} does not describe an autoencoder of `openvision autoencoder`: {reason}"
        ) from error
    with torch.device("meta"):
        model = ConvAutoencoder(config)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise OpenVisionError(f"{folder / WEIGHTS} cannot be read: {reason}; train the autoencoder again") from error
    return model, config
