"""Registry of the released OpenVision checkpoints: name, shape, Hub repository and reported accuracy.

v1 models have both towers (the caption decoder is only in the JAX tree); OpenVision 2 and 3 models are vision towers.
"""

import difflib
from dataclasses import dataclass

from openvision.errors import OpenVisionError
from openvision.models.openvision import OpenVisionConfig
from openvision.models.openvision3 import DEMO_AUTOENCODER, LatentVisionConfig
from openvision.models.variants import SIZES, released_variants
from openvision.models.vision import VisionConfig

ORGANISATION = "UCSC-VLAA"

# ImageNet-1k zero-shot top-1 in percent, by size, patch and resolution (papers.md section 3.1: the original's README).
_IMAGENET = {
    ("tiny", 16): {160: 46.9, 224: 49.6, 384: 51.5},
    ("tiny", 8): {160: 51.9, 224: 53.5, 384: 53.9},
    ("small", 16): {160: 63.5, 224: 65.9, 384: 67.1},
    ("small", 8): {160: 67.3, 224: 68.6, 384: 68.5},
    ("base", 16): {160: 72.4, 224: 73.9, 384: 74.5},
    ("base", 8): {160: 74.8, 224: 75.4, 384: 75.6},
    ("large", 14): {84: 74.7, 224: 78.5, 336: 78.9},
    ("so400m", 14): {84: 76.2, 224: 79.7, 384: 79.9},
    ("huge", 14): {84: 77.4, 224: 80.4},
}
# Sides of the latents that OpenVision 3 was released for: 32 are 256 px, 28 are 224 px.
_OPENVISION3 = {"base": (32, 28), "large": (32,)}
_OPENVISION2 = {"large": (224, 336), "so400m": (384,), "huge": (224, 336, 448), "giant": (224,)}


@dataclass(frozen=True)
class Released:
    """A released checkpoint."""

    name: str
    vision: VisionConfig
    embed_dim: int | None
    """Width of the embedding; None for OpenVision 2, whose tower has no trained head. OpenVision 3's files may come
    without the head."""
    full: OpenVisionConfig | None
    """Shape of both towers and the decoder; None for OpenVision 2 and 3."""
    repository: str
    """Hub id."""
    imagenet_top1: float | None
    """Reported zero-shot accuracy on ImageNet-1k, percent; None without a text tower."""

    @property
    def parameters(self) -> int:
        """Parameters of the vision tower with its head; fixed positions are not counted."""
        return vision_parameters(self.vision, self.embed_dim)

    @property
    def tokens(self) -> int:
        """Patch tokens at the model's own resolution."""
        rows, columns = self.vision.grid()
        return rows * columns


def vision_parameters(config: VisionConfig, embed_dim: int | None) -> int:
    """Number of parameters of a vision tower, computed from its shape."""
    width, hidden = config.width, config.mlp_dim
    block = 4 * width * width + 2 * width * hidden + 4 * width + (hidden + width) + 4 * width
    patches = config.input_channels * config.kernel**2 * width
    return patches + width + config.depth * block + 2 * width + width * (embed_dim or 0)


def _v1() -> list[Released]:
    entries = []
    for name, config in released_variants().items():
        size = name.split("-")[2]
        vision = config.vision
        entries.append(
            Released(
                name=name,
                vision=vision,
                embed_dim=config.embed_dim,
                full=config,
                repository=f"{ORGANISATION}/{name}",
                imagenet_top1=_IMAGENET[size, vision.patch_size][vision.image_size],
            )
        )
    return entries


def _v2() -> list[Released]:
    entries = []
    for size, resolutions in _OPENVISION2.items():
        for resolution in resolutions:
            name = f"openvision2-vit-{size}-patch14-{resolution}"
            vision = VisionConfig(**SIZES[size].vision.sizes(), patch_size=14, image_size=resolution)
            entries.append(Released(name, vision, None, None, f"{ORGANISATION}/{name}-vision-only", None))
    return entries


def _v3() -> list[Released]:
    entries = []
    for size, latents in _OPENVISION3.items():
        for side in latents:
            name = f"openvision3-vit-{size}-patch2-{side}"
            vision = LatentVisionConfig(
                **SIZES[size].vision.sizes(),
                patch_size=2 * DEMO_AUTOENCODER.factor,
                image_size=side * DEMO_AUTOENCODER.factor,
                autoencoder=DEMO_AUTOENCODER,
            )
            entries.append(Released(name, vision, SIZES[size].embed_dim, None, f"{ORGANISATION}/{name}", None))
    return entries


_ENTRIES = {entry.name: entry for entry in (*_v1(), *_v2(), *_v3())}


def available_models() -> list[str]:
    """Names that `openvision.load` and `openvision.load_vision` accept."""
    return list(_ENTRIES)


def released(name: str) -> Released:
    """The released checkpoint of that name; raises OpenVisionError that suggests the nearest name."""
    if name in _ENTRIES:
        return _ENTRIES[name]
    near = difflib.get_close_matches(name, _ENTRIES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise OpenVisionError(
        f"{name!r} is neither a file or folder here nor a released model; {hint}"
        "`openvision models` lists the names; a Hub id is written organisation/name"
    )


def released_in(repository: str) -> Released | None:
    """The released checkpoint of a Hub repository; None for any other repository."""
    return next((entry for entry in _ENTRIES.values() if entry.repository.lower() == repository.lower()), None)
