"""Export both towers as ONNX graphs for ONNX Runtime: dynamic batch, fixed or dynamic resolution, fp32, fp16 or int8.

vision.onnx   images float32 (B, 3, H, W), normalised -> image_embeds (B, E) of unit length (`pooled` (B, D) without a
              head), patch_tokens (B, N, D) before any norm
text.onnx     ids int64 (B, L) -> text_embeds (B, E) of unit length
onnx.json     names, shapes and layouts of inputs and outputs, preprocessing, logit scale, precision
tokenizer.json  texts to ids for the `tokenizers` library, padded and truncated; see `weights/export/text.py`

`onnx_precision.py` lowers the precision. What that costs depends on the model and on the images: an embedding that
turns by more than `LEAST_COSINE` allows is refused.
"""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision.errors import OpenVisionError, require
from openvision.files import JsonObject
from openvision.models.layers import unit
from openvision.models.text import SentenceTower, TextTransformer
from openvision.models.vision import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, normalize
from openvision.text.tokenizer import Tokenizer
from openvision.weights.export.onnx_precision import Precision, lower
from openvision.weights.export.parity import Parity, compare, example_images
from openvision.weights.export.text import (
    EXAMPLE_TEXTS,
    class_token_in_position,
    comparable_rows,
    example_ids,
    stock_ids,
    write_tokenizer,
)
from openvision.weights.load import Checkpoint

VISION_FILE, TEXT_FILE, CONFIG_FILE = "vision.onnx", "text.onnx", "onnx.json"
# Largest difference of float32 outputs.
_TOLERANCE = 2e-5
LEAST_COSINE = {"fp16": 0.9999, "int8": 0.98}
"""Smallest cosine between an embedding of the model and that of a graph of lower precision."""
# A graph may take its example's batch for a constant: one, the example's and none of its multiples are tried.
_BATCHES = (1, 3, 7)
_CALIBRATED_AT_ONCE = 32


class NodeArg(Protocol):
    """An input or output of a graph."""

    @property
    def name(self) -> str:
        """Its name."""
        ...


