"""State dicts in the released layout, with random weights, by the rule of spec section 8 and not by our own code."""

import torch
from torch import Tensor

from openvision.models.layers import sincos_position_table
from openvision.models.openvision import OpenVisionConfig
from openvision.models.vision import VisionConfig


def released_shapes(config: OpenVisionConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released two-tower file."""
    text, vision = config.text, config.vision
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (text.context_length, text.width),
        "text_projection": (text.width, config.embed_dim),
        "logit_scale": (),
        "token_embedding.weight": (text.vocab_size, text.width),
        "ln_final.weight": (text.width,),
        "ln_final.bias": (text.width,),
        **{f"visual.{name}": shape for name, shape in vision_shapes(vision, config.embed_dim).items()},
    }
    for index in range(text.depth):
        shapes |= _block(f"transformer.resblocks.{index}", text.width, text.mlp_dim)
    return shapes


def vision_shapes(vision: VisionConfig, embed_dim: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a vision tower alone."""
    rows, columns = vision.grid()
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (vision.width,),
        "positional_embedding": (rows * columns + 1, vision.width),
        "proj": (vision.width, embed_dim),
        "conv1.weight": (vision.width, 3, vision.patch_size, vision.patch_size),
        "ln_post.weight": (vision.width,),
        "ln_post.bias": (vision.width,),
    }
    for index in range(vision.depth):
        shapes |= _block(f"transformer.resblocks.{index}", vision.width, vision.mlp_dim)
    return shapes


def _block(prefix: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    leaves: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (hidden, width),
        "mlp.c_fc.bias": (hidden,),
        "mlp.c_proj.weight": (width, hidden),
        "mlp.c_proj.bias": (width,),
    }
    return {f"{prefix}.{leaf}": shape for leaf, shape in leaves.items()}


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a plausible size, the sin-cos table where positions are fixed."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: _random(name, shape, generator) for name, shape in shapes.items()}
    positions = "visual.positional_embedding" if "visual.proj" in shapes else "positional_embedding"
    count, width = shapes[positions]
    side = round((count - 1) ** 0.5)
    state[positions] = torch.cat([torch.zeros(1, width), sincos_position_table(side, side, width)])
    return state


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name == "logit_scale":
        return torch.tensor(3.0)
    values = torch.randn(shape, generator=generator)
    if ".ln_" in name or "ln_" in name.split(".")[0]:
        return 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
    return values * 0.03
