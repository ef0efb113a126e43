"""Generate answers with a LLaVA model: in batches, as a stream of text, or in a conversation about an image."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TypedDict

import torch
from PIL import Image
from torch import Tensor

from openvision.errors import OpenVisionError
from openvision.images.decode import to_rgb_image
from openvision.images.native import NativeShapes
from openvision.multimodal.data.conversation import Turn, messages_of
from openvision.multimodal.model.geometry import Geometry, check_processor
from openvision.multimodal.model.huggingface import Llava, Processor, Tokenizer, quiet, transformers
from openvision.multimodal.model.llm import IMAGE_TOKEN, render
from openvision.multimodal.model.native import expand_images, pad_images, prepare_or_refuse, row_break
from openvision.multimodal.model.own_tower import register
from openvision.runtime import Processes, describe_memory, explain_out_of_memory, resolve_device
from openvision.weights.hub import is_path


@dataclass(frozen=True)
class Prompt:
    """A question about images, perhaps after earlier turns; the images belong to the first question."""

    text: str
    images: Sequence[Image.Image] = ()
    history: Sequence[Turn] = ()
    """Earlier turns, oldest first, without image tokens."""
    system: str | None = None


class GenerationSettings(TypedDict, total=False):
    """Keyword arguments of `generate`."""

    max_new_tokens: int
    do_sample: bool
    temperature: float


@dataclass(frozen=True)
class Decoding:
    """Length and sampling of answers."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 is greedy."""
    batch_size: int = 8

    def settings(self) -> GenerationSettings:
        """Keyword arguments of `generate`."""
        if self.temperature > 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": True, "temperature": self.temperature}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": False}


