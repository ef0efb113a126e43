"""Load any checkpoint: released name, Hub id, folder or file, in any known layout.

| source                                        | layout                                        |
|-----------------------------------------------|-----------------------------------------------|
| `openvision-vit-large-patch14-224`, `org/name` | Hub repository in open_clip's layout           |
| folder with `config.json`, or a run           | model folder of this project; that of the run |
| folder with `open_clip_config.json`           | open_clip's                                   |
| folder written by Orbax, or above it          | the original's JAX tree, of its newest step   |
| `.safetensors`, `.bin`, `.pt`, `.pth`         | open_clip's, or this project's                |
| `.npz`                                        | the original's JAX tree, flat                 |

Loading is strict: a tensor that is missing, extra or of another shape is an error that lists it.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from openvision.errors import OpenVisionError
from openvision.files import JsonObject, check_file, read_json
from openvision.models.genlip import GenLip
from openvision.models.openvision import OpenVision
from openvision.models.openvision2 import AnyModel, OpenVision2
from openvision.models.openvision3 import LatentVisionConfig, OpenVision3, build_vision
from openvision.models.vision import VisionConfig, VisionTransformer
from openvision.text.tokenizer import FILE_NAME, Tokenizer
from openvision.weights import folder as own
from openvision.weights import hub, jax, open_clip
from openvision.weights.registry import Released, available_models, released, released_in
from openvision.weights.strict import assign_strictly
from openvision.weights.tensors import read_npz, read_tensors

_RECIPE = "recipe.toml"
_VOCABULARY_FILES = (FILE_NAME, "vocab.txt")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint, in eval mode, float32 on CPU."""

    vision: VisionTransformer
    """The vision tower; part of `model` or `captioner` if there is one."""
    model: OpenVision | None
    """The contrastive model; None when the source has, or the request wants, a vision tower only."""
    tokenizer: Tokenizer | None
    """None without text tower and decoder, or when the weights came without a vocabulary."""
    source: str
    """What was loaded, for messages."""
    provenance: JsonObject
    captioner: OpenVision2 | GenLip | None = None
    """The OpenVision 2 or GenLIP model, which has no text tower; `model` is None then."""
    unified: OpenVision3 | None = None
    """The OpenVision 3 model; `model` and `captioner` are None then."""

    @property
    def any_model(self) -> AnyModel | None:
        """The whole model, of whichever version; None for a vision tower alone."""
        return self.model or self.captioner or self.unified


@dataclass(frozen=True)
class Request:
    """Options of loading."""

    vision_only: bool = False
    """Load the vision tower only."""
    vocabulary: Path | None = None
    """Vocabulary for a checkpoint without one: vocab.txt or tokenizer.json of bert-base-uncased."""
    image_size: int | None = None
    """Trained resolution of a JAX tree in pixels, which the tree does not contain."""
    decoder: bool = False
    """From the Hub: read the JAX tree, the only layout with the caption decoder."""
    revision: str | None = None
    """From the Hub: branch, tag or commit."""
    offline: bool = False
    """From the Hub: use the local cache only."""
    autoencoder: str | None = None
    """Folder or Hub id of the autoencoder of an OpenVision 3 encoder, instead of the one it names."""


def load_checkpoint(source: str | Path, request: Request | None = None) -> Checkpoint:
    """Load `source`; raises OpenVisionError that names what is wrong and the remedy."""
    request = request or Request()
    loaded = _load(source, request)
    if request.autoencoder is not None:
        _replace_autoencoder(loaded, request.autoencoder)
    return loaded


def _replace_autoencoder(loaded: Checkpoint, source: str) -> None:
    config = loaded.vision.config
    if not isinstance(config, LatentVisionConfig):
        raise OpenVisionError(f"{loaded.source} sees pixels and has no autoencoder; leave the autoencoder out")
    config = replace(config, autoencoder=replace(config.autoencoder, source=source))
    loaded.vision.config = config
    if loaded.unified is not None:
        loaded.unified.config = replace(loaded.unified.config, vision=config)


