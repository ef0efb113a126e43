"""Export the towers as stock transformers classes, without remote code.

| folder        | class             | exact                                                                        |
|---------------|-------------------|------------------------------------------------------------------------------|
| `transformers`| `ViTModel`        | `hidden_states[i]`; not its `last_hidden_state`, which is normed token by token |
| `/text`       | `SiglipTextModel` | `pooler_output` is the text embedding before normalisation                   |
| `beit`        | `BeitModel`       | `hidden_states[i]` and `pooler_output`: it also norms after the mean          |
| `siglip`      | `SiglipVisionModel` | nothing: it has no class token; for stacks that take only this class        |

OpenVision's LayerNorm comes after the mean over patches, a ViTModel's before any pooling, so norm and head are written
beside it to `projection.safetensors`. BeitModel has no bias on keys; a key bias adds the same number to every score of
a query, which softmax cancels. No stock class holds both towers: `VisionTextDualEncoderModel` builds its text
tower through `AutoModel`, which does not know `SiglipTextModel`.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from openvision.errors import require
from openvision.files import JsonObject
from openvision.models.layers import LAYER_NORM_EPS, unit
from openvision.models.vision import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer
from openvision.weights.export.parity import (
    FLOAT32_TOLERANCE,
    Parity,
    check_loading,
    compare,
    example_images,
    text_model,
)
from openvision.weights.export.text import EXAMPLE_TEXTS, class_token_in_position, example_ids, write_tokenizer
from openvision.weights.load import Checkpoint

WEIGHTS, CONFIG, PROJECTION = "model.safetensors", "config.json", "projection.safetensors"
_TEXT_FOLDER = "text"
_VIT_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_VIT_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_SIGLIP_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SIGLIP_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def write_vit(checkpoint: Checkpoint, folder: Path) -> None:
    """The vision tower as `ViTModel`, its image processor, norm and head, and the text tower where there is one."""
    vision = checkpoint.vision
    norm = {"layernorm.weight": vision.fc_norm.weight, "layernorm.bias": vision.fc_norm.bias}
    _save(
        folder, {**_vit_trunk(vision), **norm}, {"model_type": "vit", "architectures": ["ViTModel"], **_sizes(vision)}
    )
    save_file(_plain(_projection(vision)), folder / PROJECTION, metadata={"format": "pt"})
    _write_image_processor(folder, vision)
    if checkpoint.model is not None:
        _write_text(checkpoint, folder / _TEXT_FOLDER)


def write_beit(checkpoint: Checkpoint, folder: Path) -> None:
    """The vision tower as `BeitModel`, whose pooled output is OpenVision's, and the head beside it."""
    vision = checkpoint.vision
    trunk = {name: tensor for name, tensor in _vit_trunk(vision).items() if not name.endswith("k_proj.bias")}
    norm = {"pooler.layernorm.weight": vision.fc_norm.weight, "pooler.layernorm.bias": vision.fc_norm.bias}
    config = {
        "model_type": "beit",
        "architectures": ["BeitModel"],
        **_sizes(vision),
        "use_absolute_position_embeddings": True,
        "use_relative_position_bias": False,
        "use_mask_token": False,
        "use_mean_pooling": True,
        "layer_scale_init_value": 0.0,
    }
    _save(folder, {**trunk, **norm}, config)
    save_file(_plain(_projection(vision)), folder / PROJECTION, metadata={"format": "pt"})
    _write_image_processor(folder, vision)


