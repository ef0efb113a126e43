"""transformers: imported late, kept quiet while it loads and saves, and typed as far as this package uses it.

The classes below are types only. The library's own annotations do not serve: `to` and `generate` do not bind to a
model, and a configuration inside another one may be a dictionary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from openvision.errors import require

if TYPE_CHECKING:
    from transformers import BatchFeature, GenerationConfig


def transformers() -> ModuleType:
    """The library; raises OpenVisionError that names the extra when it is not installed."""
    return require("transformers", extra="vlm")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings inside: callers check what they load."""
    logging = require("transformers.utils.logging", extra="vlm")
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class Tokenizer(Protocol):
    """A `PreTrainedTokenizerFast` that `llm.prepare_tokenizer` has checked."""

    pad_token: str
    pad_token_id: int
    bos_token_id: int | None
    eos_token: str
    eos_token_id: int | None
    padding_side: str
    chat_template: str | None
    is_fast: bool
    all_special_ids: list[int]
    added_tokens_decoder: "Mapping[int, AddedToken]"
    add_tokens: Callable[..., int]
    apply_chat_template: Callable[..., str]
    convert_tokens_to_ids: Callable[[str], int]
    decode: Callable[..., str]
    get_vocab: Callable[[], dict[str, int]]
    save_pretrained: Callable[..., object]

    def __call__(self, text: str, **options: object) -> Mapping[str, Any]:
        """`input_ids`, `offset_mapping`: lists, or tensors with `return_tensors`."""
        ...

    def __len__(self) -> int: ...


class AddedToken(Protocol):
    """A token beside the vocabulary that the tokenizer was trained with."""

    special: bool


class ImageProcessor(Protocol):
    """Resizes, crops or tiles, and normalises images."""

    size: Mapping[str, int]
    crop_size: Mapping[str, int]
    image_mean: Sequence[float]
    image_std: Sequence[float]
    resample: int
    to_dict: Callable[[], dict[str, object]]

    def __call__(self, images: object, **options: object) -> Mapping[str, Tensor]:
        """`pixel_values` float32 (n, 3, S, S), for anyres (n, squares, 3, S, S)."""
        ...


class Processor(Protocol):
    """A `LlavaProcessor` or `LlavaNextProcessor`."""

    tokenizer: Tokenizer
    image_processor: ImageProcessor
    image_token_id: int
    apply_chat_template: Callable[..., Any]
    batch_decode: Callable[..., list[str]]
    save_pretrained: Callable[..., object]

    def __call__(self, text: Sequence[str], images: object = None, **options: object) -> "BatchFeature":
        """`input_ids`, `attention_mask` and, with images, `pixel_values`."""
        ...


class Config(Protocol):
    """Configuration of a vision tower or of a language model."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    image_size: int
    patch_size: int
    vocab_size: int
    tie_word_embeddings: bool


class LlavaConfig(Protocol):
    """A `LlavaConfig` or `LlavaNextConfig`."""

    model_type: str
    vision_config: Config
    text_config: Config
    vision_feature_layer: int
    vision_feature_select_strategy: str
    image_token_id: int


class Pretrained(nn.Module):
    """Any model of the library."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    generate: Callable[..., Tensor]
    get_input_embeddings: Callable[[], nn.Embedding]
    get_output_embeddings: Callable[[], nn.Linear]
    base_model: "LanguageModelParts"
    generation_config: "GenerationConfig"
    resize_token_embeddings: Callable[..., nn.Embedding]
    save_pretrained: Callable[..., None]
    set_attn_implementation: Callable[[str], None]


class Projector(nn.Module):
    """A `LlavaMultiModalProjector`."""

    linear_1: nn.Linear
    linear_2: nn.Linear


class LanguageModelParts(Pretrained):
    """A language model without its output layer."""

    layers: nn.ModuleList


class LlavaParts(Pretrained):
    """A `LlavaModel` or `LlavaNextModel`: everything but the output layer."""

    vision_tower: nn.Module
    multi_modal_projector: Projector
    language_model: LanguageModelParts
    image_newline: nn.Parameter
    """LLaVA-NeXT only."""
    get_image_features: Callable[..., Any]


class Llava(Pretrained):
    """A `LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration`."""

    config: LlavaConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    model: LlavaParts
    lm_head: nn.Linear
    activation_checkpointing_enable: Callable[..., None]
    _no_split_modules: Sequence[str]
