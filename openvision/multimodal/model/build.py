"""Build a LLaVA model: vision tower, projector and language model in a folder that stock transformers loads.

Resolution, patches, prefix tokens and token counts follow from the encoder's configuration and are checked. The
language model must give the same logits inside the model as alone. The projector has torch's default initialisation,
from a seed.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from openvision.errors import OpenVisionError
from openvision.files import JsonObject, atomic_folder
from openvision.multimodal.model.geometry import Framework, Geometry, anyres_pinpoints, check_processor
from openvision.multimodal.model.huggingface import (
    Llava,
    LlavaConfig,
    Pretrained,
    Processor,
    Tokenizer,
    quiet,
    transformers,
)
from openvision.multimodal.model.llm import IMAGE_TOKEN, LanguageModel, TokenizerOptions, load_llm
from openvision.multimodal.model.native import row_break
from openvision.multimodal.model.towers import OF_THE_SQUARE, VisionTower, load_tower
from openvision.provenance import git_state, library_versions
from openvision.weights.load import Request

PROVENANCE = "openvision_vlm.json"
_TOLERANCE = 1e-4
# A text-only chat template joins strings. Put before it, this turns a content in parts (images and text, as processors
# and pipelines write it) into one string, so that the template itself stays unchanged.
FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {%- set flat.messages = flat.messages + [message] -%}
  {%- else -%}
    {%- set text = namespace(value='') -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {%- set text.value = text.value + '<image>\\n' -%}
      {%- elif part['type'] == 'text' -%}
        {%- set text.value = text.value + part['text'] -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set flat.messages = flat.messages + [dict(message, content=text.value)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


@dataclass(frozen=True)
class BuildOptions:
    """Settings of a new model."""

    framework: Framework = "llava-1.5"
    max_tokens: int | None = None
    """Budget of patches of an image, llava-native only; by default the patches of the encoder's square."""
    feature_layer: int = -2
    """Hidden state that the projector reads: -1 is the last block's, 1 the first block's."""
    seed: int = 0
    """Seed of the projector and the newline."""
    dtype: str = "float32"
    """Dtype of the saved weights: float32, bfloat16 or float16."""
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)


@dataclass(frozen=True)
class Built:
    """A model and its processor, in memory."""

    model: Llava
    processor: Processor
    geometry: Geometry


def build(
    encoder: str | Path,
    llm: str | Path,
    folder: Path,
    options: BuildOptions | None = None,
    request: Request | None = None,
) -> Geometry:
    """Build a model from `encoder` and `llm`, write it to `folder` and return its geometry.

    Raises OpenVisionError for a folder that is not empty, or an encoder or language model that cannot be used; then
    nothing is written.
    """
    options = options or BuildOptions()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OpenVisionError(f"{folder} exists and is not empty; choose another folder")
    if options.dtype not in ("float32", "bfloat16", "float16"):
        raise OpenVisionError(f"unknown dtype {options.dtype!r}; choose float32, bfloat16 or float16")
    tower = load_tower(encoder, request, max_tokens=_budget(options))
    built = assemble(tower, load_llm(llm, options.tokenizer), options)
    with atomic_folder(folder) as temporary:
        save(built, temporary, {"encoder": str(encoder), "llm": str(llm)}, options)
    return built.geometry


def assemble(tower: VisionTower, llm: LanguageModel, options: BuildOptions) -> Built:
    """Assemble a model in memory; it shares the weights of `tower` and `llm`.

    Raises OpenVisionError for an unknown framework, a feature layer that does not exist or a language model that stock
    LLaVA cannot hold.
    """
    if options.framework not in get_args(Framework):
        raise OpenVisionError(
            f"unknown framework {options.framework!r}; choose one of {', '.join(get_args(Framework))}"
        )
    anyres = options.framework == "llava-next"
    geometry = tower.geometry
    if (options.framework == "llava-native") != (geometry.native is not None):
        raise OpenVisionError(
            f"the tower {tower.source} was loaded for {'native shapes' if geometry.native else 'squares'}, which "
            f"{options.framework} does not read; load it with max_tokens for llava-native alone"
        )
    if geometry.native is not None:
        row_break(llm.tokenizer)
    if anyres:
        geometry = replace(geometry, pinpoints=anyres_pinpoints(geometry.image_size))
    layer = _layer(options.feature_layer, geometry)
    _check_head(llm)
    config = _config(tower, llm, geometry, layer)
    name = "LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"
    with torch.device("meta"):
        model = getattr(transformers(), name)(config)
    alone = _logits(llm.model, llm)
    model.model.vision_tower = tower.model
    model.model.language_model = llm.model.base_model
    model.lm_head = llm.model.get_output_embeddings()
    _initialize_projector(model, options.seed)
    _configure_generation(model, llm)
    model.eval()
    drift = (alone - _logits(model, llm)).abs().max().item() / max(1.0, alone.abs().max().item())
    if not drift <= _TOLERANCE:
        raise OpenVisionError(
            f"{llm.source} gives other logits inside the model than alone (relative difference {drift:.1e}): stock "
            "LLaVA holds a decoder and an output layer only; choose another language model"
        )
    processor = make_processor(tower, llm.tokenizer, geometry)
    check_processor(processor, config, "the new model")
    return Built(model, processor, geometry)


