"""OpenVision 2: a vision tower trained by captioning only (spec section 9).

No text tower, no contrastive loss, no temperature. In training the decoder reads a random 35 % of the patch tokens,
otherwise all of them; the tower always encodes the whole image.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from openvision.files import JsonObject
from openvision.models.decoders.autoregressive import AutoregressiveCaptionDecoder, AutoregressiveDecoderConfig
from openvision.models.decoders.lengths import Lengths, states_by_length
from openvision.models.genlip import GenLip, GenLipConfig
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.openvision3 import OpenVision3, OpenVision3Config
from openvision.models.vision import VisionConfig, VisionTransformer

KIND = "openvision2"


@dataclass(frozen=True)
class OpenVision2Config:
    """Shape of a whole model and the share of patch tokens its decoder reads in training."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    text: ClassVar[None] = None
    """No text tower: what tells this shape from version 1's."""
    embed_dim: ClassVar[None] = None
    """No projection head, since there is no text to compare with."""

    vision: VisionConfig
    decoder: AutoregressiveDecoderConfig
    keep_ratio: float = 0.35
    """Share of the patch tokens that the decoder reads in training, drawn for each sample."""
    kind: Literal["openvision2"] = KIND
    """Distinguishes this model from version 1 in recipes and in `config.json`."""

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be above 0 and at most 1, not {self.keep_ratio}")
        if self.vision.pool != "mean":
            raise ValueError("vision.pool: OpenVision 2 trains no pooled vector; leave pool out")

    def patches_read(self, patches: int) -> int:
        """How many of `patches` tokens the decoder reads in training: int(patches * keep_ratio), at least 1."""
        return kept_patches(patches, self.keep_ratio)

    def to_dict(self) -> JsonObject:
        """Plain nested dictionary, as written to `config.json`."""
        return asdict(self) | {"vision": self.vision.to_dict()}

    @staticmethod
    def from_dict(data: JsonObject) -> "OpenVision2Config":
        """Inverse of `to_dict`; raises TypeError, KeyError or ValueError on what does not fit."""
        rest = {key: value for key, value in data.items() if key not in ("vision", "decoder")}
        return OpenVision2Config(
            vision=VisionConfig(**data["vision"]), decoder=AutoregressiveDecoderConfig(**data["decoder"]), **rest
        )


ModelConfig = OpenVisionConfig | OpenVision2Config | OpenVision3Config | GenLipConfig


def build_model(config: ModelConfig) -> "AnyModel":
    """The model of a configuration."""
    if isinstance(config, OpenVision3Config):
        return OpenVision3(config)
    if isinstance(config, GenLipConfig):
        return GenLip(config)
    return OpenVision(config) if config.text is not None else OpenVision2(config)


class OpenVision2(nn.Module):
    """Vision tower without head, and an autoregressive caption decoder."""

    text: None = None
    """No text tower: what tells this model from version 1."""

    def __init__(self, config: OpenVision2Config) -> None:
        super().__init__()
        self.config = config
        # The tower keeps its final norm, which captioning never trains, so that it is the tower of version 1.
        self.vision = VisionTransformer(config.vision, None)
        self.decoder = AutoregressiveCaptionDecoder(config.decoder, config.vision.width)

    def untrained_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that no loss of this model reaches: the final norm, since captions never read the pooled token."""
        return self.vision.fc_norm.parameters()

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        keep: Tensor | None = None,
        caption_lengths: Lengths | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) and caption ids int64 (B, T), [bos] first -> decoder states (B, T, D).

        State i predicts id i + 1: give them to `objectives.caption.caption_loss` with `decoder.head.weight`.
        `keep`, int64 (B, K), are the patches the decoder reads (`random_patches`); None reads all, as at evaluation.
        Given `caption_lengths`, states past the end of a caption may be zeros.
        """
        tokens = self.vision.patch_tokens(images, keep)
        return states_by_length(
            caption_lengths,
            input_ids.shape[1],
            lambda rows, reach: self.decoder(tokens[rows], input_ids[rows, :reach]),
            images.device,
        )

    def caption_logits(self, images: Tensor, input_ids: Tensor) -> Tensor:
        """Images (B, 3, H, W) and ids (B, T), [bos] first -> logits (B, T, V), float32; all patches are read."""
        return self.decoder.logits(self(images, input_ids))

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


AnyModel = OpenVision | OpenVision2 | OpenVision3 | GenLip


def kept_patches(patches: int, ratio: float) -> int:
    """int(patches * ratio), at least 1: 12 of 36 and 89 of 256 at 0.35."""
    return max(1, int(patches * ratio))


def random_patches(positions: NDArray[np.int64] | Tensor, patches: int, ratio: float, seed: int) -> Tensor:
    """Which patches the decoder reads of each sample: int64 (B, K), each row ascending, without repetition.

    `positions` int64 (B,) are the samples' places in the stream. A row is a function of (seed, position) alone: the
    same at every world size, batch size and restart. Ascending, because the chosen patches are a set: only a causal
    `image_attention` would see their order, and then reading order is the sensible one.
    """
    with np.errstate(over="ignore"):
        rows = _mix(np.asarray(positions).astype(np.uint64) + _mix(np.array(seed, dtype=np.uint64)))[:, None]
        keys = _mix(rows + np.arange(patches, dtype=np.uint64))
    chosen = np.argsort(keys, axis=1, kind="stable")[:, : kept_patches(patches, ratio)]
    return torch.from_numpy(np.sort(chosen, axis=1))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function on uint64: neighbouring counters become unrelated numbers."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
