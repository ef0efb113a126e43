"""OpenVision 3: one encoder for understanding and generation (arXiv 2601.15369; specification of OpenVision 3).

    x (B, 3, R, R) -> frozen autoencoder -> z (B, C, R/8, R/8) -> ViT, patch 2 -> U (B, N, D), N = (R/16)^2
    reconstruction:  U + noise -> ViT, patch 1 -> linear, pixel shuffle -> z' -> the autoencoder's decoder -> x'
    understanding:   mean of U contrasted with a text; U read by an autoregressive caption decoder

The encoder is version 1's but for its inputs. What the paper leaves open is a value of the configuration, and
docs/openvision3.md says why it is what it is. The autoencoder is no part of the module: it is opened on first use
(frozen/), and neither trained, stored nor counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision.files import JsonObject
from openvision.frozen.autoencoder import Autoencoder, open_autoencoder
from openvision.frozen.config import AutoencoderConfig
from openvision.models.bounds import MAX_WIDTH, check_transformer, stored
from openvision.models.contrast import OPTIONS, Contrasting
from openvision.models.decoders.autoregressive import AutoregressiveCaptionDecoder, AutoregressiveDecoderConfig
from openvision.models.decoders.lengths import Lengths, states_by_length
from openvision.models.genlip import GenLipTower, GenLipVisionConfig
from openvision.models.kernels.dispatch import compute_dtype, full_precision, linear_fp32
from openvision.models.layers import (
    Block,
    Init,
    LayerNorm,
    init_vision_block,
    is_skeleton,
    sincos_position_table,
    unit,
)
from openvision.models.text import TextConfig, build_text
from openvision.models.vision import VisionConfig, VisionTransformer
from openvision.untrusted import check_count

KIND3 = "openvision3"
DEMO_AUTOENCODER = AutoencoderConfig(source="Letian2003/black-forest-labs_FLUX.1-dev_vae")
"""What the released demo loads: a mirror of FLUX.1-dev's autoencoder, whose licence is non-commercial."""


@dataclass(frozen=True)
class LatentVisionConfig(VisionConfig):
    """Shape of a vision tower behind an autoencoder. Patch and image size are in pixels: 16 is a patch of 2."""

    autoencoder: AutoencoderConfig = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = self.autoencoder.factor
        if self.patch_size % factor:
            raise ValueError(
                f"patch_size {self.patch_size} px is no whole number of latents of {factor} px; choose a multiple"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} px is no whole number of patches of {self.patch_size} px, which are "
                f"{self.kernel} x {self.kernel} latents; choose a multiple"
            )

    @property
    def input_channels(self) -> int:
        """Channels of a latent."""
        return self.autoencoder.channels

    @property
    def kernel(self) -> int:
        """Side of a patch in latents."""
        return self.patch_size // self.autoencoder.factor


def vision_config(data: JsonObject) -> VisionConfig:
    """The shape of a vision tower as `asdict` wrote it; raises TypeError, KeyError or ValueError."""
    if "rope_theta" in data:
        return GenLipVisionConfig(**data)
    if "autoencoder" not in data:
        return VisionConfig(**data)
    return LatentVisionConfig(**{**data, "autoencoder": AutoencoderConfig(**data["autoencoder"])})


def build_vision(config: VisionConfig, embed_dim: int | None) -> VisionTransformer:
    """The vision tower of a configuration, on pixels or on latents; GenLIP's has no head, whatever `embed_dim`."""
    if isinstance(config, GenLipVisionConfig):
        return GenLipTower(config)
    tower = LatentVisionTransformer if isinstance(config, LatentVisionConfig) else VisionTransformer
    return tower(config, embed_dim)


