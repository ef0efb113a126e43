"""The table of sizes and of released names (spec section 1; papers.md section 1.1).

The text tower and the decoder of a size are fixed by the vision size, and so is the embedding width.
"""

from dataclasses import dataclass
from typing import TypedDict

from openvision.models.decoders.autoregressive import AutoregressiveDecoderConfig
from openvision.models.decoders.parallel import DecoderConfig
from openvision.models.genlip import GenLipConfig, GenLipTextConfig, GenLipVisionConfig
from openvision.models.openvision import OpenVisionConfig
from openvision.models.openvision2 import OpenVision2Config
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig


class Sizes(TypedDict):
    """The four numbers of a transformer."""

    width: int
    depth: int
    mlp_dim: int
    heads: int


@dataclass(frozen=True)
class Tower:
    """Width, depth, MLP width and heads of one transformer."""

    width: int
    depth: int
    mlp_dim: int
    heads: int

    def sizes(self) -> Sizes:
        """The four numbers by the names the configurations use."""
        return {"width": self.width, "depth": self.depth, "mlp_dim": self.mlp_dim, "heads": self.heads}


@dataclass(frozen=True)
class Size:
    """The three transformers of a model size and the width of its embedding."""

    vision: Tower
    text: Tower
    decoder: Tower
    embed_dim: int
    patches: tuple[int, ...]
    resolutions: tuple[int, ...]


_TINY = Tower(192, 12, 768, 3)
_SMALL = Tower(384, 12, 1536, 6)
_MEDIUM = Tower(512, 12, 2048, 8)
_BASE = Tower(768, 12, 3072, 12)
_LARGE = Tower(1024, 24, 4096, 16)
_SO400M = Tower(1152, 27, 4304, 16)
_HUGE = Tower(1280, 32, 5120, 16)

SIZES: dict[str, Size] = {
    "tiny": Size(_TINY, _TINY, _TINY, 192, (16, 8), (160, 224, 384)),
    "small": Size(_SMALL, _SMALL, _SMALL, 384, (16, 8), (160, 224, 384)),
    "base": Size(_BASE, _MEDIUM, _MEDIUM, 512, (16, 8), (160, 224, 384)),
    "large": Size(_LARGE, _BASE, _BASE, 768, (14,), (84, 224, 336)),
    "so400m": Size(_SO400M, _SO400M, _SO400M, 1152, (14,), (84, 224, 384)),
    "huge": Size(_HUGE, _LARGE, _LARGE, 1024, (14,), (84, 224)),
    # Trained by OpenVision 2 only, without a text tower; the text tower is the one its configuration names.
    "giant": Size(Tower(1408, 40, 6144, 16), _HUGE, _LARGE, 1024, (14,), ()),
}


def known_heads(width: int, depth: int) -> int | None:
    """Heads of the transformer of that width and depth, whichever tower it is; None when no size has one."""
    towers = (tower for size in SIZES.values() for tower in (size.vision, size.text, size.decoder))
    return next((tower.heads for tower in towers if (tower.width, tower.depth) == (width, depth)), None)


def variant(size: str, patch_size: int, image_size: int) -> OpenVisionConfig:
    """Configuration of a full v1 model, e.g. `variant("large", 14, 224)`; raises KeyError for an unknown size."""
    towers = SIZES[size]
    return OpenVisionConfig(
        embed_dim=towers.embed_dim,
        vision=VisionConfig(**towers.vision.sizes(), patch_size=patch_size, image_size=image_size),
        text=TextConfig(**towers.text.sizes()),
        decoder=DecoderConfig(**towers.decoder.sizes()),
    )


def variant2(size: str, patch_size: int, image_size: int) -> OpenVision2Config:
    """Configuration of an OpenVision 2 model; raises KeyError for an unknown size.

    The decoder of a size is version 1's: the original's table for version 2 agrees where it has a row, and lacks
    So400m and g, which were trained all the same.
    """
    towers, decoder = SIZES[size], SIZES[size].decoder
    return OpenVision2Config(
        vision=VisionConfig(**towers.vision.sizes(), patch_size=patch_size, image_size=image_size),
        decoder=AutoregressiveDecoderConfig(decoder.width, decoder.depth, decoder.mlp_dim, decoder.heads),
    )


GENLIP_SIZES = {
    # The file of L says width 1152, but its vocabulary's width, hidden width and positions are those of 1024.
    "large": Tower(1024, 24, 2752, 16),
    "so400m": Tower(1152, 27, 3072, 16),
    "giant": Tower(1536, 40, 4096, 16),
}
"""Transformers of GenLIP, from the configurations of its code; `mlp_dim` is that of SwiGLU."""


def variant_genlip(size: str, image_size: int) -> GenLipConfig:
    """Configuration of a GenLIP model with patches of 16 px; raises KeyError for an unknown size."""
    tower = GENLIP_SIZES[size]
    width = tower.width if size == "so400m" else 1024
    return GenLipConfig(
        vision=GenLipVisionConfig(tower.width, tower.depth, tower.mlp_dim, tower.heads, 16, image_size),
        decoder=GenLipTextConfig(width),
    )


def released_variants() -> dict[str, OpenVisionConfig]:
    """The 26 released v1 models by name, e.g. `openvision-vit-large-patch14-224`."""
    return {
        f"openvision-vit-{name}-patch{patch}-{resolution}": variant(name, patch, resolution)
        for name, size in SIZES.items()
        for patch in size.patches
        for resolution in size.resolutions
    }