class Session(Protocol):
    """The part of `onnxruntime.InferenceSession` used here."""

    def run(self, output_names: list[str] | None, input_feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """All outputs for the inputs by name."""
        ...

    def get_outputs(self) -> Sequence[NodeArg]:
        """Outputs in order."""
        ...


class VisionGraph(nn.Module):
    """The vision tower as one graph: patches by a convolution, dynamic positions computed inside."""

    positions: Tensor

    def __init__(self, vision: VisionTransformer, dynamic_resolution: bool) -> None:
        super().__init__()
        self.vision = vision
        self.dynamic_resolution = dynamic_resolution
        self.register_buffer("positions", vision.config.positions(*vision.config.grid()))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (B, E) unit vectors, or pooled (B, D) without a head; and patch tokens (B, N, D)."""
        tower = self.vision
        patches = F.conv2d(images, tower.patch_embed.proj.weight, stride=tower.config.patch_size)
        positions = self.positions
        if self.dynamic_resolution:
            positions = tower.config.positions(patches.shape[2], patches.shape[3])
        x = patches.flatten(2).transpose(1, 2) + positions
        x = tower.with_prefix(x)
        for block in tower.blocks:
            x = block(x)
        tokens = x[:, tower.config.prefix_tokens :]
        pooled = tower.pool(tokens)
        return (unit(tower.project(pooled)) if tower.head is not None else pooled), tokens


class TextGraph(nn.Module):
    """The text tower as one graph, for ids of training's layout and of stock tokenizers."""

    def __init__(self, text: TextTransformer, tokenizer: Tokenizer | None) -> None:
        super().__init__()
        masked = text.config.pad_id is not None
        self.text = text if masked else class_token_in_position(text, tokenizer)
        self.class_id = tokenizer.cls_id if masked and tokenizer is not None else None

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, E) unit vectors."""
        tower = self.text
        if tower.config.pad_id is not None:
            ids = self._trained_layout(ids, tower.config.pad_id)
        if isinstance(tower, SentenceTower):
            return unit(tower.project(tower.encode(ids, tower.pos_embed, 0).pooled))
        mask = tower.mask(ids)
        # Not `tower(ids)`: it asks for the length of the batch, which becomes a constant of the graph.
        x = tower.token_embed(ids) + tower.pos_embed
        for block in tower.blocks:
            x = block(x) if mask is None else block(x, mask)
        return unit(tower.project(tower.pooled(x, mask)))

    def _trained_layout(self, ids: Tensor, pad: int) -> Tensor:
        """A class token where padding begins is moved to the end: a mask tells padding by its id."""
        if self.class_id is None:
            return ids
        before = torch.where(ids[:, :-1] == self.class_id, torch.full_like(ids[:, :-1], pad), ids[:, :-1])
        return torch.cat([before, torch.full_like(ids[:, -1:], self.class_id)], dim=1)


def write_onnx(
    checkpoint: Checkpoint,
    folder: Path,
    precision: Precision,
    dynamic_resolution: bool,
    calibration: Tensor | None = None,
) -> None:
    """Write the graphs, their configuration and the tokenizer into `folder`.

    `calibration`, uint8 (n, 3, R, R), gives the activations of the vision graph in int8 static scales; those of the
    text graph stay dynamic.
    """
    require("onnxscript", extra="onnx")
    vision = checkpoint.vision
    batch = torch.export.Dim("batch")
    axes = {0: batch}
    if dynamic_resolution:
        axes |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    first = "image_embeds" if vision.head is not None else "pooled"
    graph = VisionGraph(vision, dynamic_resolution).eval()
    _export(graph, example_images(vision), axes, "images", [first, "patch_tokens"], folder / VISION_FILE)
    with _quiet():
        lower(folder / VISION_FILE, precision, None if calibration is None else lambda: _batches(calibration))
    if checkpoint.model is not None:
        text = TextGraph(checkpoint.model.text, checkpoint.tokenizer).eval()
        _export(text, example_ids(checkpoint, 2), {0: batch}, "ids", ["text_embeds"], folder / TEXT_FILE)
        with _quiet():
            lower(folder / TEXT_FILE, precision)
        if checkpoint.tokenizer is not None:
            write_tokenizer(checkpoint.tokenizer, folder, checkpoint.model.config.text.context_length)
    _write_config(checkpoint, folder, precision, dynamic_resolution, calibration)


def _batches(images: Tensor) -> Iterator[Tensor]:
    return (normalize(part) for part in images.split(_CALIBRATED_AT_ONCE))


def _export(
    graph: nn.Module, example: Tensor, axes: dict[int, torch.export.Dim], name: str, outputs: list[str], file: Path
) -> None:
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            graph,
            (example,),
            str(file),
            input_names=[name],
            output_names=outputs,
            dynamic_shapes=(axes,),
            dynamo=True,
            external_data=_is_large(graph),
            verbose=False,
        )


def _is_large(graph: nn.Module) -> bool:
    """A protobuf file cannot hold two gigabytes: larger weights go to a file beside it."""
    return sum(tensor.numel() * tensor.element_size() for tensor in graph.state_dict().values()) > 1_500_000_000


def _write_config(
    checkpoint: Checkpoint,
    folder: Path,
    precision: Precision,
    dynamic_resolution: bool,
    calibration: Tensor | None,
) -> None:
    vision = checkpoint.vision.config
    side = ["height", "width"] if dynamic_resolution else [vision.image_size, vision.image_size]
    embed_dim = checkpoint.vision.head.out_features if checkpoint.vision.head is not None else None
    embedding = (
        {"image_embeds": {"dtype": "float32", "shape": ["batch", embed_dim], "norm": "unit length"}}
        if embed_dim is not None
        else {"pooled": {"dtype": "float32", "shape": ["batch", vision.width], "norm": "not normalised"}}
    )
    patches = "patches" if dynamic_resolution else int(np.prod(vision.grid()))
    tokens = {"dtype": "float32", "shape": ["batch", patches, vision.width], "norm": "none: before any LayerNorm"}
    image = {"dtype": "float32", "shape": ["batch", 3, *side], "layout": "NCHW", "channels": "RGB"}
    content: JsonObject = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "dynamic_resolution": dynamic_resolution,
        "precision": precision,
        "calibration_images": 0 if calibration is None else len(calibration),
        VISION_FILE: {
            "inputs": {"images": image},
            "outputs": embedding | {"patch_tokens": tokens},
        },
        "preprocessing": {
            "decode": "EXIF orientation applied; any mode to RGB, 16 bits scaled to 8",
            "background": [255, 255, 255],
            "resize": "shorter side, bilinear with antialiasing",
            "rounding": "truncated to uint8, not rounded",
            "crop": "centre",
            "scale": 1 / 255,
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "order": "(pixel * scale - mean) / std",
        },
    }
    if checkpoint.model is not None:
        length, scale = checkpoint.model.config.text.context_length, float(checkpoint.model.logit_scale.detach().exp())
        vector = {"dtype": "float32", "shape": ["batch", embed_dim], "norm": "unit length"}
        content |= {"context_length": length, "logit_scale": scale, TEXT_FILE: _text_config(checkpoint, length, vector)}
        content["probabilities"] = "softmax(logit_scale * image_embeds @ text_embeds.T)"
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def _text_config(checkpoint: Checkpoint, length: int, vector: JsonObject) -> JsonObject:
    ids: JsonObject = {"dtype": "int64", "shape": ["batch", length]}
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        ids["layout"] = "[bos], tokens, [eos], padding, class token in the last column"
    else:
        ids |= {
            "tokenizer": "tokenizer.json",
            "layout": "[bos], tokens, [eos], [CLS], padding: as tokenizer.json writes it; or [CLS] in the last column",
            "special": {
                tokenizer.special.pad: tokenizer.pad_id,
                tokenizer.special.bos: tokenizer.bos_id,
                tokenizer.special.eos: tokenizer.eos_id,
                tokenizer.special.cls: tokenizer.cls_id,
            },
        }
    return {"inputs": {"ids": ids}, "outputs": {"text_embeds": vector}}


def check_onnx(
    checkpoint: Checkpoint,
    folder: Path,
    images: Tensor | None = None,
    least_cosine: float | None = None,
    calibration: Tensor | None = None,
) -> list[Parity]:
    """Compare both graphs with the model, in ONNX Runtime on the CPU, in batches of 1, 3 and 7.

    A dynamic resolution is compared at three sizes. Lower precision is measured by the smallest cosine, on noise and,
    if given, on `images` uint8 (n, 3, R, R); it may not fall below `least_cosine`, by default that of `LEAST_COSINE`.
    Scales that were chosen on `calibration` are not made for noise: these images take its place, and that of `images`
    where none are given.
    """
    config = json.loads((folder / CONFIG_FILE).read_text())
    vision, side, patch = checkpoint.vision, checkpoint.vision.config.image_size, checkpoint.vision.config.patch_size
    least = LEAST_COSINE.get(config["precision"])
    if least is not None and least_cosine is not None:
        least = least_cosine
    session = open_session(folder / VISION_FILE)
    batches = [example_images(vision, batch) for batch in _BATCHES]
    if calibration is not None:
        images = calibration if images is None else images
        batches = [normalize(calibration[torch.arange(batch) % len(calibration)]) for batch in _BATCHES]
    if config["dynamic_resolution"]:
        batches += [batches[1][..., : side // 2 + 2 * patch], F.pad(batches[1], (0, 2 * patch, 0, patch))]
    results = [result for batch in batches for result in _check_vision(vision, session, batch, least)]
    if images is not None:
        found = [_embed(vision, session, normalize(part)) for part in images.split(64)]
        ours, theirs = (torch.cat(list(part)) for part in zip(*found, strict=True))
        results += _close(f"features of {len(images)} given images", ours, theirs, least)
    if checkpoint.model is not None:
        session, ids = open_session(folder / TEXT_FILE), example_ids(checkpoint)
        with torch.inference_mode():
            ours = checkpoint.model.encode_text(ids)
        for batch in _BATCHES:
            found = _encode(session, ids[:batch])
            results += _close(f"text features, batch {batch}", ours[:batch], found, least)
        if checkpoint.tokenizer is not None:
            rows = comparable_rows(checkpoint.tokenizer)
            found = _encode(session, stock_ids(folder, [EXAMPLE_TEXTS[row] for row in rows]))
            results += _close("text features by tokenizer.json", ours[rows], found, least)
    return results


def _encode(session: Session, ids: Tensor) -> Tensor:
    return torch.from_numpy(session.run(None, {"ids": ids.numpy()})[0])


def _embed(vision: VisionTransformer, session: Session, batch: Tensor) -> tuple[Tensor, Tensor]:
    """First outputs of the tower and of its graph for normalised images."""
    with torch.inference_mode():
        pooled = vision.forward_features(batch).pooled
        ours = unit(vision.project(pooled)) if vision.head is not None else pooled
    return ours, torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])


def _check_vision(vision: VisionTransformer, session: Session, batch: Tensor, least: float | None) -> list[Parity]:
    ours, theirs = _embed(vision, session, batch)
    where = "{} x {} x {}".format(batch.shape[0], *batch.shape[2:])
    results = _close(f"image features of {where}", ours, theirs, least)
    with torch.inference_mode():
        tokens = vision.forward_features(batch).patch_tokens
    found = torch.from_numpy(session.run(["patch_tokens"], {"images": batch.numpy()})[0])
    return results + _close(f"patch tokens of {where}", tokens, found, least)


def _close(what: str, ours: Tensor, theirs: Tensor, least: float | None) -> list[Parity]:
    """By the largest difference, or, where a smallest cosine is given, by that of each vector."""
    if least is None:
        return [compare(what, ours, theirs, _TOLERANCE)]
    if ours.shape != theirs.shape:
        raise OpenVisionError(f"{what}: shape {tuple(theirs.shape)} after export, {tuple(ours.shape)} before")
    cosines = torch.cosine_similarity(ours.double(), theirs.double(), dim=-1)
    return [Parity(f"{what}, as 1 - cosine", 1 - cosines.min().item(), 1 - least)]


def open_session(file: Path, threads: int | None = None) -> Session:
    """An ONNX Runtime session on the CPU, by default with a thread a core; needs the extra `onnx`."""
    runtime = require("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress and advice of the exporters."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
