"""Floating-point operations of a model, exactly, from its configuration alone.

Two operations a multiply-add; matrix products only. Counted as computed: the decoders' two attention calls, last blocks
that compute no more than is read. Not counted: recomputation, and of causal attention the masked half, which a good
kernel skips (`torch.utils.flop_counter` counts it: `masked_flops` is the difference). Backward costs two products for
each of forward, but for the patch embedding, since nobody needs the gradient of pixels.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from openvision.frozen.cost import autoencoder_cost
from openvision.models.decoders.autoregressive import AutoregressiveDecoderConfig
from openvision.models.decoders.parallel import DecoderConfig
from openvision.models.genlip import GenLipConfig, GenLipTextConfig, GenLipVisionConfig
from openvision.models.openvision import OpenVisionConfig
from openvision.models.openvision2 import ModelConfig
from openvision.models.openvision3 import OpenVision3Config, ReconstructionConfig
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig

BACKWARD_AND_FORWARD = 3
"""Products of training for each of forward: one forward, two backward."""

AnyTower = VisionConfig | TextConfig | DecoderConfig | AutoregressiveDecoderConfig | ReconstructionConfig


@dataclass(frozen=True)
class TowerFlops:
    """Operations of one tower for one training sample."""

    name: str
    """"vision", "text", "decoder" or "vocabulary" (the decoder's head); of OpenVision 3 also "reconstruction",
    "encoding" and "decoding" (the frozen autoencoder)."""
    forward: int
    without_input_gradient: int = 0
    """Those of forward whose input, or whose weight, needs no gradient: one product backward, not two. What needs
    neither counts twice."""
    frozen: bool = False
    """Whether its blocks are not trained, and keep nothing for a backward pass."""

    @property
    def training(self) -> int:
        """Forward and backward."""
        return BACKWARD_AND_FORWARD * self.forward - self.without_input_gradient


def sample_flops(
    config: ModelConfig,
    resolution: int,
    texts: int,
    caption_tokens: float | None = None,
    text_tokens: float | None = None,
    frozen: Collection[str] = (),
) -> tuple[TowerFlops, ...]:
    """Operations of one training sample, tower by tower.

    Args:
        config: of OpenVision (version 1, or plain CLIP where it has no decoder), of OpenVision 2 or 3, of GenLIP.
        resolution: pixels a side.
        texts: texts contrasted with each image; OpenVision 2 has none.
        caption_tokens: mean number of target tokens of a caption, whose logits alone are computed; None is every
            position, as if no caption were short.
        text_tokens: mean number of ids of a text that is trimmed, class token included; None is the context length.
        frozen: "vision" or "text", whose head alone is trained (`warm_start.frozen`).
    """
    towers = _trained_flops(config, resolution, texts, caption_tokens, text_tokens)
    if isinstance(config, GenLipConfig) and "vision" in frozen:
        # The caption's ids go through the same blocks: gradients pass through their matrices and change none.
        matrices = config.vision.depth * config.decoder.caption_length * _projections(config.vision)
        towers = [replace(t, without_input_gradient=matrices) if t.name == "decoder" else t for t in towers]
    return tuple(_lock(tower, config, texts) if tower.name in frozen else tower for tower in towers)


def _lock(tower: TowerFlops, config: ModelConfig, texts: int) -> TowerFlops:
    """A tower that is computed without gradient, but for the weight of its head.

    That the decoder's projection of its tokens needs no gradient of its input either is not counted: under one part in
    a thousand.
    """
    read = config.vision if tower.name == "vision" else config.text
    heads = texts if tower.name == "text" else 1
    head = 0 if read is None or config.embed_dim is None else heads * 2 * read.width * config.embed_dim
    return replace(tower, without_input_gradient=2 * tower.forward - head, frozen=True)


def _trained_flops(
    config: ModelConfig, resolution: int, texts: int, caption_tokens: float | None, text_tokens: float | None
) -> tuple[TowerFlops, ...]:
    embed = patch_embed_flops(config.vision, resolution)
    if isinstance(config, OpenVision3Config):
        return _unified_flops(config, resolution, texts, caption_tokens, text_tokens)
    if isinstance(config, GenLipConfig):
        return _one_transformer_flops(config, resolution, caption_tokens)
    if config.text is None:
        kept = config.patches_read(patches_of(config.vision, resolution))
        return (
            TowerFlops("vision", vision_flops(config.vision, resolution, None, kept), embed),
            TowerFlops("decoder", autoregressive_trunk_flops(config.decoder, config.vision, kept)),
            TowerFlops("vocabulary", head_flops(config.decoder, caption_tokens)),
        )
    towers = [
        TowerFlops("vision", vision_flops(config.vision, resolution, config.embed_dim), embed),
        TowerFlops("text", texts_flops(config, texts, text_tokens)),
    ]
    if config.decoder:
        read = None if config.decoder.reads_padding else text_tokens
        trunk = decoder_trunk_flops(config.decoder, config.vision, config.text, resolution, read)
        towers += [
            TowerFlops("decoder", trunk),
            TowerFlops("vocabulary", head_flops(config.decoder, caption_tokens)),
        ]
    return tuple(towers)


def _unified_flops(
    config: OpenVision3Config, resolution: int, texts: int, caption_tokens: float | None, text_tokens: float | None
) -> tuple[TowerFlops, ...]:
    patches = patches_of(config.vision, resolution)
    frozen = autoencoder_cost(config.vision.autoencoder, resolution)
    decode = frozen.decode // config.reconstruction.pixels_of
    return (
        # Nobody needs a gradient of the images, nor of the autoencoder's weights.
        TowerFlops("encoding", frozen.encode, 2 * frozen.encode, frozen=True),
        TowerFlops(
            "vision",
            vision_flops(config.vision, resolution, config.embed_dim),
            patch_embed_flops(config.vision, resolution),
        ),
        TowerFlops("text", texts * text_flops(config.text, config.embed_dim, text_tokens=text_tokens)),
        TowerFlops("decoder", autoregressive_trunk_flops(config.decoder, config.vision, patches)),
        TowerFlops("vocabulary", head_flops(config.decoder, caption_tokens)),
        TowerFlops("reconstruction", reconstruction_flops(config, patches)),
        TowerFlops("decoding", decode, decode),
    )


def _one_transformer_flops(
    config: GenLipConfig, resolution: int, caption_tokens: float | None
) -> tuple[TowerFlops, ...]:
    """GenLIP: "vision" is what the patches cost, "decoder" what the caption's ids cost in the same blocks."""
    vision, ends = config.vision, config.decoder
    patches, ids = patches_of(vision, resolution), ends.caption_length
    embed = patch_embed_flops(vision, resolution)
    block = patches * _projections(vision) + _attention(vision.width, patches**2)
    # Of the patches the last block makes keys and values.
    last = patches * 4 * vision.width**2
    seen_by_ids = _attention(vision.width, ids * patches + _causal_pairs(ids))
    # Into the transformer's width and out of it.
    ends_flops = 4 * ids * vision.width * ends.width if vision.width != ends.width else 0
    return (
        TowerFlops("vision", embed + (vision.depth - 1) * block + last, embed),
        TowerFlops("decoder", vision.depth * (ids * _projections(vision) + seen_by_ids) + ends_flops),
        TowerFlops("vocabulary", head_flops(ends, caption_tokens)),
    )


def reconstruction_flops(config: OpenVision3Config, patches: int) -> int:
    """Forward operations of the reconstruction decoder for one image."""
    own, vision = config.reconstruction, config.vision
    block = patches * _projections(own) + _attention(own.width, patches**2)
    ends = own.width * (vision.width + vision.input_channels * vision.kernel**2)
    return own.depth * block + 2 * patches * ends


def training_flops(
    config: ModelConfig,
    resolution: int,
    texts: int,
    caption_tokens: float | None = None,
    text_tokens: float | None = None,
    frozen: Collection[str] = (),
) -> int:
    """Operations of one training sample, forward and backward, all towers; arguments as of `sample_flops`."""
    towers = sample_flops(config, resolution, texts, caption_tokens, text_tokens, frozen)
    return sum(tower.training for tower in towers)


def patches_of(config: VisionConfig, resolution: int) -> int:
    """Patch tokens of an image."""
    rows, columns = config.grid(resolution, resolution)
    return rows * columns


def patch_embed_flops(config: VisionConfig, resolution: int) -> int:
    """Forward operations of the patch embedding of one image."""
    return 2 * config.input_channels * config.kernel**2 * config.width * patches_of(config, resolution)


def vision_flops(config: VisionConfig, resolution: int, embed_dim: int | None, kept: int | None = None) -> int:
    """Forward operations of one image, with its head of `embed_dim` or without (None).

    `kept` is the number of patch tokens that are read afterwards, where that is all the last block computes
    (OpenVision 2 in training).
    """
    patches = patches_of(config, resolution)
    tokens = patches + config.prefix_tokens
    block = tokens * _projections(config) + _attention(config.width, tokens**2)
    last = block if kept is None else _last_block(config, tokens, kept)
    ends = patch_embed_flops(config, resolution) + 2 * config.width * (embed_dim or 0)
    # A head that pools by attention is a block with one query.
    ends += _last_block(config, patches, 1) if config.pool == "map" else 0
    return ends + (config.depth - 1) * block + last


def text_flops(config: TextConfig, embed_dim: int, tokens_read: bool = False, text_tokens: float | None = None) -> int:
    """Forward operations of one text of `text_tokens` ids, by default as many as there can be, head included.

    `tokens_read`: whether the caption decoder reads its tokens; if not, the last block of a tower whose class token is
    projected computes that alone.
    """
    tokens = config.context_length if text_tokens is None else round(text_tokens)
    # BERT reads one of [bos] and class token, and computes every block whole.
    sentence = config.encoder == "bert"
    tokens -= sentence
    block = tokens * _projections(config) + _attention(config.width, tokens**2)
    whole = tokens_read or sentence or config.pool == "mean"
    last = block if whole else _last_block(config, tokens, 1)
    return (config.depth - 1) * block + last + 2 * config.width * embed_dim


def texts_flops(config: OpenVisionConfig, texts: int, text_tokens: float | None = None) -> int:
    """Forward operations of the `texts` texts of one sample, of which a decoder reads the first."""
    pruned = text_flops(config.text, config.embed_dim, False, text_tokens)
    if config.decoder is None:
        return texts * pruned
    # A decoder that reads padding has the text tower compute it.
    read = text_flops(config.text, config.embed_dim, True, None if config.decoder.reads_padding else text_tokens)
    return read + (texts - 1) * pruned


def decoder_flops(config: DecoderConfig, vision: VisionConfig, text: TextConfig, resolution: int) -> int:
    """Forward operations of one caption in version 1, every query's logits included."""
    return decoder_trunk_flops(config, vision, text, resolution) + head_flops(config, None)


def decoder_trunk_flops(
    config: DecoderConfig, vision: VisionConfig, text: TextConfig, resolution: int, text_tokens: float | None = None
) -> int:
    """The same without the logits: both projections and all blocks; `text_tokens` as of `text_flops`."""
    ids = text.context_length if text_tokens is None else round(text_tokens)
    image_tokens = patches_of(vision, resolution)
    prefix, queries = image_tokens + ids - 1, config.caption_length
    inputs = 2 * config.width * (image_tokens * vision.width + (ids - 1) * text.width)
    return inputs + _two_call_blocks(config, prefix, queries, prefix**2)


def autoregressive_trunk_flops(config: AutoregressiveDecoderConfig, vision: VisionConfig, kept: int) -> int:
    """Forward operations of one caption in OpenVision 2 without its logits, `kept` patch tokens being read."""
    inputs = 2 * config.width * kept * vision.width
    causal = config.image_attention == "causal"
    pairs = _causal_pairs(kept) if causal else kept**2
    return inputs + _two_call_blocks(config, kept, config.caption_length, pairs)


def head_flops(
    config: DecoderConfig | AutoregressiveDecoderConfig | GenLipTextConfig, caption_tokens: float | None
) -> int:
    """Forward operations of the logits of `caption_tokens` tokens; None is every position."""
    tokens = config.caption_length if caption_tokens is None else min(caption_tokens, config.caption_length)
    return round(2 * config.width * config.vocab_size * tokens)


def masked_flops(config: ModelConfig, resolution: int) -> int:
    """Forward operations of causal attention that are masked: what a counter of whole products counts in addition."""
    decoder = config.decoder
    if decoder is None:
        return 0
    queries = decoder.caption_length
    blocks = config.vision if isinstance(decoder, GenLipTextConfig) else decoder
    masked = blocks.depth * (queries**2 - _causal_pairs(queries))
    if isinstance(decoder, AutoregressiveDecoderConfig) and decoder.image_attention == "causal":
        kept = config.patches_read(patches_of(config.vision, resolution))
        masked += (decoder.depth - 1) * (kept**2 - _causal_pairs(kept))
    return _attention(blocks.width, masked)


def contrastive_flops(embed_dim: int, batch: int, texts: int) -> int:
    """Forward operations of one sample's row of logits against a whole batch: no part of MFU, and seldom 1 % of it."""
    return 2 * embed_dim * batch * texts


def _projections(config: AnyTower) -> int:
    """Operations of one token through the matrices of one block: q, k, v, out and the MLP, and GenLIP's gates."""
    attention, hidden = 4, 2
    if isinstance(config, GenLipVisionConfig):
        attention, hidden = 5 if config.gated else 4, 3
    return 2 * (attention * config.width**2 + hidden * config.width * config.mlp_dim)


def _attention(width: int, query_key_pairs: int) -> int:
    """Scores and weighted values."""
    return 4 * width * query_key_pairs


def _causal_pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def _last_block(config: AnyTower, keys: int, queries: int) -> int:
    """A block of which only `queries` of its `keys` tokens are read: keys and values of all, the rest of those."""
    rest = _projections(config) - 4 * config.width**2
    return keys * 4 * config.width**2 + queries * rest + _attention(config.width, keys * queries)


def _two_call_blocks(
    config: DecoderConfig | AutoregressiveDecoderConfig, prefix: int, queries: int, prefix_pairs: int
) -> int:
    """All blocks of a decoder: the prefix attends to itself, the queries to prefix and, causally, themselves."""
    seen_by_queries = _attention(config.width, queries * prefix + _causal_pairs(queries))
    whole = (prefix + queries) * _projections(config) + _attention(config.width, prefix_pairs) + seen_by_queries
    # The last block makes keys and values of the prefix and nothing else.
    last = queries * _projections(config) + prefix * 4 * config.width**2 + seen_by_queries
    return (config.depth - 1) * whole + last
