"""Lower precision of an ONNX graph: fp16, or int8 with dynamic or static scales of the activations.

int8 stores the weights of matrix products with one scale a channel, in seven bits: x86 processors without VNNI add two
products of uint8 and int8 in 16 bits, which eight bits overflow, silently. Dynamic scales are computed from each batch
when the graph runs. Static scales come from given images, once: the graph does less work, and values outside of what
these images reached are clipped. Attention itself, norms and the patch embedding stay in float32 either way.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from openvision.errors import require

Precision = Literal["fp32", "fp16", "int8"]
_PRODUCTS = ["MatMul", "Gemm"]
# Products with a weight; those of attention have none.
_CONSTANT_ONLY = {"MatMulConstBOnly": True}


class _Batches:
    """What ONNX Runtime's calibration reads: one batch after the other, None at the end."""

    def __init__(self, name: str, batches: Iterator[Tensor]) -> None:
        self.name, self.batches = name, batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The inputs of the next batch by name."""
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch.numpy()}


def lower(file: Path, precision: Precision, batches: Callable[[], Iterator[Tensor]] | None = None) -> None:
    """Replace a float32 graph of one input by one of lower precision, under the same name.

    `batches` gives float32 inputs of the graph on which the static scales of int8 are chosen; without it they are
    dynamic. Needs the extra `onnx`.
    """
    if precision == "fp32":
        return
    temporary = file.with_suffix(".lower.onnx")
    if precision == "fp16":
        _halve(file, temporary)
    elif batches is None:
        _quantise(file, temporary)
    else:
        _quantise_static(file, temporary, batches())
    for leftover in file.parent.glob(f"{file.name}*"):
        leftover.unlink()
    temporary.replace(file)


def _halve(source: Path, target: Path) -> None:
    onnx = require("onnx", extra="onnx")
    float16 = require("onnxruntime.transformers.float16", extra="onnx")
    # Inputs and outputs stay float32.
    onnx.save(float16.convert_float_to_float16(onnx.load(str(source)), keep_io_types=True), str(target))


def _quantise(source: Path, target: Path) -> None:
    quantization = require("onnxruntime.quantization", extra="onnx")
    quantization.quantize_dynamic(
        str(source),
        str(target),
        op_types_to_quantize=_PRODUCTS,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
        extra_options=_CONSTANT_ONLY,
    )


def _quantise_static(source: Path, target: Path, batches: Iterator[Tensor]) -> None:
    quantization = require("onnxruntime.quantization", extra="onnx")
    onnx = require("onnx", extra="onnx")
    name = onnx.load(str(source), load_external_data=False).graph.input[0].name
    quantization.quantize_static(
        str(source),
        str(target),
        _Batches(name, batches),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=_PRODUCTS,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
        calibrate_method=quantization.CalibrationMethod.MinMax,
        # A product's result goes on in float32: rounding it too costs accuracy and saves nothing.
        extra_options={**_CONSTANT_ONLY, "OpTypesToExcludeOutputQuantization": _PRODUCTS},
    )
