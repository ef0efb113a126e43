"""What a captioner is to the job, and the captioners that are checkpoints of ours."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from openvision.encoding import generate_captions, require_decoder
from openvision.images.decode import to_rgb_image
from openvision.inference.captioner import Captioner
from openvision.inference.encoder import Encoder
from openvision.models.openvision import OpenVision
from openvision.weights.load import load_checkpoint


@dataclass(frozen=True)
class Question:
    """One image to caption."""

    image: bytes
    """Encoded, readable."""
    extension: str
    prompt: str
    seed: int
    alt: str = ""
    retry: bool = False
    """Whether the first caption was bad: a captioner that was greedy samples now."""


@dataclass(frozen=True)
class Answer:
    """A caption, empty where there is a `fault`."""

    text: str
    cut: bool = False
    """Whether it ended at the longest length."""
    fault: str | None = None
    """Why the captioner gave none."""


class AnyCaptioner(Protocol):
    """Answers questions in their order; raises OpenVisionError when it cannot go on."""

    @property
    def name(self) -> str:
        """What the manifest says about the origin of the captions."""
        ...

    @property
    def samples(self) -> bool:
        """Whether another seed can give another caption."""
        ...

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """n questions -> n answers."""
        ...


class DecoderCaptioner:
    """A caption decoder of ours, greedy: OpenVision 2 and 3 read the image, version 1 the alt-text as well."""

    samples = False

    def __init__(self, model: Captioner | Encoder, source: str) -> None:
        """Use `model`; raises OpenVisionError for an encoder without a decoder."""
        self.model = model
        self._longest = (
            model.model.config.decoder.caption_length if isinstance(model, Captioner) else require_decoder(model.model)
        )
        digest = hashlib.sha256()
        for tensor in model.model.state_dict().values():
            digest.update(tensor.float().cpu().numpy().tobytes())
        # Another checkpoint at the same path is another captioner.
        self.name = f"{source}, weights {digest.hexdigest()[:16]}"

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """n questions -> n captions, decoded as one batch; prompts and seeds are not read."""
        images = [to_rgb_image(question.image) for question in questions]
        if isinstance(self.model, Captioner):
            texts = self.model.caption(images, batch_size=max(1, len(images)))
            return [Answer(text, len(self.model.tokenizer.tokens([text])[0]) >= self._longest) for text in texts]
        alts = [question.alt for question in questions]
        prepared = self.model.prepare_all(images)
        # Every place is written at once, so that none of these captions ends for want of room.
        # A captioner of any other kind writes token by token.
        model = cast(OpenVision, self.model.model)
        return [Answer(text) for text in generate_captions(model, self.model.tokenizer, prepared, alts)]


def load_decoder(source: str, device: torch.device) -> DecoderCaptioner:
    """The captioner of any source of a model; raises OpenVisionError when it has no caption decoder."""
    checkpoint = load_checkpoint(source)
    kind = Encoder if checkpoint.captioner is None and checkpoint.unified is None else Captioner
    return DecoderCaptioner(kind.from_checkpoint(checkpoint).to(device), source)