@dataclass
class Assistant:
    """A model and its processor."""

    model: Llava
    processor: Processor
    geometry: Geometry
    folder: str = ""

    def answer(self, prompts: Sequence[Prompt], decoding: Decoding | None = None) -> list[str]:
        """Answers in the order of the prompts, without special tokens and surrounding whitespace."""
        decoding = decoding or Decoding()
        # Prompts of similar length share a batch.
        texts = [render_prompt(prompt, self.processor.tokenizer) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index].images), len(texts[index])))
        answers = [""] * len(prompts)
        for start in range(0, len(order), decoding.batch_size):
            chosen = order[start : start + decoding.batch_size]
            inputs = self.prepare([prompts[index] for index in chosen])
            with torch.inference_mode(), explain_out_of_memory(partial(self._no_room, len(chosen))):
                ids = self.model.generate(**inputs, **decoding.settings())
            generated = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, text in zip(chosen, generated, strict=True):
                answers[index] = text.strip()
        return answers

    def _no_room(self, prompts: int) -> str:
        memory = describe_memory(self.model.device)
        return f"out of memory on {memory} with {prompts} prompts at a time; use a smaller --batch-size"

    def stream(self, prompt: Prompt, decoding: Decoding | None = None) -> Iterator[str]:
        """The answer piece by piece, as it is generated."""
        decoding = decoding or Decoding()
        inputs = self.prepare([prompt])
        streamer = transformers().TextIteratorStreamer(
            self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        failures: list[BaseException] = []

        def write() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(**inputs, **decoding.settings(), streamer=streamer)
            except BaseException as error:  # raised in the reader, which would otherwise wait for ever
                failures.append(error)
                streamer.end()

        writer = Thread(target=write, daemon=True)
        writer.start()
        yield from streamer
        writer.join()
        if failures:
            raise failures[0]

    def prepare(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Inputs of `generate` on the model's device, padded on the left."""
        if self.geometry.native is not None:
            return self._prepare_native(prompts, self.geometry.native)
        images = [[to_rgb_image(image) for image in prompt.images] for prompt in prompts]
        self.processor.tokenizer.padding_side = "left"
        prepared = self.processor(
            text=[render_prompt(prompt, self.processor.tokenizer) for prompt in prompts],
            # A batch of text alone takes no images; a mixed batch takes empty lists.
            images=images if any(images) else None,
            padding=True,
            add_special_tokens=False,
            return_tensors="pt",
        )
        return dict(prepared.to(self.model.device, self.model.dtype))

    def _prepare_native(self, prompts: Sequence[Prompt], shapes: NativeShapes) -> dict[str, Tensor]:
        """The same for images that keep their aspect; raises OpenVisionError for an image of an extreme one."""
        tokenizer, image_token = self.processor.tokenizer, self.processor.image_token_id
        given = [to_rgb_image(image) for prompt in prompts for image in prompt.images]
        images = [prepare_or_refuse(image, shapes, self.processor.image_processor) for image in given]
        end_of_row = row_break(tokenizer)
        ids_of = (self.geometry.image_ids(image.height, image.width, image_token, end_of_row) for image in given)
        rows = [
            expand_images(
                tokenizer(render_prompt(prompt, tokenizer), add_special_tokens=False)["input_ids"], image_token, ids_of
            )
            for prompt in prompts
        ]
        length = max(map(len, rows))
        ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        device = self.model.device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if images:
            inputs["pixel_values"] = pad_images(images).to(device, self.model.dtype)
            inputs["image_sizes"] = torch.tensor([image.shape[1:] for image in images])
        return inputs


def load_assistant(folder: str | Path, device: str | torch.device | None = None, dtype: str = "auto") -> Assistant:
    """Load a folder written by `openvision vlm build` or `train`, or any stock LLaVA folder.

    `device` is by default the accelerator of this process, or the CPU; `dtype` "auto" is that of the saved weights.
    Raises OpenVisionError when the folder holds no such model or its processor prepares images for another encoder.
    """
    if not Path(folder).is_dir() and is_path(folder):
        raise OpenVisionError(f"checkpoint {folder} does not exist; build one with `openvision vlm build`")
    register()
    try:
        with quiet():
            model = transformers().AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
            processor = transformers().AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise OpenVisionError(
            f"{folder} holds no LLaVA model ({str(error).splitlines()[0]}); build one with `openvision vlm build`"
        ) from error
    if model.config.model_type not in ("llava", "llava_next"):
        raise OpenVisionError(
            f"{folder} holds a {model.config.model_type} model, not llava or llava_next; build one with "
            "`openvision vlm build`"
        )
    geometry = check_processor(processor, model.config, folder)
    if device is None:
        processes = Processes.current()
        device = processes.device if processes.size > 1 else resolve_device()
    return Assistant(model.to(device), processor, geometry, str(folder))


def render_prompt(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """The prompt by the tokenizer's chat template, with one `<image>` for each image before the first question.

    Raises OpenVisionError when the text contains `<image>` itself.
    """
    if any(IMAGE_TOKEN in text for text in (prompt.text, *(turn.text for turn in prompt.history))):
        raise OpenVisionError(f"the text contains {IMAGE_TOKEN}, which is reserved for images; remove it")
    turns = [*prompt.history, Turn("user", prompt.text)]
    marks = f"{IMAGE_TOKEN}\n" * len(prompt.images)
    first = next(index for index, turn in enumerate(turns) if turn.role == "user")
    turns[first] = Turn("user", marks + turns[first].text)
    if prompt.system is not None:
        turns.insert(0, Turn("system", prompt.system))
    return render(tokenizer, messages_of(turns), prompt=True)


Write = Callable[[str], None]


def converse(
    assistant: Assistant, image: Image.Image, questions: Iterable[str], decoding: Decoding, write: Write
) -> list[Turn]:
    """Answer questions about one image in turn, each with the conversation before it; return the conversation.

    `write` gets the pieces of every answer as they are generated. An empty question is skipped; "/new" starts a new
    conversation.
    """
    turns: list[Turn] = []
    for text in questions:
        text = text.strip()
        if not text:
            continue
        if text == "/new":
            turns = []
            write("(new conversation about the same image)\n")
            continue
        pieces = []
        for piece in assistant.stream(Prompt(text, (image,), tuple(turns)), decoding):
            pieces.append(piece)
            write(piece)
        write("\n")
        turns += [Turn("user", text), Turn("assistant", "".join(pieces).strip())]
    return turns