def _load(source: str | Path, request: Request) -> Checkpoint:
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path, request)
    if path.is_file():
        return _from_file(path, request)
    if path.is_symlink() or path.exists():
        check_file(path)
    if hub.is_path(source):
        raise OpenVisionError(f"checkpoint {source} does not exist; `openvision train` writes one to RUN/model")
    name = str(source)
    if "/" in name:
        return _from_hub(name, released_in(name), request)
    entry = released(name)
    return _from_hub(entry.repository, entry, request)


def vision_shape(source: str | Path) -> VisionConfig:
    """Shape of the vision tower of `source`; a released one is known without its weights."""
    if str(source) in available_models() and not Path(source).exists():
        return released(str(source)).vision
    return load_checkpoint(source, Request(vision_only=True)).vision.config


def _from_folder(path: Path, request: Request) -> Checkpoint:
    if (path / own.CONFIG).is_file() and (path / own.WEIGHTS).is_file():
        return _own_folder(path, request)
    if (path / open_clip.CONFIG_FILE).is_file():
        weights = next((path / name for name in open_clip.WEIGHT_FILES if (path / name).is_file()), None)
        if weights is None:
            raise OpenVisionError(f"{path} has no weights: none of {', '.join(open_clip.WEIGHT_FILES)}")
        return _open_clip(weights, path / open_clip.CONFIG_FILE, request, str(path))
    if (path / "model" / own.CONFIG).is_file():
        return _own_folder(path / "model", request)
    if path.suffix == ".npz" or jax.find_orbax(path) is not None:
        return _jax(jax.read_orbax(path), request, str(path))
    if (path / _RECIPE).is_file() and (path / "checkpoints").is_dir():
        raise OpenVisionError(
            f"{path} is a run that has not finished, so it has no model yet; resume it, or take its newest checkpoint: "
            f"openvision checkpoint export {path} -o MODEL"
        )
    raise OpenVisionError(
        f"{path} is not a model folder: it has neither {own.CONFIG} with {own.WEIGHTS} nor {open_clip.CONFIG_FILE}; "
        "train one with `make quickstart`"
    )


def _own_folder(path: Path, request: Request) -> Checkpoint:
    if request.vision_only or isinstance(own.read_config(path), tuple):
        return Checkpoint(own.load_vision_folder(path), None, None, str(path), own.read_provenance(path))
    model, tokenizer, provenance = own.load_any_folder(path)
    if isinstance(model, OpenVision3):
        return Checkpoint(model.vision, None, tokenizer, str(path), provenance, unified=model)
    if isinstance(model, OpenVision):
        return Checkpoint(model.vision, model, tokenizer, str(path), provenance)
    return Checkpoint(model.vision, None, tokenizer, str(path), provenance, model)


def _from_file(path: Path, request: Request) -> Checkpoint:
    if path.suffix == ".npz":
        return _jax(read_npz(path), request, str(path))
    if path.name == own.WEIGHTS and (path.parent / own.CONFIG).is_file():
        return _own_folder(path.parent, request)
    config = path.parent / open_clip.CONFIG_FILE
    return _open_clip(path, config if config.is_file() else None, request, str(path))


def _from_hub(repository: str, entry: Released | None, request: Request) -> Checkpoint:
    where = {"revision": request.revision, "offline": request.offline}
    if request.decoder:
        tree = jax.read_orbax(hub.fetch_folder(repository, jax.ORBAX_FOLDER, **where))
        size = entry.vision.image_size if entry else request.image_size
        return _jax(tree, replace(request, image_size=size), repository)
    weights = hub.fetch(repository, open_clip.WEIGHT_FILES, **where)
    config = hub.fetch(repository, (open_clip.CONFIG_FILE,), **where)
    if request.vocabulary is None and not request.vision_only and entry is not None and entry.full is not None:
        request = replace(request, vocabulary=hub.fetch(repository, _VOCABULARY_FILES, **where))
    loaded = _open_clip(weights, config, request, repository)
    if entry is not None and entry.embed_dim is None:
        loaded = _without_head(loaded)
    if entry is not None and loaded.vision.config != entry.vision:
        raise OpenVisionError(f"{repository} has {loaded.vision.config}, but {entry.name} is {entry.vision}")
    return loaded


