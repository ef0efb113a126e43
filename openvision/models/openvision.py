"""OpenVision v1: both towers, the caption decoder and the temperature (spec section 0)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openvision.files import JsonObject
from openvision.models.bounds import MAX_WIDTH, stored
from openvision.models.contrast import OPTIONS, Contrasting
from openvision.models.decoders.lengths import Lengths
from openvision.models.decoders.parallel import DecoderConfig, ParallelCaptionDecoder
from openvision.models.layers import unit
from openvision.models.text import TextConfig, TextFeatures, build_text
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
        if self.decoder is not None and not self.decoder.reads_padding and self.text.pad_id is None:
            raise ValueError("decoder.reads_padding false needs text.pad_id, 0 in vocabularies of this project")

    def patches_read(self, patches: int) -> int:
        """How many of `patches` tokens the decoder reads in training: all."""
        return patches

    def to_dict(self) -> JsonObject:
        """Plain nested dictionary, as written to `config.json`."""
        decoder = self.decoder.to_dict() if self.decoder else None
        towers = {"vision": self.vision.to_dict(), "text": self.text.to_dict(), "decoder": decoder}
        return stored(self, OPTIONS) | towers

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
        self.text = build_text(config.text, config.embed_dim)
        self.decoder = (
            ParallelCaptionDecoder(config.decoder, config.vision.width, config.text.width) if config.decoder else None
        )
        self.add_contrast(config)

    def forward(
        self,
        images: Tensor,
        *texts: Tensor,
        caption_lengths: Lengths | None = None,
        text_lengths: Lengths | None = None,
    ) -> OpenVisionOutput:
        """Encode images (B, 3, H, W) and K texts each, ids (B, context_length).

        The first text is the alt-text: the decoder reads its tokens and no other's (spec section 3). Given
        `caption_lengths`, states past the end of a caption may be zeros. Given `text_lengths`, those of all texts one
        after the other, (K * B,), padding that nobody reads is not computed.
        """
        vision = self.vision.forward_features(images)
        text = self._encode_texts(texts, text_lengths)
        states = None
        if self.decoder is not None:
            states = self.decoder(vision.patch_tokens, text.tokens, caption_lengths, self._seen(texts[0], text))
        return OpenVisionOutput(
            image_embeds=unit(self.vision.project(vision.pooled)),
            text_embeds=unit(self.text.project(text.pooled)).unflatten(0, (len(texts), len(images))),
            caption_states=states,
            scale=self.logit_scale.exp(),
            vision=vision,
        )

    def _encode_texts(self, texts: tuple[Tensor, ...], lengths: Lengths | None) -> TextFeatures:
        """Pooled vectors of K texts of B images, and tokens of the first where there is a decoder."""
        read = len(texts[0]) if self.decoder is not None else 0
        if lengths is None or self.decoder is None or not self.decoder.config.reads_padding:
            return self.text.forward_features(torch.cat(texts), read, lengths)
        # The decoder reads the alt-texts to the last padding.
        alt = self.text.forward_features(texts[0])
        if len(texts) == 1:
            return alt
        others = self.text.forward_features(torch.cat(texts[1:]), 0, lengths[read:])
        return replace(alt, pooled=torch.cat([alt.pooled, others.pooled]))

    def _seen(self, alt_ids: Tensor, text: TextFeatures) -> Tensor | None:
        """Which of the alt-texts' tokens the decoder reads, bool (B, T); None is all."""
        mask = self.text.mask(alt_ids)
        if mask is None or self.decoder is None or self.decoder.config.reads_padding:
            return None
        return mask[:, : text.tokens.shape[1]]

    def caption_logits(self, images: Tensor, alt_ids: Tensor) -> Tensor:
        """Images (B, 3, H, W) and alt-text ids (B, context_length) -> logits (B, Q, V), float32.

        Query i predicts caption token i + 1, the token after [bos] first.
        """
        if self.decoder is None:
            raise ValueError("this model has no caption decoder")
        image_tokens = self.vision.forward_features(images).patch_tokens
        text = self.text.forward_features(alt_ids)
        return self.decoder.logits(self.decoder(image_tokens, text.tokens, text_seen=self._seen(alt_ids, text)))