def write_siglip(checkpoint: Checkpoint, folder: Path) -> None:
    """The vision tower as `SiglipVisionModel`, without the class token: close, never equal."""
    vision = checkpoint.vision
    sizes = {name: value for name, value in _sizes(vision).items() if name != "qkv_bias"}
    config = {
        "model_type": "siglip_vision_model",
        "architectures": ["SiglipVisionModel"],
        **sizes,
        "vision_use_head": False,
    }
    state = {
        "embeddings.patch_embedding.weight": vision.patch_embed.proj.weight,
        "embeddings.patch_embedding.bias": torch.zeros(vision.config.width),
        "embeddings.position_embedding.weight": _positions(vision),
        "post_layernorm.weight": vision.fc_norm.weight,
        "post_layernorm.bias": vision.fc_norm.bias,
        **_blocks(vision.blocks, "encoder.layers", _SIGLIP_BLOCK, _SIGLIP_QKV),
    }
    _save(folder, state, config)
    save_file(_plain(_projection(vision)), folder / PROJECTION, metadata={"format": "pt"})
    _write_image_processor(folder, vision)


def _write_text(checkpoint: Checkpoint, folder: Path) -> None:
    config, tokenizer = text_model(checkpoint).config, checkpoint.tokenizer
    text = class_token_in_position(text_model(checkpoint).text, tokenizer)
    folder.mkdir()
    state = {
        "embeddings.token_embedding.weight": text.token_embed.weight,
        "embeddings.position_embedding.weight": text.pos_embed[0],
        "final_layer_norm.weight": text.norm.weight,
        "final_layer_norm.bias": text.norm.bias,
        "head.weight": text.head.weight,
        "head.bias": torch.zeros(config.embed_dim),
        **_blocks(text.blocks, "encoder.layers", _SIGLIP_BLOCK, _SIGLIP_QKV),
    }
    shape, special = config.text, {}
    if tokenizer is not None:
        special = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    _save(
        folder,
        state,
        {
            "model_type": "siglip_text_model",
            "architectures": ["SiglipTextModel"],
            "hidden_size": shape.width,
            "num_hidden_layers": shape.depth,
            "intermediate_size": shape.mlp_dim,
            "num_attention_heads": shape.heads,
            "vocab_size": shape.vocab_size,
            "max_position_embeddings": shape.context_length,
            "projection_size": config.embed_dim,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": LAYER_NORM_EPS,
            **special,
        },
    )
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, shape.context_length)


def _vit_trunk(vision: VisionTransformer) -> dict[str, Tensor]:
    """Everything before the final norm, in the names ViTModel and BeitModel share."""
    width = vision.config.width
    return {
        "embeddings.cls_token": vision.cls_token,
        "embeddings.position_embeddings": torch.cat([torch.zeros(1, width), _positions(vision)])[None],
        "embeddings.patch_embeddings.projection.weight": vision.patch_embed.proj.weight,
        "embeddings.patch_embeddings.projection.bias": torch.zeros(width),
        **_blocks(vision.blocks, "layers", _VIT_BLOCK, _VIT_QKV),
    }