class LatentVisionTransformer(VisionTransformer):
    """A vision tower that sees latents. Images may be uint8, floats in [-1, 1], or latents already."""

    config: LatentVisionConfig

    def autoencoder(self, device: torch.device) -> Autoencoder:
        """The frozen autoencoder, on `device`."""
        return open_autoencoder(self.config.autoencoder).to(device)

    def inputs(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> scaled latents (B, C, H/f, W/f), float32, without a gradient; latents stay as are."""
        if self._are_latents(images):
            return images
        with torch.no_grad():
            return self.autoencoder(images.device).encode(images)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of a batch of images or latents."""
        side = self.config.kernel if self._are_latents(images) else self.config.patch_size
        rows, columns = (length // side for length in images.shape[-2:])
        return rows, columns

    def _are_latents(self, images: Tensor) -> bool:
        return images.dtype != torch.uint8 and images.shape[1] == self.config.input_channels


@dataclass(frozen=True)
class ReconstructionConfig:
    """The reconstruction branch: a ViT decoder without class token, and how it is trained."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    width: int
    depth: int
    mlp_dim: int
    heads: int
    noise: float = 0.8
    """tau: the noise on a sample's tokens has a deviation drawn from [0, tau] in training; none otherwise."""
    noise_relative: bool = False
    """Whether that deviation is relative to the root mean square of the sample's tokens."""
    pixels_of: int = 1
    """The pixel losses are taken on one sample in this many: decoding pixels costs more than all else."""
    decoded_at_once: int | None = None
    """Images that the autoencoder decodes at a time, recomputing its activations in the backward pass; None decodes
    all and keeps them."""
    init: Init = "published"
    """Initial values of the blocks and of the projection before them, as in the vision tower: "published" or
    "by_width"."""

    def __post_init__(self) -> None:
        check_transformer(self.width, self.depth, self.mlp_dim, self.heads)
        if self.width % 4 or self.width < 8:
            raise ValueError(f"width {self.width} of the reconstruction must be a multiple of 4 and at least 8")
        if not 0 <= self.noise < 1e3:
            raise ValueError(f"noise {self.noise} of the reconstruction must be at least 0")
        check_count("pixels_of", self.pixels_of, 1, 2**20)
        if self.decoded_at_once is not None:
            check_count("decoded_at_once", self.decoded_at_once, 1, 2**20)

    def to_dict(self) -> JsonObject:
        """Plain dictionary, as written to `config.json`: options that are off are left out, as older versions need."""
        return stored(self, ("init",))


class ReconstructionDecoder(nn.Module):
    """Tokens to latents: linear, ViT, LayerNorm, linear to the latents of a patch, pixel shuffle."""

    def __init__(self, config: ReconstructionConfig, vision: LatentVisionConfig) -> None:
        super().__init__()
        self.config, self.patch = config, vision.kernel
        self.proj = nn.Linear(vision.width, config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_dim, gelu="none") for _ in range(config.depth)
        )
        self.norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, vision.input_channels * self.patch**2)
        self._positions: dict[tuple[int, int, torch.device], Tensor] = {}
        if not is_skeleton(self):
            self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter as in the vision tower."""
        by_width = self.config.init == "by_width"
        nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5 if by_width else 0.02)
        # Small in any width: the first guess is the mean of the latents.
        nn.init.normal_(self.head.weight, std=0.02)
        for linear in (self.proj, self.head):
            nn.init.zeros_(linear.bias)
        for block in self.blocks:
            init_vision_block(block, self.config.width, self.config.init)  # pyright: ignore[reportArgumentType]
        self.norm.reset_parameters()

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens (B, N, D) of a grid -> latents float32 (B, C, rows * patch, columns * patch)."""
        x = linear_fp32(tokens, self.proj.weight, self.proj.bias) + self._table(*grid, tokens.device)
        x = x.to(compute_dtype(self.proj.weight))
        for block in self.blocks:
            x = block(x)
        x = linear_fp32(self.norm(x.to(self.norm.weight.dtype)), self.head.weight, self.head.bias)
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, grid), self.patch)

    def _table(self, rows: int, columns: int, device: torch.device) -> Tensor:
        key = (rows, columns, device)
        if key not in self._positions:
            self._positions[key] = sincos_position_table(rows, columns, self.config.width).to(device)
        return self._positions[key]


