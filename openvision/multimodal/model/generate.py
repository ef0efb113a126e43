"""A built or trained model that answers: batches of questions, greedy unless told otherwise, or a stream of text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from PIL import Image

from openvision.errors import OpenVisionError
from openvision.multimodal.data.conversation import Turn, messages_of
from openvision.multimodal.model.geometry import Geometry, check_processor
from openvision.multimodal.model.llm import IMAGE_TOKEN, render
from openvision.multimodal.model.stock import quiet, transformers


@dataclass(frozen=True)
class Question:
    """A question about pictures, perhaps after earlier turns; pictures belong to the first question."""

    text: str
    images: Sequence[Image.Image] = ()
    history: Sequence[Turn] = ()
    """Turns before this one, oldest first, without image tokens."""
    system: str | None = None


@dataclass(frozen=True)
class Decoding:
    """How answers are chosen."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 is greedy."""
    batch_size: int = 8

    def settings(self) -> dict[str, Any]:
        """As `generate` takes them."""
        if self.temperature > 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": True, "temperature": self.temperature}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": False}


@dataclass
class Assistant:
    """A model and its processor, ready to answer."""

    model: Any
    processor: Any
    geometry: Geometry
    folder: str = ""

    def answer(self, questions: Sequence[Question], decoding: Decoding | None = None) -> list[str]:
        """Answers in the order of the questions, without special tokens and surrounding space."""
        decoding = decoding or Decoding()
        # Prompts of like length share a batch; the order of answers is the questions'.
        prompts = [prompt_of(question, self.processor.tokenizer) for question in questions]
        order = sorted(range(len(questions)), key=lambda index: (len(questions[index].images), len(prompts[index])))
        answers = [""] * len(questions)
        for start in range(0, len(order), decoding.batch_size):
            chosen = order[start : start + decoding.batch_size]
            inputs = self.prepare([prompts[index] for index in chosen], [questions[index] for index in chosen])
            with torch.inference_mode():
                made = self.model.generate(**inputs, **decoding.settings())
            texts = self.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text.strip()
        return answers

    def stream(self, question: Question, decoding: Decoding | None = None) -> Iterator[str]:
        """The answer piece by piece, as it is written."""
        decoding = decoding or Decoding()
        inputs = self.prepare([prompt_of(question, self.processor.tokenizer)], [question])
        streamer = transformers().TextIteratorStreamer(
            self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        failures: list[BaseException] = []

        def write() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(**inputs, **decoding.settings(), streamer=streamer)
            except BaseException as error:  # told to the reader of the stream, which would wait for ever
                failures.append(error)
                streamer.end()

        writer = Thread(target=write, daemon=True)
        writer.start()
        yield from streamer
        writer.join()
        if failures:
            raise failures[0]

    def prepare(self, prompts: Sequence[str], questions: Sequence[Question]) -> dict[str, Any]:
        """Tensors on the model's device, padded on the left."""
        images = [[image.convert("RGB") for image in question.images] for question in questions]
        self.processor.tokenizer.padding_side = "left"
        prepared = self.processor(
            text=list(prompts),
            # Text alone must come without pictures, and a batch that mixes both with empty lists.
            images=images if any(images) else None,
            padding=True,
            add_special_tokens=False,
            return_tensors="pt",
        )
        return dict(prepared.to(self.model.device, self.model.dtype))


def load_assistant(folder: str | Path, device: str | torch.device | None = None, dtype: str = "auto") -> Assistant:
    """Load a folder written by `openvision vlm build` or `train`, or any stock LLaVA folder.

    `device` is the accelerator where there is one. Raises OpenVisionError when the folder holds no such model or its
    processor prepares for another encoder.
    """
    try:
        with quiet():
            model = transformers().AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
            processor = transformers().AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise OpenVisionError(
            f"{folder} holds no model that reads pictures ({str(error).splitlines()[0]}); build one with "
            "`openvision vlm build`"
        ) from error
    if model.config.model_type not in ("llava", "llava_next"):
        raise OpenVisionError(f"{folder} holds a {model.config.model_type}; this works with llava and llava_next")
    geometry = check_processor(processor, model.config, folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Assistant(model.to(device), processor, geometry, str(folder))


def prompt_of(question: Question, tokenizer: Any) -> str:
    """The question as the chat template writes it, one `<image>` a picture at the start of the first question."""
    if any(IMAGE_TOKEN in text for text in (question.text, *(turn.text for turn in question.history))):
        raise OpenVisionError(f"the text holds {IMAGE_TOKEN}, which stands for a picture; write it otherwise")
    turns = [*question.history, Turn("user", question.text)]
    marks = f"{IMAGE_TOKEN}\n" * len(question.images)
    first = next(index for index, turn in enumerate(turns) if turn.role == "user")
    turns[first] = Turn("user", marks + turns[first].text)
    if question.system is not None:
        turns.insert(0, Turn("system", question.system))
    return render(tokenizer, messages_of(turns), prompt=True)
