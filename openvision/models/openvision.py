"""OpenVision v1: both towers, the caption decoder and the temperature (spec section 0)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from openvision.files import JsonObject
from openvision.models.bounds import MAX_WIDTH, stored
from openvision.models.contrast import OPTIONS, Contrasting
from openvision.models.decoders.parallel import DecoderConfig, ParallelCaptionDecoder
from openvision.models.layers import unit
from openvision.models.text import TextConfig, TextTransformer
from openvision.models.vision import VisionConfig, VisionFeatures, VisionTransformer
from openvision.untrusted import check_count


@dataclass(frozen=True)
class OpenVisionConfig:
    """Shape of a whole model; `decoder` None is a plain two-tower model (CLIP)."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    embed_dim: int
    vision: VisionConfig
    text: TextConfig
    decoder: DecoderConfig | None = None
    logit_bias: bool = False
    """Whether logits have a bias; a recipe says so by `loss.kind`."""
    logit_scale_sentence: bool = False
    """Whether sentences have a logit scale of their own; a recipe says so by `loss.logit_scales`."""

    def __post_init__(self) -> None:
        check_count("embed_dim", self.embed_dim, 1, MAX_WIDTH)

    def patches_read(self, patches: int) -> int:
        """How many of `patches` tokens the decoder reads in training: all."""
        return patches

    def to_dict(self) -> JsonObject:
        """Plain nested dictionary, as written to `config.json`."""
        return stored(self, OPTIONS) | {"vision": self.vision.to_dict(), "text": self.text.to_dict()}

    @staticmethod
    def from_dict(data: JsonObject) -> "OpenVisionConfig":
        """Inverse of `to_dict`; raises TypeError or KeyError on an unknown or missing key."""
        rest = {key: value for key, value in data.items() if key not in ("vision", "text", "decoder")}
        decoder = data.get("decoder")
        return OpenVisionConfig(
            vision=VisionConfig(**data["vision"]),
            text=TextConfig(**data["text"]),
            decoder=DecoderConfig(**decoder) if decoder else None,
            **rest,
        )


@dataclass(frozen=True)
class OpenVisionOutput:
    """What a training step needs of B images with K texts each (K * B rows, texts of the same kind together)."""

    image_embeds: Tensor
    """(B, E) unit vectors, float32."""
    text_embeds: Tensor
    """(K, B, E) unit vectors, float32."""
    caption_states: Tensor | None
    """(B, Q, D) normalised decoder states, float32; None without a decoder."""
    scale: Tensor
    """exp(logit_scale), shape ()."""
    vision: VisionFeatures
    """What the vision tower computed: patch tokens and pooled vectors."""


class OpenVision(Contrasting):
    """Vision tower, text tower, caption decoder and a learned temperature."""

    def __init__(self, config: OpenVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision, config.embed_dim)
        self.text = TextTransformer(config.text, config.embed_dim)
        self.decoder = (
            ParallelCaptionDecoder(config.decoder, config.vision.width, config.text.width) if config.decoder else None
        )
        self.add_contrast(config)

    def forward(self, images: Tensor, *texts: Tensor, caption_lengths: Tensor | None = None) -> OpenVisionOutput:
        """Encode images (B, 3, H, W) and K texts each, ids (B, context_length).

        The first text is the alt-text: the decoder reads its tokens and no other's (spec section 3). Given
        `caption_lengths`, int64 (B,) on the CPU, states past the end of a caption may be zeros.
        """
        vision = self.vision.forward_features(images)
        text = self.text.forward_features(torch.cat(texts), token_rows=len(images) if self.decoder is not None else 0)
        states = None
        if self.decoder is not None:
            states = self.decoder(vision.patch_tokens, text.tokens, caption_lengths)
        return OpenVisionOutput(
            image_embeds=unit(self.vision.project(vision.pooled)),
            text_embeds=unit(self.text.project(text.pooled)).unflatten(0, (len(texts), len(images))),
            caption_states=states,
            scale=self.logit_scale.exp(),
            vision=vision,
        )

    def caption_logits(self, images: Tensor, alt_ids: Tensor) -> Tensor:
        """Images (B, 3, H, W) and alt-text ids (B, context_length) -> logits (B, Q, V), float32.

        Query i predicts caption token i + 1, the token after [bos] first.
        """
        if self.decoder is None:
            raise ValueError("this model has no caption decoder")
        image_tokens = self.vision.forward_features(images).patch_tokens
        return self.decoder.logits(self.decoder(image_tokens, self.text.forward_features(alt_ids).tokens))
