"""A causal language model and its tokenizer, from a folder, the Hub or a GGUF file, checked for training and chat."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

from openvision.errors import OpenVisionError, require
from openvision.multimodal.model.huggingface import Pretrained, Tokenizer, quiet, transformers
from openvision.weights.hub import is_path

IMAGE_TOKEN = "<image>"  # noqa: S105


class Message(TypedDict):
    """One message of a conversation, as chat templates take it."""

    role: str
    content: str


@dataclass(frozen=True)
class LanguageModel:
    """A causal LM with room for the image token, and its tokenizer."""

    model: Pretrained
    tokenizer: Tokenizer
    image_token_id: int
    stop_ids: tuple[int, ...]
    """Tokens that end an answer: the chat template's end-of-turn token and the model's own end of text."""
    source: str


@dataclass(frozen=True)
class TokenizerOptions:
    """Settings for a tokenizer that lacks them."""

    pad_token: str | None = None
    """An existing token, used for padding."""
    chat_template: Path | None = None
    """Jinja file."""


def load_llm(
    source: str | Path, options: TokenizerOptions | None = None, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """Load a causal LM and add the image token to its vocabulary.

    `source` is a folder, a Hub id or a .gguf file. Raises OpenVisionError when it cannot be loaded, has quantised
    weights, no pad token or no chat template, or when its chat template cannot be trained on.
    """
    where, extra = _where(source)
    try:
        with quiet():
            tokenizer = transformers().AutoTokenizer.from_pretrained(where, **extra)
            model = transformers().AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **extra).eval()
    except (OSError, ValueError, KeyError) as error:
        raise OpenVisionError(
            f"cannot load the language model {source}: {str(error).splitlines()[0]}; --llm takes a folder, a "
            ".gguf file or a Hub id of a causal language model"
        ) from error
    if getattr(model.config, "quantization_config", None) is not None:
        if not extra:
            raise OpenVisionError(f"{source} is quantised and cannot be trained; use the full-precision weights")
        # The weights of a GGUF file have been dequantised.
        del model.config.quantization_config
    model.config._name_or_path = ""
    prepare_tokenizer(tokenizer, options or TokenizerOptions(), str(source))
    image_token_id = _add_image_token(model, tokenizer)
    stop = (stop_token(tokenizer, str(source)), *_own_stops(model, tokenizer))
    return LanguageModel(model, tokenizer, image_token_id, tuple(dict.fromkeys(stop)), str(source))


def _where(source: str | Path) -> tuple[str, dict[str, str]]:
    path = Path(source).expanduser()
    is_file = path.suffix == ".gguf"
    if not path.exists() and is_path(source):
        raise OpenVisionError(f"the language model {source} does not exist; give a folder, a .gguf file or a Hub id")
    if is_file:
        require("gguf", extra="vlm")
        return str(path.parent), {"gguf_file": path.name}
    return str(path if path.exists() else source), {}


def prepare_tokenizer(tokenizer: Tokenizer, options: TokenizerOptions, source: str) -> None:
    """Set pad token and chat template from `options`; raise OpenVisionError when the tokenizer still lacks one."""
    if options.pad_token is not None:
        if options.pad_token not in tokenizer.get_vocab():
            raise OpenVisionError(
                f"--pad-token {options.pad_token!r} is not a token of {source}; choose an existing one"
            )
        tokenizer.pad_token = options.pad_token
    if options.chat_template is not None:
        try:
            tokenizer.chat_template = options.chat_template.read_text(encoding="utf-8")
        except OSError as error:
            raise OpenVisionError(f"chat template {options.chat_template} cannot be read: {error.strerror}") from error
    if not tokenizer.is_fast:
        raise OpenVisionError(f"the tokenizer of {source} gives no character offsets; use its fast version")
    if tokenizer.pad_token_id is None:
        raise OpenVisionError(
            f"the tokenizer of {source} has no pad token, which batches need; give an existing token that no text "
            f"uses with --pad-token, e.g. {tokenizer.eos_token!r}"
        )
    if tokenizer.chat_template is None:
        raise OpenVisionError(
            f"the tokenizer of {source} has no chat template, which marks where an answer begins; use an instruct "
            "model, or give a Jinja file with --chat-template"
        )


def _add_image_token(model: Pretrained, tokenizer: Tokenizer) -> int:
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        added = require("tokenizers", extra="vlm").AddedToken(IMAGE_TOKEN, special=True, normalized=False)
        tokenizer.add_tokens([added], special_tokens=True)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        with torch.no_grad():
            for table in tables:
                # The mean embedding: neither likely nor impossible before training.
                table[rows:] = table[:rows].mean(0)
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def _own_stops(model: Pretrained, tokenizer: Tokenizer) -> list[int]:
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    stops = own if isinstance(own, list) else [own]
    return [stop for stop in (*stops, tokenizer.eos_token_id) if stop is not None]


def stop_token(tokenizer: Tokenizer, source: str) -> int:
    """Id of the chat template's end-of-turn token after an answer; raises OpenVisionError when there is none."""
    question: list[Message] = [{"role": "user", "content": "Is it red?"}]
    prompt = render(tokenizer, question, prompt=True)
    whole = render(tokenizer, [*question, {"role": "assistant", "content": "Yes."}], prompt=False)
    if not whole.startswith(prompt) or "Yes." not in whole[len(prompt) :]:
        raise OpenVisionError(
            f"the chat template of {source} does not write a conversation as the prompt followed by the answer, so "
            "the answer's tokens cannot be found; give another one with --chat-template"
        )
    after = whole[len(prompt) :].partition("Yes.")[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    if not ids or (ids[0] not in tokenizer.all_special_ids and not _is_special(tokenizer, ids[0])):
        raise OpenVisionError(
            f"the chat template of {source} ends an answer with {after!r}, which is no special token: the model would "
            "never learn to stop; give another one with --chat-template"
        )
    return ids[0]


def _is_special(tokenizer: Tokenizer, token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and added.special


def render(tokenizer: Tokenizer, messages: Sequence[Message], prompt: bool) -> str:
    """The conversation as text, by the tokenizer's chat template; `prompt` adds the start of the answer.

    Raises OpenVisionError when the template refuses the conversation.
    """
    jinja = require("jinja2", extra="vlm")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except jinja.TemplateError as error:
        raise OpenVisionError(f"the chat template refuses a conversation: {error}") from error
