"""Talk about an image with a multimodal model; a new image begins a new conversation."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from openvision.errors import OpenVisionError
from openvision.multimodal.data.conversation import Turn
from openvision.multimodal.data.images import ImageFile
from openvision.multimodal.model.generate import Assistant, Decoding, Prompt, load_assistant

_DECODING = Decoding(max_new_tokens=256, batch_size=1)


@dataclass(frozen=True)
class Conversation:
    """What was said about an image."""

    image: Path
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class DemoChat:
    """A loaded multimodal model and its name on the page."""

    name: str
    assistant: Assistant

    def ask(self, held: Conversation | None, image: Path, question: str) -> Iterator[Conversation]:
        """The conversation as the answer grows; a new one when the image is another than that of `held`.

        Raises OpenVisionError for an empty question and an image that cannot be read.
        """
        question = question.strip()
        if not question:
            raise OpenVisionError("the question is empty; ask something about the image")
        before = held.turns if held is not None and held.image == image else ()
        prompt = Prompt(question, (ImageFile(image).open(),), before)
        answer = ""
        for piece in self.assistant.stream(prompt, _DECODING):
            answer += piece
            yield Conversation(image, (*before, Turn("user", question), Turn("assistant", answer.strip())))
        # A model may answer nothing.
        yield Conversation(image, (*before, Turn("user", question), Turn("assistant", answer.strip())))


def load_chat(folder: Path, device: torch.device) -> DemoChat:
    """Load a folder that `openvision vlm build` or `train` wrote; raises OpenVisionError when it is none."""
    return DemoChat(folder.resolve().name, load_assistant(folder, device))
