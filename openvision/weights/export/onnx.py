"""Vision and text as two ONNX graphs for ONNX Runtime: free batch, fixed or free resolution, fp32, fp16 or int8.

vision.onnx   images float32 (B, 3, H, W), normalised -> image_embeds (B, E) of unit length (`pooled` (B, D) without a
              head), patch_tokens (B, N, D) before any norm
text.onnx     ids int64 (B, L) -> text_embeds (B, E) of unit length
onnx.json     resolution, preprocessing, logit scale, precision

int8 is dynamic quantisation: weights and activations of matrix products, eight bits, a scale a channel. What it costs
in accuracy depends on the model; the check here only keeps out broken graphs.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision.errors import require
from openvision.images.preprocess import IMAGENET_MEAN, IMAGENET_STD
from openvision.models.layers import sincos_position_table, unit
from openvision.models.text import TextTransformer
from openvision.models.vision import VisionTransformer
from openvision.weights.export.parity import Parity, compare, example_ids, example_images
from openvision.weights.load import Checkpoint

Precision = Literal["fp32", "fp16", "int8"]
VISION_FILE, TEXT_FILE, CONFIG_FILE = "vision.onnx", "text.onnx", "onnx.json"
# Of unit vectors: rounding of half precision; for int8 only that the graph is not broken.
_TOLERANCE = {"fp32": 2e-5, "fp16": 1e-2, "int8": 0.1}
_TOKEN_TOLERANCE = {"fp32": 2e-5, "fp16": 2e-2, "int8": 0.5}


class VisionGraph(nn.Module):
    """The vision tower as one graph: patches by a convolution, positions computed inside where resolution is free."""

    positions: Tensor

    def __init__(self, vision: VisionTransformer, dynamic_resolution: bool) -> None:
        super().__init__()
        self.vision = vision
        self.dynamic_resolution = dynamic_resolution
        self.register_buffer("positions", sincos_position_table(*vision.config.grid(), vision.config.width))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (B, E) unit vectors, or pooled (B, D) without a head; and patch tokens (B, N, D)."""
        tower = self.vision
        patches = F.conv2d(images, tower.patch_embed.proj.weight, stride=tower.config.patch_size)
        positions = self.positions
        if self.dynamic_resolution:
            positions = sincos_position_table(patches.shape[2], patches.shape[3], tower.config.width)
        x = patches.flatten(2).transpose(1, 2) + positions
        x = torch.cat([tower.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in tower.blocks:
            x = block(x)
        tokens = x[:, 1:]
        pooled = tower.fc_norm(tokens.mean(dim=1))
        return (unit(tower.project(pooled)) if tower.head is not None else pooled), tokens


class TextGraph(nn.Module):
    """The text tower as one graph."""

    def __init__(self, text: TextTransformer) -> None:
        super().__init__()
        self.text = text

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, E) unit vectors."""
        return unit(self.text(ids))


def write_onnx(checkpoint: Checkpoint, folder: Path, precision: Precision, dynamic_resolution: bool) -> None:
    """Write the graphs and what is needed to feed them; the tokenizer goes along."""
    require("onnxscript", extra="onnx")
    vision = checkpoint.vision
    batch = torch.export.Dim("batch")
    axes: dict[int, Any] = {0: batch}
    if dynamic_resolution:
        axes |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    first = "image_embeds" if vision.head is not None else "pooled"
    graph = VisionGraph(vision, dynamic_resolution).eval()
    _export(graph, example_images(vision), axes, "images", [first, "patch_tokens"], folder / VISION_FILE)
    files = [folder / VISION_FILE]
    if checkpoint.model is not None:
        text = TextGraph(checkpoint.model.text).eval()
        _export(text, example_ids(checkpoint), {0: batch}, "ids", ["text_embeds"], folder / TEXT_FILE)
        files.append(folder / TEXT_FILE)
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save(folder)
    for file in files:
        _lower(file, precision)
    _write_config(checkpoint, folder, precision, dynamic_resolution)


def _export(graph: nn.Module, example: Tensor, axes: dict[int, Any], name: str, outputs: list[str], file: Path) -> None:
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


def _lower(file: Path, precision: Precision) -> None:
    """Replace a float32 graph by one of lower precision, under the same name."""
    if precision == "fp32":
        return
    temporary = file.with_suffix(".lower.onnx")
    with _quiet():
        if precision == "int8":
            _quantise(file, temporary)
        else:
            _halve(file, temporary)
    for leftover in file.parent.glob(f"{file.name}*"):
        leftover.unlink()
    temporary.replace(file)


def _quantise(source: Path, target: Path) -> None:
    quantization = require("onnxruntime.quantization", extra="onnx")
    quantization.quantize_dynamic(
        str(source),
        str(target),
        op_types_to_quantize=["MatMul", "Gemm"],
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        extra_options={"MatMulConstBOnly": True},
    )


def _halve(source: Path, target: Path) -> None:
    onnx = require("onnx", extra="onnx")
    float16 = require("onnxruntime.transformers.float16", extra="onnx")
    # Inputs and outputs stay float32: only what is inside is halved.
    onnx.save(float16.convert_float_to_float16(onnx.load(str(source)), keep_io_types=True), str(target))


def _write_config(checkpoint: Checkpoint, folder: Path, precision: Precision, dynamic_resolution: bool) -> None:
    vision = checkpoint.vision.config
    content: dict[str, Any] = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "dynamic_resolution": dynamic_resolution,
        "precision": precision,
        "preprocessing": {
            "resize": "shorter side, bilinear with antialiasing",
            "crop": "centre",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        },
    }
    if checkpoint.model is not None:
        content |= {
            "context_length": checkpoint.model.config.text.context_length,
            "logit_scale": float(checkpoint.model.logit_scale.detach().exp()),
        }
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def check_onnx(checkpoint: Checkpoint, folder: Path) -> list[Parity]:
    """Run both graphs in ONNX Runtime on the CPU and compare; a free resolution is tried at another one too."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    precision: Precision = config["precision"]
    vision, side = checkpoint.vision, checkpoint.vision.config.image_size
    session = open_session(folder / VISION_FILE)
    batches = [example_images(vision, batch=3)]
    if config["dynamic_resolution"]:
        batches.append(batches[0][:1, :, : side // 2 + 2 * vision.config.patch_size])
    results = [result for batch in batches for result in _check_vision(vision, session, batch, precision)]
    if checkpoint.model is not None:
        ids = example_ids(checkpoint)
        (found,) = open_session(folder / TEXT_FILE).run(None, {"ids": ids.numpy()})
        with torch.inference_mode():
            ours = checkpoint.model.encode_text(ids)
        results.append(compare("text features", ours, torch.from_numpy(found), _TOLERANCE[precision]))
    return results


def _check_vision(vision: VisionTransformer, session: Any, batch: Tensor, precision: Precision) -> list[Parity]:
    embeds, tokens = session.run(None, {"images": batch.numpy()})
    with torch.inference_mode():
        ours = vision.forward_features(batch)
        first = unit(vision.project(ours.pooled)) if vision.head is not None else ours.pooled
    size = f"{batch.shape[2]} x {batch.shape[3]}"
    return [
        compare(f"image features at {size}", first, torch.from_numpy(embeds), _TOLERANCE[precision]),
        compare(f"patch tokens at {size}", ours.patch_tokens, torch.from_numpy(tokens), _TOKEN_TOLERANCE[precision]),
    ]


def open_session(file: Path, threads: int | None = None) -> Any:
    """An ONNX Runtime session on the CPU, by default with a thread a core; needs the extra `onnx`."""
    runtime = require("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' progress and advice belong into no user's terminal."""
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
