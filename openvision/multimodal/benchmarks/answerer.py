"""A model folder as what the runner asks."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from openvision.multimodal.benchmarks.runner import Answerer
from openvision.multimodal.model.generate import Assistant, Decoding, Question, load_assistant


def answerer_of(assistant: Assistant, blind: bool = False) -> Answerer:
    """Greedy answers of a loaded model; `blind` keeps the pictures from it and asks the text alone."""

    def answer(images: Sequence[Image.Image], prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        questions = [Question(prompt, () if blind else (image,)) for image, prompt in zip(images, prompts, strict=True)]
        return assistant.answer(questions, Decoding(max_new_tokens=max_new_tokens, batch_size=len(questions)))

    return answer


def load_answerer(model: str | Path, device: str | None = None, dtype: str = "auto", blind: bool = False) -> Answerer:
    """Load a LLaVA folder and ask it greedily."""
    return answerer_of(load_assistant(model, device, dtype), blind)
