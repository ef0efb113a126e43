"""Model folders: weights, shape, tokenizer and provenance.

model.safetensors   every parameter, float32
config.json         shape: `OpenVisionConfig`, `OpenVision2Config`, `OpenVision3Config` or `GenLipConfig` (its `kind`
                    says so), or a vision tower alone
tokenizer.json      the tokenizer it was trained with (where there is a text tower or a decoder)
recipe.toml         the resolved recipe of the run (where it was trained here)
autoencoder/        the frozen autoencoder of OpenVision 3, where `openvision autoencoder` trained it
README.md           the card of a model that was trained here
provenance.json     commit, data manifest, versions, seed, samples seen, or the source of a conversion
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from openvision.errors import OpenVisionError
from openvision.files import JsonObject, atomic_folder, read_json
from openvision.models.bounds import MAX_WIDTH
from openvision.models.genlip import KIND_GENLIP, GenLip, GenLipConfig
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.openvision2 import KIND, AnyModel, ModelConfig, OpenVision2, OpenVision2Config, build_model
from openvision.models.openvision3 import KIND3, OpenVision3, OpenVision3Config, build_vision, vision_config
from openvision.models.vision import VisionConfig, VisionTransformer
from openvision.text.tokenizer import Tokenizer
from openvision.untrusted import check_count
from openvision.weights.model_card import front_matter, task_of, training_sections
from openvision.weights.strict import assign_strictly
from openvision.weights.tensors import read_tensors

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
AUTOENCODER = "autoencoder"
"""Folder of the autoencoder of an OpenVision 3 model in a model folder, where it is the project's own."""
_VISION = "vision."


def save_folder(
    folder: Path,
    model: AnyModel | VisionTransformer,
    tokenizer: Tokenizer | None,
    recipe_toml: str,
    provenance: JsonObject,
) -> None:
    """Write `model` as a folder, atomically; a vision tower has no tokenizer."""
    with atomic_folder(folder) as temporary:
        prefix, config = _named(model)
        state = {f"{prefix}{name}": tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        _keep_autoencoder(config, temporary)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if recipe_toml:
            (temporary / "recipe.toml").write_text(recipe_toml)
        (temporary / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(temporary)
        if recipe_toml:
            (temporary / "README.md").write_text(_card(model, provenance, temporary))


def _card(model: AnyModel | VisionTransformer, provenance: JsonObject, folder: Path) -> str:
    has_text, captions = getattr(model, "text", None) is not None, isinstance(model, OpenVision2 | OpenVision3 | GenLip)
    load = "load" if has_text else "load_captioner" if captions else "load_vision"
    vision = model if isinstance(model, VisionTransformer) else model.vision
    native = ', preprocessing="native"' if vision.config.aspects else ""
    return f"""{front_matter(task_of(has_text, captions))}
# OpenVision model

```python
import openvision
model = openvision.{load}("FOLDER"{native})
```

{training_sections(provenance, folder)}"""


def _named(model: AnyModel | VisionTransformer) -> tuple[str, JsonObject]:
    """Prefix of the tensor names, and the content of config.json."""
    if not isinstance(model, VisionTransformer):
        return "", model.config.to_dict()
    embed_dim = model.head.out_features if model.head is not None else None
    return _VISION, {"embed_dim": embed_dim, "vision": model.config.to_dict()}


def _keep_autoencoder(config: JsonObject, folder: Path) -> None:
    """Copy an autoencoder of our own, which nobody else has, into a model folder, and say so in its `config`."""
    settings = config["vision"].get("autoencoder")
    if settings and settings["kind"] == "conv":
        source = Path(settings["source"]).expanduser()
        if not all((source / name).is_file() for name in (CONFIG, WEIGHTS)):
            raise OpenVisionError(
                f"autoencoder {source} is no longer there, and the model cannot be used without it; restore it and run "
                "the same command"
            )
        (folder / AUTOENCODER).mkdir()
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(source / name, folder / AUTOENCODER / name)
        settings["source"] = AUTOENCODER


def load_folder(folder: Path) -> tuple[OpenVision, Tokenizer, JsonObject]:
    """Read a folder of a whole model: the model in eval mode, its tokenizer, its provenance.

    Raises OpenVisionError naming the file that is missing, broken or of another shape.
    """
    model, tokenizer, provenance = load_any_folder(folder)
    if model.text is None:
        raise OpenVisionError(
            f"{folder} has a model that only captions and has no text tower: images cannot be compared with texts; "
            "load its vision tower with openvision.load_vision, or caption with openvision.load_captioner"
        )
    if isinstance(model, OpenVision3):
        raise OpenVisionError(f"{folder} has an OpenVision 3 model; this needs one of version 1")
    return model, tokenizer, provenance


def load_any_folder(folder: Path) -> tuple[AnyModel, Tokenizer, JsonObject]:
    """`load_folder` for models of either version; raises OpenVisionError for a vision tower alone."""
    config = read_config(folder)
    if isinstance(config, tuple):
        raise OpenVisionError(f"{folder} has a vision tower only; this needs a whole model")
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
        tower = build_vision(vision, embed_dim)
    state = read_tensors(folder / WEIGHTS)
    own = {name.removeprefix(_VISION): tensor for name, tensor in state.items() if name.startswith(_VISION)}
    assign_strictly(tower, own, str(folder / WEIGHTS))
    return tower.eval()


def read_config(folder: Path) -> ModelConfig | tuple[VisionConfig, int | None]:
    """Shape of the model in a folder: of a whole model, or of a vision tower and its embedding width."""
    path = folder / CONFIG
    if not (path.is_symlink() or path.exists()):
        raise OpenVisionError(f"{folder} is not a model folder: it has no {CONFIG}; train one with `make quickstart`")
    content = read_json(path)
    try:
        settings = content.get("vision", {}).get("autoencoder")
        if settings and settings["source"] == AUTOENCODER:
            settings["source"] = str(folder / AUTOENCODER)
        if content.get("kind") == KIND:
            return OpenVision2Config.from_dict(content)
        if content.get("kind") == KIND3:
            return OpenVision3Config.from_dict(content)
        if content.get("kind") == KIND_GENLIP:
            return GenLipConfig.from_dict(content)
        if "text" in content or "vision" not in content:
            return OpenVisionConfig.from_dict(content)
        width = content["embed_dim"]
        return vision_config(content["vision"]), None if width is None else check_count(
            "embed_dim", width, 1, MAX_WIDTH
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise OpenVisionError(f"{path} does not describe an OpenVision model: {reason}") from error


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, source: str) -> None:
    """Raise OpenVisionError when the tokenizer has more entries than the model embeds."""
    entries = config.decoder.vocab_size if config.text is None else config.text.vocab_size
    if tokenizer.vocab_size > entries:
        raise OpenVisionError(f"{source}: the tokenizer has {tokenizer.vocab_size} entries, the model only {entries}")


def read_provenance(folder: Path) -> JsonObject:
    """Content of provenance.json; empty if there is none."""
    path = folder / "provenance.json"
    return read_json(path) if path.is_symlink() or path.exists() else {}
