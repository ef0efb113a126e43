"""Any image-text model of transformers as captioner, ours from `openvision vlm build` included.

`generate` keeps keys and values, decodes a batch at a time, and takes our sampler as a logits processor, so that each
caption depends on its own seed. No code of a model's author is run: the architecture must be part of transformers.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from openvision.errors import OpenVisionError, require
from openvision.images.decode import to_rgb_image
from openvision.multimodal.model.huggingface import quiet
from openvision.recaption.captioners.captioner import TOO_LONG, Answer, Question, Sampling, in_batches
from openvision.recaption.captioners.sampling import Sampler
from openvision.runtime import describe_memory, explain_out_of_memory
from openvision.untrusted import one_line
from openvision.weights.hub import is_path

PREFIX = "transformers:"
"""Before a folder or Hub id on the command line."""
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")


class _Processor(Protocol):
    """A processor of images and text, as far as it is used here."""

    chat_template: object
    tokenizer: Any
    apply_chat_template: Callable[..., str]
    batch_decode: Callable[..., list[str]]
    __call__: Callable[..., Any]


class ImageTextCaptioner:
    """A model and its processor."""

    can_retry = True
    shards_at_once = 1

    def __init__(self, model: Any, processor: _Processor, name: str, sampling: Sampling, batch_size: int = 32) -> None:
        """Use a model that `AutoModelForImageTextToText` loads; `name` says which one."""
        self.model, self.processor, self.sampling, self.batch_size = model, processor, sampling, batch_size
        self.name = f"{name}, {sampling}"
        self.varies = sampling.temperature > 0
        # Of an encoder-decoder, the prompt and the caption have a context each.
        text = model.config.get_text_config()
        self._context = None if model.config.is_encoder_decoder else getattr(text, "max_position_embeddings", None)
        # A batch ends at the same place: the first new token of every row.
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token_id is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def answers(self, questions: Iterable[Question | None]) -> Iterator[tuple[Question, Answer]]:
        """Captions, a batch at a time."""
        return in_batches(self, questions)

    def caption(self, questions: Sequence[Question], sampling: Sampling) -> list[Answer]:
        """One batch; what exceeds the context of the model gets no caption."""
        inputs = self._prepare(questions)
        read = inputs["attention_mask"].sum(dim=1).tolist() if "attention_mask" in inputs else [0] * len(questions)
        fits = [self._context is None or length + sampling.max_tokens <= self._context for length in read]
        if not all(fits):
            short = [question for question, is_short in zip(questions, fits, strict=True) if is_short]
            answers = iter(self.caption(short, sampling) if short else [])
            return [next(answers) if is_short else Answer("", fault=TOO_LONG) for is_short in fits]
        return self._generate(inputs, questions, sampling, read)

    def _generate(
        self, inputs: dict[str, Tensor], questions: Sequence[Question], sampling: Sampling, read: Sequence[int]
    ) -> list[Answer]:
        begin = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        temperatures = [sampling.temperature_of(question) for question in questions]
        processors = []
        if any(temperatures):
            sampler = Sampler([question.seed for question in questions], temperatures, sampling.top_k)
            processors.append(partial(_process, sampler))
        with torch.inference_mode(), explain_out_of_memory(partial(self._no_room, len(questions))):
            ids = self.model.generate(
                **inputs,
                max_new_tokens=sampling.max_tokens,
                # The sampler draws; taking the largest is left.
                do_sample=False,
                num_beams=1,
                use_cache=True,
                logits_processor=processors,
            )
        ends = self._end_ids()
        texts = self.processor.batch_decode(ids[:, begin:], skip_special_tokens=True)
        answers = []
        for text, row, tokens_read in zip(texts, ids[:, begin:].tolist(), read, strict=True):
            length = next((place for place, token in enumerate(row) if token in ends), None)
            written = len(row) if length is None else length + 1
            answers.append(Answer(text.strip(), length is None, None, int(tokens_read), written))
        return answers

    def _prepare(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        images = [to_rgb_image(question.image) for question in questions]
        prompts = [self._plain(question.prompt) for question in questions]
        arguments: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        if self.processor.chat_template:
            prompts = [self._chat(prompt) for prompt in prompts]
            inputs = self.processor(
                text=prompts, images=[[image] for image in images], add_special_tokens=False, **arguments
            )
        else:
            # Models from before chats, e.g. BLIP and GIT, go on writing where the prompt ends.
            inputs = self.processor(text=prompts, images=images, **arguments)
        return dict(inputs.to(self.model.device, self.model.dtype))

    def _chat(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _plain(self, prompt: str) -> str:
        """The prompt without special tokens: an alt-text from the web must neither end the turn nor add an image."""
        tokenizer = self.processor.tokenizer
        special = {*tokenizer.all_special_tokens, getattr(self.processor, "image_token", "<image>")}
        # The marks of a chat are special without having a role that the tokenizer names.
        special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        for token in sorted(filter(None, special), key=len, reverse=True):
            while token in prompt:
                prompt = prompt.replace(token, " ")
        return prompt

    def _end_ids(self) -> frozenset[int]:
        ends = self.model.generation_config.eos_token_id
        return frozenset([ends] if isinstance(ends, int) else ends or [])

    def _no_room(self, images: int) -> str:
        memory = describe_memory(self.model.device)
        return f"out of memory on {memory} with {images} images at a time; use a smaller --batch-size"


def _process(sampler: Sampler, _ids: Tensor, logits: Tensor) -> Tensor:
    return sampler(logits)


def is_image_text_folder(source: str) -> bool:
    """Whether a local folder was saved by transformers as a whole model."""
    folder = Path(source)
    return (folder / "config.json").is_file() and (folder / "generation_config.json").is_file()


def load_image_text(source: str, device: torch.device, sampling: Sampling, batch_size: int) -> ImageTextCaptioner:
    """The captioner in a folder, or of a Hub id; raises OpenVisionError when it takes no images or cannot be loaded."""
    library = require("transformers", extra="vlm")
    if is_path(source) and not Path(source).is_dir():
        raise OpenVisionError(f"the captioner {source} is no folder; correct the path")
    name = source
    if Path(source).is_dir():
        name = f"{source}, files {_digest(Path(source))[:16]}"
    try:
        with quiet():
            config = library.AutoConfig.from_pretrained(source)
            if type(config) not in library.AutoModelForImageTextToText._model_mapping:
                raise OpenVisionError(
                    f"the captioner {source} is a {one_line(config.model_type)} model, which takes no images; choose "
                    "an image-text model"
                )
            model = library.AutoModelForImageTextToText.from_pretrained(source, dtype="auto", use_safetensors=True)
            processor = library.AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = one_line(str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise OpenVisionError(
            f"the captioner {source} cannot be loaded by transformers: {reason}; choose another, or complete its files"
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise OpenVisionError(f"the captioner {source} has no processor of images and text; choose another")
    return ImageTextCaptioner(model.to(device).eval(), processor, name, sampling, batch_size)


def _digest(folder: Path) -> str:
    """SHA-256 of names and bytes of weights and configuration: another checkpoint at the same path is another one."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
