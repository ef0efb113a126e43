"""`openvision export`: write an encoder in another library's format, load it there and compare."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from openvision.errors import OpenVisionError
from openvision.files import atomic_folder
from openvision.models.genlip import GenLip, GenLipVisionConfig
from openvision.models.openvision import OpenVision
from openvision.models.openvision2 import OpenVision2, build_model
from openvision.models.openvision3 import LatentVisionConfig, OpenVision3, build_vision
from openvision.weights.export import onnx, open_clip, timm, transformers
from openvision.weights.export.bundle import write_bundle
from openvision.weights.export.card import write_card
from openvision.weights.export.onnx_precision import Precision
from openvision.weights.export.parity import Parity, compare, example_images, require_parity
from openvision.weights.folder import load_vision_folder, save_folder
from openvision.weights.load import Checkpoint

TARGETS = {
    "safetensors": "a model folder of this project: the whole model, or the vision tower",
    "open_clip": "a folder that stock open_clip loads as local-dir:",
    "timm": "a stock timm VisionTransformer, loaded as local-dir:",
    "transformers": "a stock ViTModel with exact hidden states, and the text tower as SiglipTextModel",
    "beit": "a stock BeitModel: exact hidden states and exact pooled output",
    "siglip": "a SiglipVisionModel, not exact because it has no class token: needs --accept-drift",
    "onnx": "vision and text graphs for ONNX Runtime",
}
_STOCK_TEXT = ("open_clip", "transformers")
"""Targets with a text tower of another library."""

PUBLISHED_ONLY = ("open_clip", "transformers", "beit", "siglip")
"""Targets whose stock classes have neither registers nor this attention pool."""


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export."""

    precision: Precision = "fp32"
    """Precision of ONNX graphs."""
    dynamic_resolution: bool = False
    """ONNX graph for any resolution instead of the model's own."""
    resolution: int | None = None
    """Pixels a side for the exports that store positions; the model's own by default."""
    accept_drift: bool = False
    """Write a format that cannot be exact."""
    check: bool = True
    """Load the export with its library and compare."""
    images: torch.Tensor | None = None
    """Prepared images, uint8 (n, 3, R, R), on which ONNX graphs are compared too."""
    calibration: torch.Tensor | None = None
    """Prepared images, uint8 (n, 3, R, R), on which the scales of int8 activations are chosen; dynamic by default."""
    least_cosine: float | None = None
    """Smallest cosine that an embedding of lower precision may have with the model's; by default `LEAST_COSINE`."""
    bundle: bool = False
    """Beside ONNX graphs, a script that needs no torch."""
    labels: tuple[str, ...] = ()
    """Labels that the script of a bundle tells apart."""


