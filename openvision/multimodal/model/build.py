"""Tower + projector + language model: a folder that stock `AutoModelForImageTextToText` and `AutoProcessor` load.

The encoder's configuration decides resolution, patches, prefix tokens and token counts; they are asserted, and the
language model inside must give the logits it gave alone. The projector starts as torch's linear layers do, from a seed.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from openvision.errors import OpenVisionError
from openvision.files import atomic_folder
from openvision.multimodal.model.geometry import Framework, Geometry, anyres_pinpoints, check_processor
from openvision.multimodal.model.llm import LanguageModel, TokenizerOptions, load_llm
from openvision.multimodal.model.processor import make_processor
from openvision.multimodal.model.stock import quiet, transformers
from openvision.multimodal.model.towers import Tower, load_tower
from openvision.provenance import git_state, library_versions
from openvision.weights.load import Request

PROVENANCE = "openvision_vlm.json"
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class BuildOptions:
    """What may be chosen about a model."""

    framework: Framework = "llava-1.5"
    feature_layer: int = -2
    """Hidden state the projector reads: -1 is the last block's, 1 the first block's."""
    seed: int = 0
    """Of the projector and the newline."""
    dtype: str = "float32"
    """Of the saved weights: float32, bfloat16 or float16."""
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)


@dataclass(frozen=True)
class Built:
    """A model and its processor, in memory."""

    model: Any
    processor: Any
    geometry: Geometry


def build(
    encoder: str | Path,
    llm: str | Path,
    folder: Path,
    options: BuildOptions | None = None,
    request: Request | None = None,
) -> Geometry:
    """Build a model around `encoder` and `llm` into `folder` and return its geometry.

    Raises OpenVisionError for a folder in use, an encoder or language model that cannot serve, or a mismatch; then
    nothing is left behind.
    """
    options = options or BuildOptions()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OpenVisionError(f"{folder} exists and is not empty; choose another folder")
    if options.dtype not in ("float32", "bfloat16", "float16"):
        raise OpenVisionError(f"unknown dtype {options.dtype!r}; there are float32, bfloat16 and float16")
    tower = load_tower(encoder, request)
    built = assemble(tower, load_llm(llm, options.tokenizer), options)
    with atomic_folder(folder) as temporary:
        save(built, temporary, {"encoder": str(encoder), "llm": str(llm)}, options)
    return built.geometry


def assemble(tower: Tower, llm: LanguageModel, options: BuildOptions) -> Built:
    """Put a tower and a language model together in memory; both become part of the model."""
    if options.framework not in get_args(Framework):
        raise OpenVisionError(f"unknown framework {options.framework!r}; there are {', '.join(get_args(Framework))}")
    anyres = options.framework == "llava-next"
    geometry = tower.geometry
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
    _draw_projector(model, options.seed)
    _configure_generation(model, llm)
    model.eval()
    drift = (alone - _logits(model, llm)).abs().max().item() / max(1.0, alone.abs().max().item())
    if not drift <= _TOLERANCE:
        raise OpenVisionError(
            f"{llm.source} gives other logits inside the model than alone (relative difference {drift:.1e}): it does "
            "more than a decoder and a head, which stock LLaVA cannot hold; choose another language model"
        )
    processor = make_processor(tower, llm.tokenizer, geometry)
    check_processor(processor, config, "the new model")
    return Built(model, processor, geometry)


def save(built: Built, folder: Path, origin: dict[str, str], options: BuildOptions) -> None:
    """Write model, processor and where they came from."""
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
        "seed": options.seed,
        "git": git_state(),
        "libraries": library_versions() | {"transformers": transformers().__version__},
    }
    (folder / PROVENANCE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
        raise OpenVisionError(f"{llm.source} has no plain output layer, which stock LLaVA needs; choose another model")


def _config(tower: Tower, llm: LanguageModel, geometry: Geometry, layer: int) -> Any:
    settings: dict[str, Any] = {
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


def _draw_projector(model: Any, seed: int) -> None:
    inner = model.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner.multi_modal_projector = type(inner.multi_modal_projector)(model.config)
        if hasattr(inner, "image_newline"):
            width = model.config.text_config.hidden_size
            inner.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)


def _configure_generation(model: Any, llm: LanguageModel) -> None:
    model.generation_config = transformers().GenerationConfig(
        bos_token_id=llm.tokenizer.bos_token_id,
        eos_token_id=list(llm.stop_ids),
        pad_token_id=llm.tokenizer.pad_token_id,
        do_sample=False,
        # A picture is read, never written.
        suppress_tokens=[llm.image_token_id],
    )


def _logits(model: Any, llm: LanguageModel) -> torch.Tensor:
    ids = llm.tokenizer("Is the circle red? Yes, it is red.", return_tensors="pt", add_special_tokens=False)[
        "input_ids"
    ]
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()
