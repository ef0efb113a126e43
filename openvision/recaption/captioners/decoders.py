"""Checkpoints of ours as captioners: OpenVision 2 and 3 read the image, version 1 the alt-text as well."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import cast

import torch
from torch import Tensor

from openvision.encoding import batch_memory, evaluating, generate_captions, require_decoder
from openvision.images.decode import to_rgb_image
from openvision.images.native import stacked_by_shape
from openvision.images.preprocess import Preprocessing
from openvision.inference.captioner import Captioner
from openvision.inference.encoder import Encoder
from openvision.inference.vision import UnreadableImageError
from openvision.models.openvision import OpenVision
from openvision.recaption.captioners.captioner import EXTREME_ASPECT, Answer, Question, Sampling, in_batches
from openvision.recaption.captioners.sampling import Sampler
from openvision.runtime import send
from openvision.weights.load import load_checkpoint


class DecoderCaptioner:
    """A caption decoder of ours; prompts are not read."""

    shards_at_once = 1

    def __init__(self, model: Captioner | Encoder, source: str, sampling: Sampling, batch_size: int = 32) -> None:
        """Use `model`; raises OpenVisionError for an encoder without a decoder."""
        self.model, self.sampling, self.batch_size = model, sampling, batch_size
        self.can_retry = isinstance(model, Captioner)
        self.varies = self.can_retry and sampling.temperature > 0
        if isinstance(model, Encoder):
            require_decoder(model.model)
        digest = hashlib.sha256()
        for tensor in model.model.state_dict().values():
            digest.update(tensor.float().cpu().numpy().tobytes())
        # Another checkpoint at the same path is another captioner.
        self.name = f"{source}, weights {digest.hexdigest()[:16]}"
        if self.can_retry:
            self.name += f", {sampling}"
        if model.preprocessing == "native":
            self.name += ", native shapes"

    def answers(self, questions: Iterable[Question | None]) -> Iterator[tuple[Question, Answer]]:
        """Captions, a batch at a time."""
        return in_batches(self, questions)

    def caption(self, questions: Sequence[Question], sampling: Sampling) -> list[Answer]:
        """One batch, each native shape by itself; OpenVision 1 reads no `sampling`.

        What is beyond the largest bucket, or too elongated to crop, gets no caption.
        """
        answers = [Answer("", fault=EXTREME_ASPECT)] * len(questions)
        prepared: dict[int, Tensor] = {}
        for row, question in enumerate(questions):
            # The bytes are readable: what is refused here is a shape.
            with suppress(UnreadableImageError):
                prepared[row] = self.model.preprocess(to_rgb_image(question.image))
        readable = list(prepared)
        for found, alike in stacked_by_shape(list(prepared.values())):
            rows = [readable[place] for place in found]
            for row, answer in zip(rows, self._answers(alike, [questions[row] for row in rows], sampling), strict=True):
                answers[row] = answer
        return answers

    def _answers(self, prepared: Tensor, questions: Sequence[Question], sampling: Sampling) -> list[Answer]:
        """Answers for images (n, 3, height, width) of one shape."""
        if isinstance(self.model, Captioner):
            return self._generate(self.model, prepared, questions, sampling)
        alts = [question.alt for question in questions]
        # A captioner of any other kind writes token by token.
        model = cast(OpenVision, self.model.model)
        # Every place is written at once, so that none of these captions ends for want of room.
        return [Answer(text) for text in generate_captions(model, self.model.tokenizer, prepared, alts)]

    def _generate(
        self, captioner: Captioner, images: Tensor, questions: Sequence[Question], sampling: Sampling
    ) -> list[Answer]:
        model, tokenizer = captioner.model, captioner.tokenizer
        temperatures = [sampling.temperature_of(question) for question in questions]
        sampler = None
        if any(temperatures):
            seeds = [question.seed for question in questions]
            sampler = Sampler(seeds, temperatures, sampling.top_k)
        size = (images.shape[2], images.shape[3])
        with evaluating(model) as device, batch_memory(device, len(images), size):
            ids = model.generate(send(images, device), tokenizer.bos_id, tokenizer.eos_id, sampling.max_tokens, sampler)
        answers = []
        for row in ids.cpu():
            # [eos] stands on every place behind the end.
            length = int((row != tokenizer.eos_id).sum())
            answers.append(
                Answer(tokenizer.decode(row.numpy()), length == len(row), tokens_written=min(length + 1, len(row)))
            )
        return answers


def load_decoder(
    source: str, device: torch.device, sampling: Sampling, batch_size: int, preprocessing: Preprocessing = "crop"
) -> DecoderCaptioner:
    """The captioner of any source of a model; raises OpenVisionError when it has no caption decoder."""
    checkpoint = load_checkpoint(source)
    kind = Encoder if checkpoint.captioner is None and checkpoint.unified is None else Captioner
    model = kind.from_checkpoint(checkpoint, preprocessing=preprocessing).to(device)
    return DecoderCaptioner(model, source, sampling, batch_size)
