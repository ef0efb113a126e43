"""A causal language model and its tokenizer, by name, folder or GGUF file, checked for what training and chat need."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openvision.errors import OpenVisionError, require
from openvision.multimodal.model.stock import quiet, transformers

IMAGE_TOKEN = "<image>"  # noqa: S105


@dataclass(frozen=True)
class LanguageModel:
    """A causal LM with room for the image token, and its tokenizer."""

    model: Any
    tokenizer: Any
    image_token_id: int
    stop_ids: tuple[int, ...]
    """Tokens that end an answer: what the chat template writes after one, and the model's own end of text."""
    source: str


@dataclass(frozen=True)
class TokenizerOptions:
    """What a tokenizer may lack."""

    pad_token: str | None = None
    """An existing token that pads batches."""
    chat_template: Path | None = None
    """File with a Jinja chat template."""


def load_llm(
    source: str | Path, options: TokenizerOptions | None = None, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """Load a causal LM with an image token added.

    `source` is a folder, a Hub id or a .gguf file. Raises OpenVisionError when it cannot be loaded, has no pad token or
    chat template, or its template cannot be trained on.
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
            raise OpenVisionError(f"{source} is quantised, and its weights are to be trained; take the full ones")
        # A GGUF file's weights have been unpacked; what is saved is not quantised any more.
        del model.config.quantization_config
    model.config._name_or_path = ""
    prepare_tokenizer(tokenizer, options or TokenizerOptions(), str(source))
    image_token_id = _add_image_token(model, tokenizer)
    stop = (stop_token(tokenizer, str(source)), *_own_stops(model, tokenizer))
    return LanguageModel(model, tokenizer, image_token_id, tuple(dict.fromkeys(stop)), str(source))


def _where(source: str | Path) -> tuple[str, dict[str, str]]:
    path = Path(source).expanduser()
    is_file = path.suffix == ".gguf"
    # A Hub id has one slash and no place: ./a/b and /a/b are folders.
    is_local = is_file or isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_local and not path.exists():
        raise OpenVisionError(f"the language model {source} does not exist; give a folder, a .gguf file or a Hub id")
    if is_file:
        require("gguf", extra="vlm")
        return str(path.parent), {"gguf_file": path.name}
    return str(path if path.exists() else source), {}


def prepare_tokenizer(tokenizer: Any, options: TokenizerOptions, source: str) -> None:
    """Give the tokenizer what `options` bring; raises OpenVisionError when something is still missing."""
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
        raise OpenVisionError(f"the tokenizer of {source} cannot say where a token stands; take its fast form")
    if tokenizer.pad_token_id is None:
        raise OpenVisionError(
            f"the tokenizer of {source} has no pad token, and batches need one; name an existing token that no text "
            f"uses with --pad-token, e.g. {tokenizer.eos_token!r}"
        )
    if tokenizer.chat_template is None:
        raise OpenVisionError(
            f"the tokenizer of {source} has no chat template, which says where an answer begins; take an instruct "
            "model, or give a Jinja file with --chat-template"
        )


def _add_image_token(model: Any, tokenizer: Any) -> int:
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        added = require("tokenizers", extra="vlm").AddedToken(IMAGE_TOKEN, special=True, normalized=False)
        tokenizer.add_tokens([added], special_tokens=True)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        with torch.no_grad():
            for table in tables:
                # An average token: neither likely nor impossible before it is trained.
                table[rows:] = table[:rows].mean(0)
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def _own_stops(model: Any, tokenizer: Any) -> list[int]:
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    stops = own if isinstance(own, list) else [own]
    return [stop for stop in (*stops, tokenizer.eos_token_id) if stop is not None]


def stop_token(tokenizer: Any, source: str) -> int:
    """Id of the token the chat template writes after an answer; raises OpenVisionError when it writes none."""
    question = [{"role": "user", "content": "Is it red?"}]
    prompt = render(tokenizer, question, prompt=True)
    whole = render(tokenizer, [*question, {"role": "assistant", "content": "Yes."}], prompt=False)
    if not whole.startswith(prompt) or "Yes." not in whole[len(prompt) :]:
        raise OpenVisionError(
            f"the chat template of {source} does not write a conversation as the prompt followed by the answer, so "
            "there is no telling which tokens are the answer; give another one with --chat-template"
        )
    after = whole[len(prompt) :].partition("Yes.")[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    if not ids or (ids[0] not in tokenizer.all_special_ids and not _is_special(tokenizer, ids[0])):
        raise OpenVisionError(
            f"the chat template of {source} ends an answer with {after!r}, which is no special token: the model would "
            "never learn to stop; give another one with --chat-template"
        )
    return ids[0]


def _is_special(tokenizer: Any, token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and added.special


def render(tokenizer: Any, messages: list[dict[str, str]], prompt: bool) -> str:
    """The conversation as text by the tokenizer's own chat template; `prompt` adds what an answer follows."""
    jinja = require("jinja2", extra="vlm")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except jinja.TemplateError as error:
        raise OpenVisionError(f"the chat template refuses a conversation: {error}") from error
