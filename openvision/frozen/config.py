"""Which autoencoder a model has: its kind, its source and the shape of its latents; and the files of our own kind."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openvision.errors import OpenVisionError
from openvision.files import JsonObject, read_json
from openvision.untrusted import check_count

Kind = Literal["diffusers", "conv", "pixels"]
KINDS: tuple[Kind, ...] = ("diffusers", "conv", "pixels")

FLUX_SCALE = 0.3611
WEIGHTS, CONFIG = "model.safetensors", "config.json"
MAX_CHANNELS, MAX_FACTOR = 4096, 64


@dataclass(frozen=True)
class AutoencoderConfig:
    """Which autoencoder stands before a vision tower, and the shape of its latents."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    kind: Kind = "diffusers"
    """`diffusers.AutoencoderKL`, our own small convolutional one, or "pixels": none, the paper's "without VAE"."""
    source: str | None = None
    """Folder, or Hub id with "diffusers"; none with "pixels"."""
    channels: int = 16
    """Of the latents."""
    factor: int = 8
    """Pixels a latent, each way."""
    scale: float = FLUX_SCALE
    """What latents are multiplied by, so that their spread is about 1."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind of the autoencoder must be one of {', '.join(KINDS)}, not {self.kind!r:.80}")
        check_count("channels", self.channels, 1, MAX_CHANNELS)
        check_count("factor", self.factor, 1, MAX_FACTOR)
        if not 0 < self.scale < 1e6:
            raise ValueError(f"scale {self.scale} of the autoencoder must be above 0")
        if (self.source is None) != (self.kind == "pixels"):
            known = 'kind "pixels" has no source' if self.kind == "pixels" else f'kind "{self.kind}" needs a source'
            raise ValueError(f'{known}: a folder, or with kind "diffusers" a Hub id')
        if self.kind == "pixels" and (self.channels, self.scale) != (3 * self.factor**2, 1.0):
            raise ValueError(
                f'kind "pixels" rearranges pixels: channels must be {3 * self.factor**2} (3 x factor x factor) and '
                "scale 1.0"
            )


def read_shape(folder: Path) -> JsonObject:
    """The configuration beside an autoencoder of ours; raises OpenVisionError when it is no such folder."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise OpenVisionError(
            f"autoencoder {folder} is not there: it needs {CONFIG} and {WEIGHTS}; train one with "
            "`openvision autoencoder`"
        )
    return read_json(folder / CONFIG)
