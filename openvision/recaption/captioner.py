"""What a captioner is to the job, and the one that is a checkpoint of ours."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from openvision.images.decode import to_rgb_image
from openvision.inference.captioner import Captioner


@dataclass(frozen=True)
class Question:
    """One image to caption."""

    image: bytes
    """Encoded, readable."""
    extension: str
    prompt: str
    seed: int
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
    """An OpenVision 2 model: greedy, without a prompt."""

    samples = False

    def __init__(self, captioner: Captioner, source: str) -> None:
        self.captioner = captioner
        digest = hashlib.sha256()
        for tensor in captioner.model.state_dict().values():
            digest.update(tensor.float().cpu().numpy().tobytes())
        # Another checkpoint at the same path is another captioner.
        self.name = f"{source}, weights {digest.hexdigest()[:16]}"

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """n questions -> n captions, decoded as one batch; prompts and seeds are not read."""
        images = [to_rgb_image(question.image) for question in questions]
        longest = self.captioner.model.config.decoder.caption_length
        texts = self.captioner.caption(images, batch_size=max(1, len(images)))
        return [Answer(text, len(self.captioner.tokenizer.tokens([text])[0]) >= longest) for text in texts]
