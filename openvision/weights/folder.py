"""A model as a folder: weights, shape, tokenizer, and where it came from.

model.safetensors   every parameter, float32
config.json         shape: `OpenVisionConfig`, `OpenVision2Config` (its `kind` says so), or a vision tower alone
tokenizer.json      the WordPiece tokenizer it was trained with (where there is a text tower or a decoder)
recipe.toml         the resolved recipe of the run (where it was trained here)
provenance.json     commit, data manifest, versions, seed, samples seen, or what it was converted from
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from openvision.errors import OpenVisionError
from openvision.files import atomic_folder
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.openvision2 import KIND, ModelConfig, OpenVision2, OpenVision2Config, build_model
from openvision.models.vision import VisionConfig, VisionTransformer
from openvision.text.tokenizer import Tokenizer
from openvision.weights.strict import assign_strictly
from openvision.weights.tensors import read_tensors

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_VISION = "vision."


def save_folder(
    folder: Path,
    model: OpenVision | OpenVision2 | VisionTransformer,
    tokenizer: Tokenizer | None,
    recipe_toml: str,
    provenance: dict[str, Any],
) -> None:
    """Write `model` as a folder, completely or not at all; a vision tower alone has no tokenizer."""
    with atomic_folder(folder) as temporary:
        prefix, config = _named(model)
        state = {f"{prefix}{name}": tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if recipe_toml:
            (temporary / "recipe.toml").write_text(recipe_toml)
        (temporary / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(temporary)


def _named(model: OpenVision | OpenVision2 | VisionTransformer) -> tuple[str, dict[str, Any]]:
    """What tensor names begin with, and the content of config.json."""
    if not isinstance(model, VisionTransformer):
        return "", model.config.to_dict()
    embed_dim = model.head.out_features if model.head is not None else None
    return _VISION, {"embed_dim": embed_dim, "vision": asdict(model.config)}


def load_folder(folder: Path) -> tuple[OpenVision, Tokenizer, dict[str, Any]]:
    """Read a folder of a whole model: the model in eval mode, its tokenizer, its provenance.

    Raises OpenVisionError naming the file that is missing, broken or of another shape.
    """
    model, tokenizer, provenance = load_any_folder(folder)
    if model.text is None:
        raise OpenVisionError(
            f"{folder} holds an OpenVision 2 model, which has no text tower: pictures cannot be compared with texts; "
            "load its vision tower with openvision.load_vision, or caption with openvision.load_captioner"
        )
    return model, tokenizer, provenance


def load_any_folder(folder: Path) -> tuple[OpenVision | OpenVision2, Tokenizer, dict[str, Any]]:
    """`load_folder` for models of either version; raises OpenVisionError for a vision tower alone."""
    config = read_config(folder)
    if isinstance(config, tuple):
        raise OpenVisionError(f"{folder} holds a vision tower alone; this needs a whole model")
    with torch.device("meta"):
        model = build_model(config)
    assign_strictly(model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
    tokenizer = Tokenizer.load(folder)
    check_vocabulary(tokenizer, config, str(folder))
    return model.eval(), tokenizer, read_provenance(folder)


def load_vision_folder(folder: Path) -> VisionTransformer:
    """Read the vision tower of a folder, in eval mode; the other towers' tensors are never touched."""
    config = read_config(folder)
    if isinstance(config, tuple):
        vision, embed_dim = config
    else:
        vision, embed_dim = config.vision, config.embed_dim
    with torch.device("meta"):
        tower = VisionTransformer(vision, embed_dim)
    state = read_tensors(folder / WEIGHTS)
    own = {name.removeprefix(_VISION): tensor for name, tensor in state.items() if name.startswith(_VISION)}
    assign_strictly(tower, own, str(folder / WEIGHTS))
    return tower.eval()


def read_config(folder: Path) -> ModelConfig | tuple[VisionConfig, int | None]:
    """Shape of the model in a folder: of a whole model, or of a vision tower and its embedding width."""
    path = folder / CONFIG
    if not path.is_file():
        raise OpenVisionError(f"{folder} is not a model folder: it has no {CONFIG}; train one with `make quickstart`")
    try:
        content = json.loads(path.read_text())
        if content.get("kind") == KIND:
            return OpenVision2Config.from_dict(content)
        if "text" in content or "vision" not in content:
            return OpenVisionConfig.from_dict(content)
        return VisionConfig(**content["vision"]), content["embed_dim"]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise OpenVisionError(f"{path} does not describe an OpenVision model: {error}") from error


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, source: str) -> None:
    """Raise OpenVisionError when the tokenizer knows more entries than the model embeds."""
    entries = config.decoder.vocab_size if config.text is None else config.text.vocab_size
    if tokenizer.vocab_size > entries:
        raise OpenVisionError(f"{source}: the tokenizer has {tokenizer.vocab_size} entries, the model only {entries}")


def read_provenance(folder: Path) -> dict[str, Any]:
    """Content of provenance.json; empty without one."""
    path = folder / "provenance.json"
    return json.loads(path.read_text()) if path.is_file() else {}