def export(checkpoint: Checkpoint, target: str, folder: Path, options: ExportOptions | None = None) -> list[Parity]:
    """Write `checkpoint` for `target` into `folder` and return the differences from the model.

    Raises OpenVisionError for an unknown target, a missing library, a model that the target cannot hold, or a
    difference above tolerance; then nothing is written.
    """
    options = options or ExportOptions()
    if target not in TARGETS:
        raise OpenVisionError(f"unknown export target {target!r}; there are {', '.join(TARGETS)}")
    if target == "siglip" and not options.accept_drift:
        raise OpenVisionError(
            "a SigLIP tower has no class token, so this export is not the same encoder; "
            "add --accept-drift to write it and report the difference, or use --to transformers or --to beit"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OpenVisionError(f"{folder} exists and is not empty; choose another folder")
    if isinstance(checkpoint.vision.config, LatentVisionConfig) and target != "safetensors":
        raise OpenVisionError(
            f"{checkpoint.source} sees the latents of an autoencoder, for which {target} has no place before the "
            "encoder; export it with --to safetensors"
        )
    if isinstance(checkpoint.vision.config, GenLipVisionConfig) and target != "safetensors":
        raise OpenVisionError(
            f"{checkpoint.source} has rotary positions and gated attention, for which {target} has no class; export it "
            "with --to safetensors"
        )
    if options.calibration is not None and (target, options.precision) != ("onnx", "int8"):
        raise OpenVisionError(
            "--calibration is for ONNX graphs of precision int8; add --to onnx --precision int8, or leave it out"
        )
    if target in _STOCK_TEXT and checkpoint.model is not None and checkpoint.model.config.text.pad_id is not None:
        raise OpenVisionError(
            f"{checkpoint.source} masks padding in its text tower (model.text.pad_id), for which {target} has no "
            "class; export it with --to onnx or safetensors, or its vision tower alone (convert --vision-only)"
        )
    if target in PUBLISHED_ONLY and not checkpoint.vision.config.is_published:
        raise OpenVisionError(
            f"{checkpoint.source} has registers or pools by attention, for which {target}'s classes have no place; "
            "export it with --to timm, onnx or safetensors"
        )
    if options.resolution is not None:
        checkpoint = at_resolution(checkpoint, options.resolution)
    with atomic_folder(folder) as temporary:
        _write(checkpoint, target, temporary, options)
        results = require_parity(_check(checkpoint, target, temporary, options)) if options.check else []
        write_card(checkpoint, target, temporary, results, options.dynamic_resolution)
    return results


def at_resolution(checkpoint: Checkpoint, resolution: int) -> Checkpoint:
    """The same weights at another resolution: only the fixed positions change."""
    if resolution < checkpoint.vision.config.patch_size:
        raise OpenVisionError(
            f"resolution {resolution} is smaller than a patch of {checkpoint.vision.config.patch_size} pixels"
        )
    vision_config = replace(checkpoint.vision.config, image_size=resolution)
    if checkpoint.captioner is not None:
        with torch.device("meta"):
            captioner = build_model(replace(checkpoint.captioner.config, vision=vision_config))
        captioner.load_state_dict(checkpoint.captioner.state_dict(), assign=True)
        assert isinstance(captioner, OpenVision2 | GenLip)
        return replace(checkpoint, captioner=captioner.eval(), vision=captioner.vision)
    if checkpoint.unified is not None and isinstance(vision_config, LatentVisionConfig):
        with torch.device("meta"):
            unified = OpenVision3(replace(checkpoint.unified.config, vision=vision_config))
        unified.load_state_dict(checkpoint.unified.state_dict(), assign=True)
        return replace(checkpoint, unified=unified.eval(), vision=unified.vision)
    if checkpoint.model is None:
        with torch.device("meta"):
            head = checkpoint.vision.head
            tower = build_vision(vision_config, head.out_features if head is not None else None)
        tower.load_state_dict(checkpoint.vision.state_dict(), assign=True)
        return replace(checkpoint, vision=tower.eval())
    with torch.device("meta"):
        model = OpenVision(replace(checkpoint.model.config, vision=vision_config))
    model.load_state_dict(checkpoint.model.state_dict(), assign=True)
    return replace(checkpoint, model=model.eval(), vision=model.vision)


def _write(checkpoint: Checkpoint, target: str, folder: Path, options: ExportOptions) -> None:
    if target == "onnx":
        onnx.write_onnx(checkpoint, folder, options.precision, options.dynamic_resolution, options.calibration)
        if options.bundle:
            write_bundle(checkpoint, folder, options.labels)
    elif target == "safetensors":
        provenance = checkpoint.provenance | {"exported_from": checkpoint.source}
        model = checkpoint.any_model or checkpoint.vision
        save_folder(folder, model, checkpoint.tokenizer, "", provenance)
    else:
        writers = {
            "open_clip": open_clip.write_open_clip,
            "timm": timm.write_timm,
            "transformers": transformers.write_vit,
            "beit": transformers.write_beit,
            "siglip": transformers.write_siglip,
        }
        writers[target](checkpoint, folder)


def _check(checkpoint: Checkpoint, target: str, folder: Path, options: ExportOptions) -> list[Parity]:
    if target == "onnx":
        return onnx.check_onnx(checkpoint, folder, options.images, options.least_cosine, options.calibration)
    checks = {
        "safetensors": _check_safetensors,
        "open_clip": open_clip.check_open_clip,
        "timm": timm.check_timm,
        "transformers": transformers.check_vit,
        "beit": transformers.check_beit,
        "siglip": transformers.check_siglip,
    }
    return checks[target](checkpoint, folder)


def _check_safetensors(checkpoint: Checkpoint, folder: Path) -> list[Parity]:
    images = example_images(checkpoint.vision)
    with torch.inference_mode():
        ours = checkpoint.vision.forward_features(images).patch_tokens
        return [compare("patch tokens", ours, load_vision_folder(folder).forward_features(images).patch_tokens, 0)]
