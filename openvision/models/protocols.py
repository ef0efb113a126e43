"""What the rest of the package may ask of a model: to contrast images with texts, or to caption images.

Training, evaluation, planning and export are written against these protocols. The two kinds differ in one attribute: a
contrastive model has a text tower, a captioning model has none. `model.text is None` tells them apart, at run time and
to the type checker, and so does `config.text is None` of their configurations:

    contrastive     `OpenVision` (version 1, and plain CLIP when `decoder` is None)
    captioning      `OpenVision2`, and `GenLip`, whose captions go through the vision tower
    both            `OpenVision3`, which has a text tower and captions token by token

A module that wraps a model (to split a batch over processes, for example) is one too when it has these members.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeGuard

from torch import Tensor, nn

from openvision.models.decoders.autoregressive import AutoregressiveCaptionDecoder
from openvision.models.decoders.lengths import Lengths
from openvision.models.decoders.parallel import ParallelCaptionDecoder
from openvision.models.genlip import GenLipConfig, LanguageEnds
from openvision.models.openvision import OpenVisionConfig, OpenVisionOutput
from openvision.models.openvision2 import OpenVision2Config
from openvision.models.openvision3 import OpenVision3
from openvision.models.text import TextTransformer
from openvision.models.vision import VisionTransformer


class Module(Protocol):
    """The part of `nn.Module` that inference needs."""

    training: bool

    def train(self, mode: bool = True) -> object:
        """Set training mode, or evaluation mode for False."""
        ...

    def eval(self) -> object:
        """Set evaluation mode."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""
        ...


class ImageEncoder(Module, Protocol):
    """Anything with an image embedding: a contrastive model, or a vision tower with a projection head."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8 or normalised floats -> unit vectors (B, E), float32."""
        ...


class _Trained(Module, Protocol):
    @property
    def vision(self) -> VisionTransformer:
        """The vision tower."""
        ...

    def untrained_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that no loss of this model reaches; DDP must not wait for their gradients."""
        ...


class ContrastiveModel(ImageEncoder, _Trained, Protocol):
    """A model that contrasts images with texts, and captions from image and alt-text where it has a decoder."""

    @property
    def config(self) -> OpenVisionConfig:
        """Its shape."""
        ...

    @property
    def text(self) -> TextTransformer:
        """The text tower."""
        ...

    @property
    def decoder(self) -> ParallelCaptionDecoder | None:
        """The caption decoder; None for plain CLIP."""
        ...

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the factor on cosines, shape ()."""
        ...

    @property
    def logit_scale_sentence(self) -> Tensor | None:
        """The same for sentences, where they have their own."""
        ...

    @property
    def logit_bias(self) -> Tensor | None:
        """What is added to scaled cosines, shape (), where the loss is the sigmoid's."""
        ...

    def log_scale(self, text: str) -> Tensor:
        """Logarithm of the logit scale of a kind of text."""
        ...

    def encode_text(self, ids: Tensor, lengths: Lengths | None = None) -> Tensor:
        """Ids (B, context_length) -> unit vectors (B, E), float32; with `lengths` without padding beyond need."""
        ...

    def caption_logits(self, images: Tensor, alt_ids: Tensor) -> Tensor:
        """Images (B, 3, H, W) and alt-text ids (B, context_length) -> logits (B, Q, V), float32."""
        ...

    def __call__(
        self,
        images: Tensor,
        *texts: Tensor,
        caption_lengths: Lengths | None = None,
        text_lengths: Lengths | None = None,
    ) -> OpenVisionOutput:
        """Embeddings and caption states of images (B, 3, H, W) with K texts each, ids (B, context_length)."""
        ...


class CaptioningModel(_Trained, Protocol):
    """A model that captions images token by token and has no text tower."""

    @property
    def config(self) -> OpenVision2Config | GenLipConfig:
        """Its shape."""
        ...

    @property
    def text(self) -> None:
        """No text tower."""
        ...

    @property
    def decoder(self) -> AutoregressiveCaptionDecoder | LanguageEnds:
        """The caption decoder, or what captions need beside the tower."""
        ...

    def caption_logits(self, images: Tensor, input_ids: Tensor) -> Tensor:
        """Images (B, 3, H, W) and ids (B, T), [bos] first -> logits (B, T, V), float32."""
        ...

    def generate(self, images: Tensor, bos_id: int, eos_id: int, max_length: int | None = None) -> Tensor:
        """Images (B, 3, H, W) -> caption ids int64 (B, L), without [bos]."""
        ...

    def __call__(
        self, images: Tensor, input_ids: Tensor, keep: Tensor | None = None, caption_lengths: Lengths | None = None
    ) -> Tensor:
        """Decoder states (B, T, D) of images (B, 3, H, W) and ids (B, T); the decoder reads the patches `keep`."""
        ...


Model = ContrastiveModel | CaptioningModel | OpenVision3


def writes_token_by_token(model: Model) -> "TypeGuard[CaptioningModel | OpenVision3]":
    """Whether the model captions an image from the image alone, token by token."""
    return isinstance(model.decoder, AutoregressiveCaptionDecoder | LanguageEnds)
