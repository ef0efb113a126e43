"""A vision tower for a language model: OpenVision as an exact `ViTModel`, or a stock CLIP, SigLIP or ViT.

What no stock class can hold, GenLIP and OpenVision 3, is a class of ours (own_tower.py).
"""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from openvision.errors import OpenVisionError
from openvision.models.flops import patches_of
from openvision.models.genlip import GenLipVisionConfig
from openvision.models.openvision3 import LatentVisionConfig
from openvision.models.vision import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer
from openvision.multimodal.model.geometry import Geometry
from openvision.multimodal.model.huggingface import Pretrained, quiet, transformers
from openvision.multimodal.model.native import native_shapes
from openvision.multimodal.model.own_tower import wrap
from openvision.weights.export.targets import ExportOptions, export
from openvision.weights.load import Checkpoint, Request, load_checkpoint

# Tokens before the patches, by the model type of a stock vision tower.
PREFIX_TOKENS = {"vit": 1, "clip_vision_model": 1, "siglip_vision_model": 0}
_WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
_CLASSES = {
    "vit": ("ViTModel", {"add_pooling_layer": True}),
    "clip_vision_model": ("CLIPVisionModel", {}),
    "siglip_vision_model": ("SiglipVisionModel", {}),
}


BILINEAR = 2
"""Pillow's number of the filter that images are resized with in training."""
OF_THE_SQUARE = 0
"""A budget of as many patches as the encoder's square has."""


@dataclass(frozen=True)
class VisionTower:
    """A stock vision model in eval mode, float32 on CPU, and the image preprocessing that it expects."""

    model: Pretrained
    geometry: Geometry
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    resample: int
    """Pillow's number of the resampling filter."""
    source: str


def load_tower(
    source: str | Path, request: Request | None = None, check: bool = True, max_tokens: int | None = None
) -> VisionTower:
    """Load a vision tower.

    A folder of transformers of type vit, clip or siglip is loaded as it is. Any other `source` is an OpenVision
    checkpoint: it is converted to a `ViTModel`, whose outputs are compared with the original's unless `check` is False.
    With `max_tokens` it reads images of native shapes, within this budget of patches or `OF_THE_SQUARE`. Raises
    OpenVisionError for a folder of another type, with tensors missing or, with `max_tokens`, of a stock tower.
    """
    kind = _stock_type(Path(source))
    if kind is not None and max_tokens is not None:
        raise OpenVisionError(
            f"{source} is a stock {kind}, whose positions are of one grid: it cannot take images of native shapes; use "
            "an OpenVision encoder, or the framework llava-1.5 or llava-next"
        )
    if kind is not None:
        return _stock_tower(Path(source), kind)
    loaded = load_checkpoint(source, request or Request(vision_only=True))
    return tower_of(loaded, check, max_tokens)


def tower_of(checkpoint: Checkpoint, check: bool = True, max_tokens: int | None = None) -> VisionTower:
    """Convert a loaded OpenVision checkpoint to a `ViTModel`, or to our own class where no stock one can hold it.

    With `max_tokens`, a budget of patches for images of native shapes or `OF_THE_SQUARE`, it is our own class.
    """
    if max_tokens is not None or isinstance(checkpoint.vision.config, GenLipVisionConfig | LatentVisionConfig):
        return _own_tower(checkpoint, max_tokens)
    if not checkpoint.vision.config.is_published:
        raise OpenVisionError(
            f"{checkpoint.source} has registers or pools by attention, for which the towers of llava-1.5 and "
            "llava-next have no place; build it with --framework llava-native, which keeps our own"
        )
    vision = Checkpoint(checkpoint.vision, None, None, checkpoint.source, checkpoint.provenance)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "vit"
        export(vision, "transformers", folder, ExportOptions(check=check))
        tower = _stock_tower(folder, "vit")
    _agree(tower, checkpoint.vision)
    return replace(tower, source=checkpoint.source)


def _own_tower(checkpoint: Checkpoint, max_tokens: int | None) -> VisionTower:
    config = checkpoint.vision.config
    if max_tokens == OF_THE_SQUARE:
        max_tokens = patches_of(config, config.image_size)
    shapes = None if max_tokens is None else native_shapes(config.patch_size, max_tokens, config.aspects)
    prefix = config.prefix_tokens if shapes is None else 0
    geometry = Geometry(config.image_size, config.patch_size, prefix, config.width, config.depth, native=shapes)
    native = None if max_tokens is None else {"max_tokens": max_tokens}
    # An autoencoder is given pixels in [-1, 1].
    latent = isinstance(config, LatentVisionConfig)
    mean, deviation = ((0.5,) * 3, (0.5,) * 3) if latent else (IMAGENET_MEAN, IMAGENET_STD)
    return VisionTower(wrap(checkpoint.vision, native), geometry, mean, deviation, BILINEAR, checkpoint.source)


def _agree(tower: VisionTower, vision: VisionTransformer) -> None:
    config = vision.config
    expected = (config.image_size, config.patch_size, config.width, config.depth, config.grid()[0] * config.grid()[1])
    geometry = tower.geometry
    found = (geometry.image_size, geometry.patch_size, geometry.width, geometry.depth, geometry.patches)
    if expected != found:
        raise OpenVisionError(f"the exported tower has (pixels, patch, width, depth, tokens) {found}, not {expected}")


def _stock_type(path: Path) -> str | None:
    """Model type of a vision tower in transformers' format, or None for anything else."""
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = content.get("model_type")
    kind = _WHOLE.get(kind, kind)
    if kind is not None and kind not in PREFIX_TOKENS:
        raise OpenVisionError(
            f"{path} holds a model of type {kind!r}; a vision tower is an OpenVision checkpoint or one of "
            f"{', '.join(PREFIX_TOKENS)}"
        )
    return kind


def _stock_tower(path: Path, kind: str) -> VisionTower:
    name, settings = _CLASSES[kind]
    with quiet():
        model, report = getattr(transformers(), name).from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **settings
        )
    missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    if missing or report["mismatched_keys"]:
        raise OpenVisionError(f"{path} lacks tensors of a {name}: {missing or report['mismatched_keys']}")
    config = model.eval().config
    # The path on this machine must not be saved.
    config._name_or_path = ""
    if kind == "vit":
        # The pooler is not read, and the exact export has none: zeros instead of random values.
        for parameter in model.pooler.parameters():
            parameter.data.zero_()
    geometry = Geometry(
        config.image_size, config.patch_size, PREFIX_TOKENS[kind], config.hidden_size, config.num_hidden_layers
    )
    with torch.inference_mode():
        blank = torch.zeros(1, 3, geometry.image_size, geometry.image_size)
        found = model(pixel_values=blank).last_hidden_state.shape[1]
    if found != geometry.tower_tokens:
        raise OpenVisionError(
            f"{path} returns {found} tokens for an image; its configuration says {geometry.tower_tokens}"
        )
    return VisionTower(model, geometry, *_preparation(path), str(path))


def _preparation(path: Path) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    try:
        with quiet():
            found = transformers().AutoImageProcessor.from_pretrained(path)
        return tuple(found.image_mean), tuple(found.image_std), int(found.resample)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise OpenVisionError(
            f"{path} has no image preprocessing ({error}); copy preprocessor_config.json from the original "
            "folder of the tower"
        ) from error