def _open_clip(weights: Path, config_file: Path | None, request: Request, source: str) -> Checkpoint:
    state = read_tensors(weights)
    content = read_json(config_file) if config_file else {}
    try:
        if request.vision_only or open_clip.is_vision_only(state):
            return _open_clip_vision(state, content, request, source)
        converted = open_clip.from_open_clip(state, source)
        config = open_clip.config_from_open_clip(content, state) if content else open_clip.infer_config(state, source)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise OpenVisionError(f"{config_file or weights} does not describe an OpenVision model: {reason}") from error
    with torch.device("meta"):
        model = OpenVision(config)
    assign_strictly(model, converted, source)
    tokenizer = _tokenizer(request, weights.parent)
    if tokenizer is not None:
        own.check_vocabulary(tokenizer, config, source)
    return Checkpoint(model.eval().vision, model, tokenizer, source, {"converted_from": source})


def _open_clip_vision(state: dict[str, torch.Tensor], content: JsonObject, request: Request, source: str) -> Checkpoint:
    if not any(name.endswith("conv1.weight") for name in state):
        found = ", ".join(sorted(state)[:3])
        raise OpenVisionError(f"{source} has no vision tower (its first tensors: {found}); is it a text model?")
    alone = open_clip.is_vision_only(state)
    named = open_clip.with_prefix(state)
    if not alone:
        named = {name: tensor for name, tensor in named.items() if name.startswith("visual.")}
    converted = open_clip.from_open_clip(named, source)
    if content:
        config = open_clip.vision_config_from_open_clip(content, named)
    else:
        config = open_clip.infer_vision_config(named, source)
    return _vision_checkpoint(config, converted, source)


def _vision_checkpoint(config: VisionConfig, state: dict[str, torch.Tensor], source: str) -> Checkpoint:
    """A vision tower from tensors named `vision.*`; any other name among them is listed as extra."""
    head = state.get("vision.head.weight")
    with torch.device("meta"):
        tower = build_vision(config, len(head) if head is not None else None)
    assign_strictly(tower, {name.removeprefix("vision."): tensor for name, tensor in state.items()}, source)
    return Checkpoint(tower.eval(), None, None, source, {"converted_from": source})


def _without_head(loaded: Checkpoint) -> Checkpoint:
    """OpenVision 2 was trained without a head; the square matrix in its files was never trained (spec section 8)."""
    loaded.vision.head = None
    return loaded


def _jax(tree: dict[str, np.ndarray], request: Request, source: str) -> Checkpoint:
    tree = jax.parameters_of(tree)
    if request.image_size is None:
        raise OpenVisionError(
            f"{source} is a JAX tree, which does not contain its trained resolution; give image_size "
            "(--image-size on the command line)"
        )
    if request.vision_only or jax.is_openvision2(tree):
        config = jax.infer_vision_config(tree, request.image_size, source)
        image = {name: array for name, array in tree.items() if name.startswith("img/")}
        return _vision_checkpoint(config, jax.consume_jax(image), source)
    config = jax.infer_config(tree, request.image_size, source)
    with torch.device("meta"):
        model = OpenVision(config)
    assign_strictly(model, jax.consume_jax(tree), source)
    tokenizer = _tokenizer(request, None)
    return Checkpoint(model.eval().vision, model, tokenizer, source, {"converted_from": source})


def _tokenizer(request: Request, beside: Path | None) -> Tokenizer | None:
    """The tokenizer of released weights, from the given vocabulary or from one beside the weights."""
    if request.vocabulary is not None:
        return Tokenizer.from_vocabulary(request.vocabulary)
    found = [beside / name for name in _VOCABULARY_FILES if (beside / name).is_file()] if beside else []
    return Tokenizer.from_vocabulary(found[0]) if found else None
