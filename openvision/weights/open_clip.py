"""The layout in which OpenVision was released: open_clip's names and configuration (spec section 8).

The file holds the sin-cos positions of its resolution as an ordinary tensor. It is compared with the computed table
and dropped: a file with learned positions is not an OpenVision model, whatever its shapes are.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.models.contrast import SIGMOID_BIAS
from openvision.models.layers import LAYER_NORM_EPS, sincos_position_table
from openvision.models.openvision import OpenVisionConfig
from openvision.models.openvision3 import DEMO_AUTOENCODER, LatentVisionConfig
from openvision.models.text import TextConfig
from openvision.models.variants import known_heads
from openvision.models.vision import IMAGENET_MEAN, IMAGENET_STD, VisionConfig

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

_IN_BLOCK = {
    "ln_1.weight": "norm1.weight",
    "ln_1.bias": "norm1.bias",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.weight": "attn.proj.weight",
    "attn.out_proj.bias": "attn.proj.bias",
    "ln_2.weight": "norm2.weight",
    "ln_2.bias": "norm2.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}
_VISION = {
    "class_embedding": "cls_token",
    "conv1.weight": "patch_embed.proj.weight",
    "ln_post.weight": "fc_norm.weight",
    "ln_post.bias": "fc_norm.bias",
    "proj": "head.weight",
}
_TEXT = {
    "token_embedding.weight": "text.token_embed.weight",
    "positional_embedding": "text.pos_embed",
    "ln_final.weight": "text.norm.weight",
    "ln_final.bias": "text.norm.bias",
    "text_projection": "text.head.weight",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}
_OURS_TO_IN_BLOCK = {ours: theirs for theirs, ours in _IN_BLOCK.items()}
_OURS_OUTSIDE = {f"vision.{ours}": f"visual.{theirs}" for theirs, ours in _VISION.items()} | {
    ours: theirs for theirs, ours in _TEXT.items()
}
_BLOCK = re.compile(r"^(visual\.)?transformer\.resblocks\.(\d+)\.(.+)$")
_OUR_BLOCK = re.compile(r"^(vision|text)\.blocks\.(\d+)\.(.+)$")
_POSITIONS = "visual.positional_embedding"
# Stored as (in, out); a Linear weight is (out, in).
_TRANSPOSED = frozenset({"vision.head.weight", "text.head.weight"})
# A bfloat16 file keeps the table to 2^-9.
_POSITION_TOLERANCE = 4e-3


def is_vision_only(state: Mapping[str, Tensor]) -> bool:
    """Whether `state` is a vision tower alone, with or without the prefix `visual.`."""
    return "token_embedding.weight" not in state


def with_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` of a vision tower with every name under `visual.`; a whole model stays as it is."""
    if "conv1.weight" not in state:
        return dict(state)
    return {f"visual.{name}": tensor for name, tensor in state.items()}


