"""`Captioner`: an OpenVision 2 or 3 or GenLIP model that captions images.

import openvision
captioner = openvision.load_captioner("runs/mine/model")
captioner.caption(["cat.png"])
"""

from collections.abc import Iterable
from typing import Self

from torch import nn

from openvision.encoding import write_captions
from openvision.errors import OpenVisionError
from openvision.images.native import stacked_by_shape
from openvision.images.preprocess import Preprocessing, Size
from openvision.inference.vision import ImageInput, VisionEncoder
from openvision.models.genlip import GenLip
from openvision.models.openvision2 import OpenVision2
from openvision.models.openvision3 import OpenVision3
from openvision.text.tokenizer import Tokenizer
from openvision.weights.load import Checkpoint


class Captioner(VisionEncoder):
    """Images to captions, beside the features of the vision tower."""

    def __init__(
        self,
        model: OpenVision2 | OpenVision3 | GenLip,
        tokenizer: Tokenizer,
        resolution: Size | None = None,
        preprocessing: Preprocessing = "crop",
    ) -> None:
        """Use `model` at `resolution` pixels, by default its trained one."""
        super().__init__(model.vision, resolution, preprocessing)
        self.model = model.eval()
        self.tokenizer = tokenizer

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, resolution: Size | None = None, preprocessing: Preprocessing = "crop"
    ) -> Self:
        """Wrap a checkpoint; raises OpenVisionError when it holds no autoregressive decoder."""
        model = checkpoint.captioner or checkpoint.unified
        if model is None or checkpoint.tokenizer is None:
            raise OpenVisionError(
                f"{checkpoint.source} has no autoregressive caption decoder: the model folder of an OpenVision 2 or 3 "
                "or GenLIP run has one, the released checkpoints are vision towers only"
            )
        captioner = cls(model, checkpoint.tokenizer, resolution, preprocessing)
        captioner.source = checkpoint.source
        return captioner

    def _module(self) -> nn.Module:
        return self.model

    def caption(self, images: Iterable[ImageInput], max_length: int | None = None, batch_size: int = 64) -> list[str]:
        """n images, natively of any shapes -> n captions of at most `max_length` tokens, decoded greedily."""
        if max_length is not None and max_length < 1:
            raise OpenVisionError(f"max_length is {max_length}; it must be at least 1 token")
        prepared = self._prepared(images)
        captions = [""] * len(prepared)
        for rows, alike in stacked_by_shape(prepared):
            texts = write_captions(self.model, self.tokenizer, alike, batch_size, max_length)
            for row, text in zip(rows, texts, strict=True):
                captions[row] = text
        return captions