def _budget(options: BuildOptions) -> int | None:
    """Patches that an image may have in native shapes; None for another framework."""
    if options.framework == "llava-native":
        return OF_THE_SQUARE if options.max_tokens is None else options.max_tokens
    if options.max_tokens is not None:
        raise OpenVisionError(f"max_tokens is of llava-native alone, not of {options.framework}; leave it out")
    return None


def save(built: Built, folder: Path, origin: dict[str, str], options: BuildOptions) -> None:
    """Write model, processor and their provenance."""
    with quiet():
        built.model.to(getattr(torch, options.dtype)).save_pretrained(folder)
        built.processor.save_pretrained(folder)
    geometry = built.geometry
    content = {
        **origin,
        "framework": options.framework,
        "feature_layer": options.feature_layer,
        "image_size": geometry.image_size,
        "patch_size": geometry.patch_size,
        "prefix_tokens": geometry.prefix_tokens,
        "tokens_of_a_square": geometry.patches,
        **({} if geometry.native is None else {"max_tokens": geometry.native.max_tokens}),
        "seed": options.seed,
        "git": git_state(),
        "libraries": library_versions() | {"transformers": transformers().__version__},
    }
    (folder / PROVENANCE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_processor(tower: VisionTower, tokenizer: Tokenizer, geometry: Geometry) -> Processor:
    """A stock `LlavaProcessor`, or a `LlavaNextProcessor` when `geometry` has pinpoints.

    It prepares images for the tower and text by the language model's chat template.
    """
    side = geometry.image_size
    settings: JsonObject = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": list(tower.image_mean),
        "image_std": list(tower.image_std),
        "resample": tower.resample,
        "do_pad": True,
    }
    names = ("LlavaImageProcessor", "LlavaProcessor")
    if geometry.pinpoints:
        names = ("LlavaNextImageProcessor", "LlavaNextProcessor")
        settings["image_grid_pinpoints"] = [list(pinpoint) for pinpoint in geometry.pinpoints]
    # Without torchvision, transformers uses Pillow and warns each time.
    with quiet():
        image_processor = getattr(transformers(), names[0])(**settings)
    return getattr(transformers(), names[1])(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=geometry.patch_size,
        vision_feature_select_strategy="default" if geometry.prefix_tokens else "full",
        num_additional_image_tokens=geometry.prefix_tokens,
        image_token=IMAGE_TOKEN,
        chat_template=f"{FLATTEN}{tokenizer.chat_template}",
    )


def _layer(layer: int, geometry: Geometry) -> int:
    # Hidden state 0 is the embedding, `depth` the last block's output.
    if not -geometry.depth <= layer <= geometry.depth or layer == 0:
        raise OpenVisionError(
            f"feature layer {layer} does not exist: the encoder has {geometry.depth} blocks, so it is 1 to "
            f"{geometry.depth}, or -1 to -{geometry.depth} from the end"
        )
    return layer


def _check_head(llm: LanguageModel) -> None:
    head = llm.model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise OpenVisionError(
            f"{llm.source} has no linear output layer without bias, which stock LLaVA needs; choose another model"
        )


def _config(tower: VisionTower, llm: LanguageModel, geometry: Geometry, layer: int) -> LlavaConfig:
    settings: JsonObject = {
        "vision_config": tower.model.config,
        "text_config": llm.model.config,
        "image_token_index": llm.image_token_id,
        "image_seq_length": geometry.patches,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "default" if geometry.prefix_tokens else "full",
        "projector_hidden_act": "gelu",
        "pad_token_id": llm.tokenizer.pad_token_id,
        "tie_word_embeddings": bool(llm.model.config.tie_word_embeddings),
    }
    if geometry.pinpoints:
        settings["image_grid_pinpoints"] = [list(pinpoint) for pinpoint in geometry.pinpoints]
        return transformers().LlavaNextConfig(**settings)
    return transformers().LlavaConfig(**settings)


def _initialize_projector(model: Llava, seed: int) -> None:
    inner = model.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner.multi_modal_projector = type(inner.multi_modal_projector)(model.config)
        if hasattr(inner, "image_newline"):
            width = model.config.text_config.hidden_size
            inner.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)


def _configure_generation(model: Llava, llm: LanguageModel) -> None:
    model.generation_config = transformers().GenerationConfig(
        bos_token_id=llm.tokenizer.bos_token_id,
        eos_token_id=list(llm.stop_ids),
        pad_token_id=llm.tokenizer.pad_token_id,
        do_sample=False,
        # The model reads images and never generates them.
        suppress_tokens=[llm.image_token_id],
    )


def _logits(model: Pretrained, llm: LanguageModel) -> torch.Tensor:
    ids = llm.tokenizer("Is the circle red? Yes, it is red.", return_tensors="pt", add_special_tokens=False)[
        "input_ids"
    ]
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()