def from_open_clip(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Our names and layouts for a released state dict; unknown names are kept, so that strict loading lists them.

    Raises OpenVisionError when the positions in it are not OpenVision's fixed ones.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in with_prefix(state).items():
        if name == _POSITIONS:
            _check_positions(tensor, source)
            continue
        ours = _our_name(name)
        converted[ours] = _to_ours(ours, tensor)
    return converted


def to_open_clip(state: Mapping[str, Tensor], config: OpenVisionConfig) -> dict[str, Tensor]:
    """The released layout of our state dict, without what open_clip has no place for.

    That is the caption decoder, and the logit scale of sentences where they have their own.
    """
    vision = config.vision
    table = vision.positions(*vision.grid())
    converted = {_POSITIONS: torch.cat([torch.zeros(1, vision.width), table])}
    for name, tensor in state.items():
        if not name.startswith("decoder.") and name != "logit_scale_sentence":
            converted[_their_name(name)] = _to_theirs(name, tensor)
    return converted


def _our_name(name: str) -> str:
    block = _BLOCK.match(name)
    if block:
        tower = "vision" if block[1] else "text"
        return f"{tower}.blocks.{block[2]}.{_IN_BLOCK.get(block[3], block[3])}"
    if name.startswith("visual."):
        rest = name.removeprefix("visual.")
        return f"vision.{_VISION[rest]}" if rest in _VISION else name
    return _TEXT.get(name, name)


def _their_name(name: str) -> str:
    block = _OUR_BLOCK.match(name)
    if not block:
        return _OURS_OUTSIDE[name]
    prefix = "visual." if block[1] == "vision" else ""
    return f"{prefix}transformer.resblocks.{block[2]}.{_OURS_TO_IN_BLOCK[block[3]]}"


def _to_ours(name: str, tensor: Tensor) -> Tensor:
    if name in _TRANSPOSED:
        return tensor.T.contiguous()
    if name == "vision.cls_token":
        return tensor.reshape(1, 1, -1)
    if name == "text.pos_embed":
        return tensor.unsqueeze(0)
    return tensor


def _to_theirs(name: str, tensor: Tensor) -> Tensor:
    if name in _TRANSPOSED:
        return tensor.T.contiguous()
    if name == "vision.cls_token":
        return tensor.reshape(-1)
    if name == "text.pos_embed":
        return tensor.squeeze(0)
    return tensor


def _check_positions(table: Tensor, source: str) -> None:
    side = math.isqrt(len(table) - 1)
    if side * side != len(table) - 1:
        raise OpenVisionError(f"{source}: {len(table) - 1} positions are no square grid")
    if table.is_meta:
        return
    expected = sincos_position_table(side, side, table.shape[1])
    difference = (table[1:].float() - expected).abs().max().item()
    if table[0].abs().max().item() > _POSITION_TOLERANCE or not difference <= _POSITION_TOLERANCE:
        raise OpenVisionError(
            f"{source}: its positions differ by {difference:.2g} from OpenVision's fixed sin-cos table; "
            "this is a CLIP model of another family"
        )


def infer_vision_config(state: Mapping[str, Tensor], source: str) -> VisionConfig:
    """Shape of the vision tower from the tensors alone; heads by the table of sizes.

    Raises OpenVisionError when no size has such a tower: a wrong guess would give wrong features silently.
    """
    state = with_prefix(state)
    try:
        width = state["visual.class_embedding"].shape[0]
        positions = len(state[_POSITIONS]) - 1
        patch = state["visual.conv1.weight"].shape[-1]
        hidden = state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    except KeyError as error:
        raise OpenVisionError(f"{source} holds no vision tower in open_clip's layout: {error} is missing") from None
    depth = _depth(state, "visual.transformer")
    return _on_pixels_or_latents(
        state,
        VisionConfig(
            width=width,
            depth=depth,
            mlp_dim=hidden,
            heads=_heads(width, depth, source),
            patch_size=patch,
            image_size=math.isqrt(positions) * patch,
        ),
    )


def infer_config(state: Mapping[str, Tensor], source: str) -> OpenVisionConfig:
    """Shape of a two-tower model from the tensors alone."""
    vocabulary, width = state["token_embedding.weight"].shape
    depth = _depth(state, "transformer")
    return OpenVisionConfig(
        embed_dim=state["text_projection"].shape[1],
        vision=infer_vision_config(state, source),
        text=TextConfig(
            width=width,
            depth=depth,
            mlp_dim=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            heads=_heads(width, depth, source),
            vocab_size=vocabulary,
            context_length=len(state["positional_embedding"]),
        ),
        logit_bias="logit_bias" in state,
    )


def _depth(state: Mapping[str, Tensor], tower: str) -> int:
    prefix = f"{tower}.resblocks."
    numbers = {int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)}
    return max(numbers, default=-1) + 1


