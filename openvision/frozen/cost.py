"""Operations and memory of an autoencoder, from its kind alone: plans are made without its weights.

Two operations a multiply-add, convolutions and matrix products only. Of "diffusers" the shape is FLUX.1's, which is
Stable Diffusion's but for the channels of its latents.
"""

from dataclasses import dataclass
from itertools import pairwise

from openvision.frozen.config import AutoencoderConfig
from openvision.frozen.conv import ConvConfig

FLUX_WIDTHS = (128, 256, 512, 512)
FLUX_BLOCKS = 2
"""Residual blocks of a level of the encoder; the decoder has one more."""


@dataclass(frozen=True)
class AutoencoderCost:
    """Forward operations of one image, and the numbers that a backward pass through the decoder keeps."""

    encode: int
    decode: int
    decoder_activations: int
    """Elements: inputs of convolutions, norms and non-linearities."""


def autoencoder_cost(config: AutoencoderConfig, resolution: int) -> AutoencoderCost:
    """The cost of one image of `resolution` px a side."""
    if config.kind == "pixels":
        return AutoencoderCost(0, 0, 0)
    if config.kind == "conv":
        return _conv(ConvConfig(channels=config.channels), resolution)
    return _kl(config.channels, resolution)


def _convolution(side: int, inputs: int, outputs: int, kernel: int = 3) -> int:
    return 2 * kernel**2 * inputs * outputs * side**2


def _block(side: int, inputs: int, outputs: int) -> int:
    shortcut = _convolution(side, inputs, outputs, 1) if inputs != outputs else 0
    return _convolution(side, inputs, outputs) + _convolution(side, outputs, outputs) + shortcut


def _kl(channels: int, resolution: int) -> AutoencoderCost:
    widths, last = FLUX_WIDTHS, FLUX_WIDTHS[-1]
    lowest = resolution // 2 ** (len(widths) - 1)
    attention = 4 * _convolution(lowest, last, last, 1) + 4 * last * lowest**4
    middle = 2 * _block(lowest, last, last) + attention
    encode = _convolution(resolution, 3, widths[0]) + middle + _convolution(lowest, last, 2 * channels)
    decode = _convolution(lowest, channels, last) + middle + _convolution(resolution, widths[0], 3)
    kept = 6 * last * lowest**2
    side, inputs = resolution, widths[0]
    for level, width in enumerate(widths):
        encode += _block(side, inputs, width) + (FLUX_BLOCKS - 1) * _block(side, width, width)
        if level < len(widths) - 1:
            side //= 2
            encode += _convolution(side, width, width)
        inputs = width
    side, inputs = lowest, last
    for level, width in enumerate(reversed(widths)):
        decode += _block(side, inputs, width) + FLUX_BLOCKS * _block(side, width, width)
        # Of a block: what both norms read, what both non-linearities read, what both convolutions read.
        kept += 6 * width * (FLUX_BLOCKS + 1) * side**2
        if level < len(widths) - 1:
            side *= 2
            decode += _convolution(side, width, width)
            kept += width * side**2
        inputs = width
    return AutoencoderCost(encode, decode, kept + 3 * widths[0] * resolution**2)


def _conv(config: ConvConfig, resolution: int) -> AutoencoderCost:
    widths, side = config.widths, resolution // 2
    encode, decode = _convolution(side, 12, widths[0]), _convolution(side, widths[0], 12)
    kept = widths[0] * side**2
    for width, wider in pairwise(widths):
        encode += _block(side, width, width) + _convolution(side // 2, width, wider)
        decode += _block(side, width, width) + _convolution(side, wider, width)
        kept += (6 * width + wider) * side**2
        side //= 2
    ends = _block(side, widths[-1], widths[-1]) + _convolution(side, widths[-1], config.channels)
    return AutoencoderCost(encode + ends, decode + ends, kept + 7 * widths[-1] * side**2)
