"""A model as a folder: weights, shape, tokenizer, and where it came from.

model.safetensors   every parameter, float32
config.json         shape (`OpenVisionConfig`)
tokenizer.json      the WordPiece tokenizer it was trained with
recipe.toml         the resolved recipe of the run
provenance.json     commit, data manifest, versions, seed, samples seen
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from openvision.errors import OpenVisionError
from openvision.files import atomic_folder
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.text.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def save_folder(
    folder: Path, model: OpenVision, tokenizer: Tokenizer, recipe_toml: str, provenance: dict[str, Any]
) -> None:
    """Write `model` as a folder, completely or not at all."""
    with atomic_folder(folder) as temporary:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
        (temporary / "recipe.toml").write_text(recipe_toml)
        (temporary / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        tokenizer.save(temporary)


def load_folder(folder: Path) -> tuple[OpenVision, Tokenizer, dict[str, Any]]:
    """Read a model folder: the model in eval mode, its tokenizer, its provenance.

    Raises OpenVisionError naming the file that is missing, broken or of another shape.
    """
    if not (folder / CONFIG).is_file():
        raise OpenVisionError(f"{folder} is not a model folder: it has no {CONFIG}; train one with `make quickstart`")
    config = _read_config(folder / CONFIG)
    with torch.device("meta"):
        model = OpenVision(config)
    _load_strictly(model, folder / WEIGHTS)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.text.vocab_size:
        raise OpenVisionError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} entries, the model only {config.text.vocab_size}"
        )
    provenance = folder / "provenance.json"
    info = json.loads(provenance.read_text()) if provenance.is_file() else {}
    return model.eval(), tokenizer, info


def _read_config(path: Path) -> OpenVisionConfig:
    try:
        return OpenVisionConfig.from_dict(json.loads(path.read_text()))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise OpenVisionError(f"{path} does not describe an OpenVision model: {error}") from error


def _load_strictly(model: OpenVision, path: Path) -> None:
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise OpenVisionError(f"{path} does not exist; the model folder is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise OpenVisionError(f"{path} is not a readable safetensors file: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not part of the model" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {found[name]} instead of {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise OpenVisionError(f"{path} does not fit {CONFIG}, a checkpoint of another size? {shown}{more}")
    model.load_state_dict(state, assign=True)