def _heads(width: int, depth: int, source: str) -> int:
    heads = known_heads(width, depth)
    if heads is None:
        raise OpenVisionError(
            f"{source}: no released size has a tower of width {width} and depth {depth}, so nothing says how many "
            f"heads it has; put the {CONFIG_FILE} of that model beside the weights"
        )
    return heads


def config_from_open_clip(content: JsonObject, state: Mapping[str, Tensor]) -> OpenVisionConfig:
    """Configuration from an `open_clip_config.json`; MLP widths, rounded ratios there, come from the tensors.

    Raises KeyError or TypeError on a file of another format.
    """
    model = content.get("model_cfg", content)
    text = model["text_cfg"]
    return OpenVisionConfig(
        embed_dim=model["embed_dim"],
        vision=vision_config_from_open_clip(content, state),
        text=TextConfig(
            width=text["width"],
            depth=text["layers"],
            mlp_dim=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            heads=text["heads"],
            vocab_size=text["vocab_size"],
            context_length=text["context_length"],
        ),
        logit_bias="logit_bias" in state,
    )


def vision_config_from_open_clip(content: JsonObject, state: Mapping[str, Tensor]) -> VisionConfig:
    """The vision tower's part of `config_from_open_clip`."""
    vision = content.get("model_cfg", content)["vision_cfg"]
    width, named = vision["width"], with_prefix(state)
    return _on_pixels_or_latents(
        named,
        VisionConfig(
            width=width,
            depth=vision["layers"],
            mlp_dim=named["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            heads=width // vision.get("head_width", 64),
            patch_size=vision["patch_size"],
            image_size=vision["image_size"],
        ),
    )


def _on_pixels_or_latents(state: Mapping[str, Tensor], config: VisionConfig) -> VisionConfig:
    """The shape as it is, or, where the patches have the channels of latents, in pixels before the autoencoder."""
    channels = state["visual.conv1.weight"].shape[1]
    if channels == config.input_channels:
        return config
    # OpenVision 3's files count patches and sides in latents.
    autoencoder = replace(DEMO_AUTOENCODER, channels=channels)
    sides = {name: getattr(config, name) * autoencoder.factor for name in ("patch_size", "image_size")}
    return LatentVisionConfig(**{**vars(config), **sides}, autoencoder=autoencoder)


def config_to_open_clip(config: OpenVisionConfig) -> JsonObject:
    """`open_clip_config.json` for stock open_clip, with preprocessing and the tokenizer's mode."""
    vision, text = config.vision, config.text
    norm = {"norm_kwargs": {"eps": LAYER_NORM_EPS}}
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "vision_cfg": {
                "image_size": vision.image_size,
                "layers": vision.depth,
                "width": vision.width,
                "patch_size": vision.patch_size,
                "head_width": vision.width // vision.heads,
                "mlp_ratio": mlp_ratio(vision.width, vision.mlp_dim),
                "no_ln_pre": True,
                "pool_type": "avg",
                "final_ln_after_pool": True,
                **norm,
            },
            "text_cfg": {
                "context_length": text.context_length,
                "vocab_size": text.vocab_size,
                "hf_tokenizer_name": "google-bert/bert-base-uncased",
                "tokenizer_mode": "clips",
                "width": text.width,
                "heads": text.heads,
                "layers": text.depth,
                "mlp_ratio": mlp_ratio(text.width, text.mlp_dim),
                "pool_type": "last",
                "no_causal_mask": True,
                "act_kwargs": {"approximate": "tanh"},
                **norm,
            },
            # open_clip has the parameter where its first value is given.
            **({"init_logit_bias": SIGMOID_BIAS} if config.logit_bias else {}),
        },
        "preprocess_cfg": {
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "interpolation": "bilinear",
            "resize_mode": "shortest",
        },
    }


def mlp_ratio(width: int, hidden: int) -> float:
    """A ratio r for which int(width * r) == hidden, as other libraries compute it (4304 / 1152 rounds down alone)."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
