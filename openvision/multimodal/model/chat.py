"""A conversation about a picture in the terminal, or one question and its answer."""

from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from openvision.multimodal.data.conversation import Turn
from openvision.multimodal.data.images import ImageFile
from openvision.multimodal.model.generate import Assistant, Decoding, Question

Write = Callable[[str], None]


def open_picture(path: Path) -> Image.Image:
    """The picture in RGB; raises OpenVisionError when it cannot be read."""
    return ImageFile(path).open()


def say_answer(assistant: Assistant, question: Question, decoding: Decoding, write: Write) -> str:
    """Write the answer as it comes, a line end behind it; returns it whole."""
    pieces = []
    for piece in assistant.stream(question, decoding):
        pieces.append(piece)
        write(piece)
    write("\n")
    return "".join(pieces).strip()


def converse(
    assistant: Assistant, image: Image.Image, questions: Iterable[str], decoding: Decoding, write: Write
) -> list[Turn]:
    """Answer questions one after the other, each with all that was said before; returns the conversation.

    An empty question is passed over; "/new" forgets what was said.
    """
    turns: list[Turn] = []
    for text in questions:
        text = text.strip()
        if not text:
            continue
        if text == "/new":
            turns = []
            write("(a new conversation about the same picture)\n")
            continue
        answer = say_answer(assistant, Question(text, (image,), tuple(turns)), decoding, write)
        turns += [Turn("user", text), Turn("assistant", answer)]
    return turns
