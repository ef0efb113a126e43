"""What models that contrast images with texts share: two towers, and the learned numbers of the loss.

The numbers are a logit scale, where asked for one for each text, and a bias. They belong to the model: a file that has
them says by how much its cosines are to be multiplied. Which there are follows from the loss of a recipe
(docs/beyond.md); without an option there is the one logit scale of the paper.
"""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from openvision.models.decoders.lengths import Lengths
from openvision.models.layers import unit
from openvision.models.text import TextTransformer
from openvision.models.vision import VisionTransformer

SOFTMAX_SCALE = math.log(1 / 0.07)
"""Initial logarithm of the logit scale (spec section 2)."""
SIGMOID_SCALE, SIGMOID_BIAS = math.log(10), -10.0
"""Initial values for the sigmoid loss (SigLIP, arXiv 2303.15343, section 3.2)."""
OPTIONS = ("logit_bias", "logit_scale_sentence")
"""Attributes of a configuration, and names of the parameters they switch on."""


class ContrastConfig(Protocol):
    """The part of a model's configuration that says which of the numbers there are."""

    @property
    def logit_bias(self) -> bool:
        """Whether logits have a bias, as the sigmoid loss needs one."""
        ...

    @property
    def logit_scale_sentence(self) -> bool:
        """Whether sentences have a logit scale of their own."""
        ...


class Contrasting(nn.Module):
    """Base of the models that contrast images with texts: two towers with heads."""

    vision: VisionTransformer
    text: TextTransformer
    logit_scale: nn.Parameter
    """Logarithm of the factor on cosines, shape (); of those with alt-texts alone if sentences have their own."""
    logit_scale_sentence: nn.Parameter | None
    """The same for synthetic sentences; None where they share that of the alt-texts."""
    logit_bias: nn.Parameter | None
    """What is added to the scaled cosines, shape (); None with the softmax loss, which it would not change."""

    def add_contrast(self, config: ContrastConfig) -> None:
        """Register the parameters, initialised unless on the meta device."""
        self.logit_scale = nn.Parameter(torch.empty(()))
        for name in OPTIONS:
            self.register_parameter(name, nn.Parameter(torch.empty(())) if getattr(config, name) else None)
        if not self.logit_scale.is_meta:
            self.init_temperature()

    def init_temperature(self) -> None:
        """Set the temperature to 0.07, or both numbers to SigLIP's; the towers initialise themselves."""
        scale = SOFTMAX_SCALE if self.logit_bias is None else SIGMOID_SCALE
        nn.init.constant_(self.logit_scale, scale)
        if self.logit_scale_sentence is not None:
            nn.init.constant_(self.logit_scale_sentence, scale)
        if self.logit_bias is not None:
            nn.init.constant_(self.logit_bias, SIGMOID_BIAS)

    def log_scale(self, text: str) -> nn.Parameter:
        """Logarithm of the logit scale of a kind of text, "alt" or "sentence"."""
        if text == "sentence" and self.logit_scale_sentence is not None:
            return self.logit_scale_sentence
        return self.logit_scale

    def untrained_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that no loss of this model reaches: none."""
        return iter(())

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8 or normalised floats -> unit vectors (B, E), float32."""
        return self.vision.encode_image(images)

    def encode_text(self, ids: Tensor, lengths: Lengths | None = None) -> Tensor:
        """Ids (B, context_length) -> unit vectors (B, E), float32; with `lengths` without padding beyond need."""
        if lengths is None:
            return unit(self.text(ids))
        return unit(self.text.project(self.text.forward_features(ids, 0, lengths).pooled))
