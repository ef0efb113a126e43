"""The vision tower as a stock timm VisionTransformer: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

timm's names are ours. It adds biases that OpenVision does not have, written as zeros, and keeps the positions of one
resolution as a parameter; average pooling with `fc_norm`, or the attention pool, and the head give the embedding
before normalisation. With an attention pool timm norms the tokens that it hands on; registers have no positions.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from openvision.errors import require
from openvision.models.vision import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer
from openvision.weights.export.parity import Parity, compare, example_images
from openvision.weights.load import Checkpoint
from openvision.weights.open_clip import mlp_ratio

# Any plain ViT of timm's registry: the arguments below decide everything about it.
_ARCHITECTURE = "vit_base_patch16_224"


def write_timm(checkpoint: Checkpoint, folder: Path) -> None:
    """Write model.safetensors and config.json as timm's own hub files are."""
    vision = checkpoint.vision
    save_file(to_timm(vision), folder / "model.safetensors", metadata={"format": "pt"})
    config, side = vision.config, vision.config.image_size
    pool = "avg" if config.pool == "mean" else "map"
    classes = vision.head.out_features if vision.head is not None else 0
    content = {
        "architecture": _ARCHITECTURE,
        "num_classes": classes,
        "num_features": config.width,
        "global_pool": pool,
        "model_args": {
            "img_size": side,
            "patch_size": config.patch_size,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
            "mlp_ratio": mlp_ratio(config.width, config.mlp_dim),
            "global_pool": pool,
            "fc_norm": pool == "avg",
            "reg_tokens": config.registers,
            "num_classes": classes,
        },
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "num_classes": classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        },
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def to_timm(vision: VisionTransformer) -> dict[str, Tensor]:
    """State dict of timm's VisionTransformer for the tower's own resolution."""
    config = vision.config
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in vision.state_dict().items()}
    table = config.positions(*config.grid())
    state["pos_embed"] = torch.cat([torch.zeros(config.prefix_tokens, config.width), table])[None]
    if config.pool == "map":
        # There the final norm comes before the pool, under another name.
        state = {name.replace("fc_norm.", "norm."): tensor for name, tensor in state.items()}
    state["patch_embed.proj.bias"] = torch.zeros(config.width)
    if vision.head is not None:
        state["head.bias"] = torch.zeros(vision.head.out_features)
    return state


def check_timm(checkpoint: Checkpoint, folder: Path) -> list[Parity]:
    """Load the folder with stock timm, strictly, and compare tokens and embedding."""
    timm = require("timm", extra="timm")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = example_images(checkpoint.vision)
    with torch.inference_mode():
        ours = checkpoint.vision.forward_features(images)
        tokens = theirs.forward_features(images)
        normed = checkpoint.vision.config.pool == "map"
        patches = checkpoint.vision.fc_norm(ours.patch_tokens) if normed else ours.patch_tokens
        results = [compare("patch tokens", patches, tokens[:, theirs.num_prefix_tokens :])]
        if checkpoint.vision.head is not None:
            results.append(compare("embedding", checkpoint.vision.project(ours.pooled), theirs(images)))
        else:
            results.append(compare("pooled", ours.pooled, theirs(images)))
    return results
