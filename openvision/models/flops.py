"""Floating-point operations of a forward pass, from a configuration alone.

Two operations a multiply-add; matrix products only; of causal attention the masked half is not counted. Training
costs three forward passes: one forward, two backward. Recomputation is not counted.
"""

from openvision.models.decoder import DecoderConfig
from openvision.models.openvision import OpenVisionConfig
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig

BACKWARD_AND_FORWARD = 3


def _projections(config: VisionConfig | TextConfig | DecoderConfig) -> int:
    """Operations of one token through the matrices of one block: q, k, v, out and the MLP."""
    return 2 * (4 * config.width**2 + 2 * config.width * config.mlp_dim)


def _attention(width: int, query_key_pairs: float) -> float:
    """Scores and weighted values."""
    return 4 * width * query_key_pairs


def vision_flops(config: VisionConfig, resolution: int, embed_dim: int) -> float:
    """Forward operations of one image, head included."""
    rows, columns = config.grid(resolution, resolution)
    tokens = rows * columns + 1
    embed = 2 * 3 * config.patch_size**2 * config.width * (tokens - 1)
    block = tokens * _projections(config) + _attention(config.width, tokens**2)
    return embed + config.depth * block + 2 * config.width * embed_dim


def text_flops(config: TextConfig, embed_dim: int) -> float:
    """Forward operations of one text, head included."""
    tokens = config.context_length
    block = tokens * _projections(config) + _attention(config.width, tokens**2)
    return config.depth * block + 2 * config.width * embed_dim


def decoder_flops(config: DecoderConfig, vision: VisionConfig, text: TextConfig, resolution: int) -> float:
    """Forward operations of one caption, every query's logits included."""
    rows, columns = vision.grid(resolution, resolution)
    image_tokens, text_tokens, queries = rows * columns, text.context_length - 1, config.caption_length
    prefix = image_tokens + text_tokens
    inputs = 2 * config.width * (image_tokens * vision.width + text_tokens * text.width)
    seen_by_queries = _attention(config.width, queries * prefix + queries * (queries + 1) / 2)
    full_block = (prefix + queries) * _projections(config) + _attention(config.width, prefix**2) + seen_by_queries
    # The last block makes keys and values of the prefix and nothing else.
    last_block = queries * _projections(config) + prefix * 4 * config.width**2 + seen_by_queries
    head = 2 * config.width * config.vocab_size * queries
    return inputs + (config.depth - 1) * full_block + last_block + head


def training_flops(config: OpenVisionConfig, resolution: int, texts: int) -> float:
    """Operations of one training sample, forward and backward: an image, `texts` texts, a caption."""
    total = vision_flops(config.vision, resolution, config.embed_dim) + texts * text_flops(
        config.text, config.embed_dim
    )
    if config.decoder:
        total += decoder_flops(config.decoder, config.vision, config.text, resolution)
    return BACKWARD_AND_FORWARD * total