def _blocks(blocks: torch.nn.ModuleList, prefix: str, names: dict[str, str], qkv: tuple[str, ...]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for index, block in enumerate(blocks):
        for name, tensor in block.state_dict().items():
            module, leaf = name.rsplit(".", 1)
            if module == "attn.qkv":
                parts = tensor.chunk(3)
                state.update({f"{prefix}.{index}.{to}.{leaf}": part for to, part in zip(qkv, parts, strict=True)})
            else:
                state[f"{prefix}.{index}.{names[module]}.{leaf}"] = tensor
    return state


def _positions(vision: VisionTransformer) -> Tensor:
    return vision.config.positions(*vision.config.grid())


def _projection(vision: VisionTransformer) -> dict[str, Tensor]:
    state = {"fc_norm.weight": vision.fc_norm.weight, "fc_norm.bias": vision.fc_norm.bias}
    return state | ({"head.weight": vision.head.weight} if vision.head is not None else {})


def _sizes(vision: VisionTransformer) -> JsonObject:
    config = vision.config
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_dim,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": True,
    }


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # A chunk of qkv is a view: safetensors wants every tensor to own its memory.
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def _save(folder: Path, state: dict[str, Tensor], config: JsonObject) -> None:
    save_file(_plain(state), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")


def _write_image_processor(folder: Path, vision: VisionTransformer) -> None:
    side = vision.config.image_size
    content = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n")


def check_vit(checkpoint: Checkpoint, folder: Path) -> list[Parity]:
    """Every hidden state of the stock ViTModel, the embedding through norm and head, and the text tower."""
    results = _check_hidden_states("ViTModel", checkpoint, folder, add_pooling_layer=False)
    if checkpoint.model is not None:
        results += _check_text(checkpoint, folder / _TEXT_FOLDER)
    return results


def check_beit(checkpoint: Checkpoint, folder: Path) -> list[Parity]:
    """Every hidden state of the stock BeitModel and its pooled output."""
    results = _check_hidden_states("BeitModel", checkpoint, folder)
    images = example_images(checkpoint.vision)
    with torch.inference_mode():
        pooled = _load("BeitModel", folder)(images).pooler_output
        results.append(compare("pooled", checkpoint.vision.forward_features(images).pooled, pooled))
    return results


def check_siglip(checkpoint: Checkpoint, folder: Path) -> list[Parity]:
    """Report how far the tokens drift without the class token; no tolerance applies."""
    theirs = _load("SiglipVisionModel", folder)
    images = example_images(checkpoint.vision)
    depth = checkpoint.vision.config.depth
    with torch.inference_mode():
        ours = checkpoint.vision.forward_features(images, layers=[-2, -1])
        states = theirs(images, output_hidden_states=True).hidden_states
        results = []
        for name, tokens, index in (("penultimate", ours.layers[0], depth - 1), ("last", ours.layers[1], depth)):
            drift = compare(f"{name} patch tokens", tokens.patch_tokens, states[index], float("inf"))
            cosine = torch.cosine_similarity(tokens.patch_tokens, states[index], dim=-1)
            results += [drift, Parity(f"{name} patch tokens, as 1 - cosine", 1 - cosine.min().item(), float("inf"))]
    return results


def _check_hidden_states(name: str, checkpoint: Checkpoint, folder: Path, **settings: bool) -> list[Parity]:
    theirs = _load(name, folder, **settings)
    vision, images = checkpoint.vision, example_images(checkpoint.vision)
    layers = range(vision.config.depth + 1)
    with torch.inference_mode():
        ours = vision.forward_features(images, layers=layers)
        states = theirs(images, output_hidden_states=True).hidden_states
        tokens = []
        for layer in ours.layers:
            assert layer.class_token is not None
            tokens.append(torch.cat([layer.class_token[:, None], layer.patch_tokens], dim=1))
        worst = max(
            (compare(f"hidden states 0 to {layers[-1]}", *pair) for pair in zip(tokens, states, strict=True)), key=_size
        )
    return [worst]


def _size(result: Parity) -> float:
    return result.difference


def _check_text(checkpoint: Checkpoint, folder: Path) -> list[Parity]:
    """The text tower on ids in training's layout, and on those of the stock call."""
    theirs, ids = _load("SiglipTextModel", folder), example_ids(checkpoint)
    with torch.inference_mode():
        ours = text_model(checkpoint).encode_text(ids)
        found = [compare("text features", ours, unit(theirs(input_ids=ids).pooler_output), FLOAT32_TOLERANCE)]
        if checkpoint.tokenizer is not None:
            tokenizer = require("transformers", extra="transformers").AutoTokenizer.from_pretrained(folder)
            inputs = tokenizer(list(EXAMPLE_TEXTS), padding="max_length", truncation=True, return_tensors="pt")
            called = unit(theirs(**inputs).pooler_output)
            found.append(compare("text features by AutoTokenizer", ours, called, FLOAT32_TOLERANCE))
    return found


def _load(name: str, folder: Path, **settings: bool) -> torch.nn.Module:
    """Load a stock class from the folder, strictly."""
    transformers = require("transformers", extra="transformers")
    require("transformers.utils.logging", extra="transformers").disable_progress_bar()
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **settings)
    check_loading(name, report)
    return model.eval()