@dataclass(frozen=True)
class OpenVision3Config:
    """Shape of a whole model: vision tower on latents, text tower, caption decoder, reconstruction decoder."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    embed_dim: int
    vision: LatentVisionConfig
    text: TextConfig
    decoder: AutoregressiveDecoderConfig
    reconstruction: ReconstructionConfig
    kind: Literal["openvision3"] = KIND3
    """Distinguishes this model from the others in recipes and in `config.json`."""
    logit_bias: bool = False
    """As in OpenVisionConfig."""
    logit_scale_sentence: bool = False
    """As in OpenVisionConfig."""

    def __post_init__(self) -> None:
        check_count("embed_dim", self.embed_dim, 1, MAX_WIDTH)

    def patches_read(self, patches: int) -> int:
        """How many of `patches` tokens the caption decoder reads in training: all."""
        return patches

    def to_dict(self) -> JsonObject:
        """Plain nested dictionary, as written to `config.json`."""
        towers = {"vision": self.vision, "text": self.text, "reconstruction": self.reconstruction}
        return stored(self, OPTIONS) | {name: tower.to_dict() for name, tower in towers.items()}

    @staticmethod
    def from_dict(data: JsonObject) -> "OpenVision3Config":
        """Inverse of `to_dict`; raises TypeError, KeyError or ValueError on what does not fit."""
        vision = vision_config(data["vision"])
        if not isinstance(vision, LatentVisionConfig):
            raise ValueError("the vision tower of OpenVision 3 needs an autoencoder")
        return OpenVision3Config(
            embed_dim=data["embed_dim"],
            vision=vision,
            text=TextConfig(**data["text"]),
            decoder=AutoregressiveDecoderConfig(**data["decoder"]),
            reconstruction=ReconstructionConfig(**data["reconstruction"]),
            **{name: data[name] for name in OPTIONS if name in data},
        )


@dataclass(frozen=True)
class OpenVision3Output:
    """What a training step needs of B images with K texts each."""

    image_embeds: Tensor
    """(B, E) unit vectors, float32."""
    text_embeds: Tensor
    """(K, B, E) unit vectors, float32."""
    caption_states: Tensor
    """(B, T, D) states of the caption decoder."""
    scale: Tensor
    """exp(logit_scale), shape ()."""
    latents: Tensor
    """(B, C, h, w) of the images, float32, without a gradient: what is to be reconstructed."""
    predicted: Tensor
    """(B, C, h, w), float32, from noisy tokens."""
    token_rms: Tensor
    """(B,) root mean square of the patch tokens, without a gradient: what the noise is to be compared with."""


class OpenVision3(Contrasting):
    """Vision tower on latents, text tower, caption decoder, reconstruction decoder, learned temperature."""

    vision: LatentVisionTransformer  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: OpenVision3Config) -> None:
        super().__init__()
        self.config = config
        self.vision = LatentVisionTransformer(config.vision, config.embed_dim)
        self.text = build_text(config.text, config.embed_dim)
        self.decoder = AutoregressiveCaptionDecoder(config.decoder, config.vision.width)
        self.reconstruction = ReconstructionDecoder(config.reconstruction, config.vision)
        self.add_contrast(config)

    def forward(
        self,
        images: Tensor,
        *texts: Tensor,
        input_ids: Tensor,
        noise: Tensor | None = None,
        caption_lengths: Lengths | None = None,
        text_lengths: Lengths | None = None,
    ) -> OpenVision3Output:
        """Encode images (B, 3, H, W) and K texts each, ids (B, context_length), caption and reconstruct.

        `input_ids` int64 (B, T), [bos] first, are the caption as the decoder reads it. `noise` (B, N, D) is added to
        the tokens that are reconstructed, multiplied by their root mean square if the configuration says so. Given
        `caption_lengths` and `text_lengths`, as of `OpenVision.forward`.
        """
        latents = self.vision.inputs(images)
        vision = self.vision.forward_features(latents)
        tokens = vision.patch_tokens
        text = self.text.forward_features(torch.cat(texts), 0, text_lengths)
        rms = full_precision(tokens.detach()).square().mean(dim=(1, 2)).sqrt()
        noisy = full_precision(tokens)
        if noise is not None:
            noisy = noisy + noise * (rms[:, None, None] if self.config.reconstruction.noise_relative else 1.0)
        states = states_by_length(
            caption_lengths,
            input_ids.shape[1],
            lambda rows, reach: self.decoder(tokens[rows], input_ids[rows, :reach]),
            images.device,
        )
        return OpenVision3Output(
            image_embeds=unit(self.vision.project(vision.pooled)),
            text_embeds=unit(self.text.project(text.pooled)).unflatten(0, (len(texts), len(images))),
            caption_states=states,
            scale=self.logit_scale.exp(),
            latents=latents,
            predicted=self.reconstruction(noisy, vision.grid),
            token_rms=rms,
        )

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8 or floats in [-1, 1] -> images float32 (B, 3, H, W), about [-1, 1]; no noise."""
        features = self.vision.forward_features(images)
        return self.decode_tokens(features.patch_tokens, features.grid)

    def decode_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens (B, N, D) of a grid -> images float32 (B, 3, H, W), about [-1, 1]."""
        return self.vision.autoencoder(tokens.device).decode(self.reconstruction(tokens, grid))

    def caption_logits(self, images: Tensor, input_ids: Tensor) -> Tensor:
        """Images (B, 3, H, W) and ids (B, T), [bos] first -> logits (B, T, V), float32."""
        return self.decoder.logits(self.decoder(self.vision.patch_tokens(images), input_ids))

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        bos_id: int,
        eos_id: int,
        max_length: int | None = None,
        sampler: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Caption images (B, 3, H, W) -> ids int64 (B, L), as `AutoregressiveCaptionDecoder.generate`."""
        return self.decoder.generate(self.vision.patch_tokens(images), bos_id, eos_id, max_length, sampler)
