"""FLOPs from a configuration equal what torch's counter sees on the meta device, tower by tower, to the last one.

The counter counts whole products: `masked_flops` is the stated difference, the masked half of causal attention.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from openvision.frozen.config import AutoencoderConfig
from openvision.frozen.cost import autoencoder_cost
from openvision.models.decoders.autoregressive import AutoregressiveDecoderConfig
from openvision.models.flops import (
    autoregressive_trunk_flops,
    contrastive_flops,
    decoder_flops,
    head_flops,
    masked_flops,
    patch_embed_flops,
    patches_of,
    sample_flops,
    text_flops,
    training_flops,
    vision_flops,
)
from openvision.models.genlip import GenLip, GenLipConfig, GenLipTextConfig, GenLipVisionConfig
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.openvision2 import ModelConfig, OpenVision2, OpenVision2Config
from openvision.models.openvision3 import LatentVisionConfig, OpenVision3, OpenVision3Config, ReconstructionConfig
from openvision.models.text import TextConfig, TextTransformer, build_text
from openvision.models.variants import SIZES, variant, variant2
from openvision.recipe.sections import WarmStart
from openvision.training.setup.model import frozen_parameters
from tests.planning.conftest import count

MODELS = [(size, patch) for size, towers in SIZES.items() for patch in towers.patches]
LARGE = [model for model in MODELS if model[1] == 14]
SHALLOW = 3
"""Blocks of each tower at the stages after the first: every block but the last costs the same."""


def stages(config: ModelConfig, size: str) -> list[tuple[ModelConfig, int]]:
    """The resolutions of a size, the first with all blocks and the others with few."""
    towers = {
        name: replace(tower, depth=SHALLOW)
        for name in ("vision", "text", "decoder")
        if (tower := getattr(config, name, None)) is not None
    }
    shallow: ModelConfig = replace(config, **towers)
    first, *others = SIZES[size].resolutions or (84, 224)
    return [(config, first), *((shallow, resolution) for resolution in others)]


def inputs(config: OpenVisionConfig, resolution: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(batch, 3, resolution, resolution), torch.zeros(
        batch, config.text.context_length, dtype=torch.long
    )


def embed_and_read(text: TextTransformer, ids: torch.Tensor) -> torch.Tensor:
    return text.project(text.forward_features(ids).pooled)


@pytest.mark.parametrize(
    ("size", "patch"),
    [
        # Ti is computed whole here, L below where it trains; the others differ by numbers alone.
        pytest.param(*model, marks=[] if model[0] == "tiny" else [pytest.mark.slow])
        for model in MODELS
    ],
)
def test_forward_of_every_tower_size_and_stage(meta, size, patch):
    for config, resolution in stages(variant(size, patch, 224), size):
        assert isinstance(config, OpenVisionConfig)
        assert config.decoder
        model = OpenVision(config)
        images, ids = inputs(config, resolution)
        assert count(model.text, ids) == text_flops(config.text, config.embed_dim)
        whole = text_flops(config.text, config.embed_dim, tokens_read=True)
        assert count(embed_and_read, model.text, ids) == whole
        assert count(model.vision, images) == vision_flops(config.vision, resolution, config.embed_dim)
        tokens = torch.empty(1, patches_of(config.vision, resolution), config.vision.width)
        text = torch.empty(1, config.text.context_length - 1, config.text.width)
        assert model.decoder
        counted = count(model.decoder, tokens, text) + count(
            model.decoder.logits, torch.empty(1, 128, config.decoder.width)
        )
        computed = decoder_flops(config.decoder, config.vision, config.text, resolution)
        assert counted - masked_flops(config, resolution) == computed


@pytest.mark.parametrize("image_attention", ["prefix", "causal"])
@pytest.mark.parametrize(
    ("size", "patch"),
    [pytest.param(*model, marks=[] if model[0] == "large" else [pytest.mark.slow]) for model in LARGE],
)
def test_forward_of_openvision2(meta, size, patch, image_attention):
    whole = variant2(size, patch, 224)
    whole = replace(whole, decoder=replace(whole.decoder, image_attention=image_attention))
    for config, resolution in stages(whole, size)[0 if image_attention == "prefix" else 1 :]:
        assert isinstance(config, OpenVision2Config)
        model = OpenVision2(config)
        kept = config.patches_read(patches_of(config.vision, resolution))
        images, keep = torch.empty(1, 3, resolution, resolution), torch.zeros(1, kept, dtype=torch.long)
        counted = count(model.vision.patch_tokens, images, keep)
        assert counted == vision_flops(config.vision, resolution, None, kept)
        ids = torch.zeros(1, config.decoder.caption_length, dtype=torch.long)
        tokens = torch.empty(1, kept, config.vision.width)
        counted = count(model.decoder, tokens, ids) - masked_flops(config, resolution)
        assert counted == autoregressive_trunk_flops(config.decoder, config.vision, kept)
        states = torch.empty(1, 60, config.decoder.width)
        assert count(model.decoder.logits, states) == head_flops(config.decoder, 60)


def test_a_sentence_encoder(meta):
    config = TextConfig(24, 3, 40, 2, vocab_size=60, context_length=16, pad_id=0, pool="mean", encoder="bert")
    ids = torch.zeros(1, 16, dtype=torch.long)
    assert count(embed_and_read, build_text(config, 8), ids) == text_flops(config, 8)


def test_a_mean_of_tokens_needs_the_whole_last_block(meta):
    config = TextConfig(24, 3, 40, 2, vocab_size=60, context_length=16, pad_id=0, pool="mean")
    ids = torch.zeros(1, 16, dtype=torch.long)
    assert count(build_text(config, 8), ids) == text_flops(config, 8) == text_flops(config, 8, tokens_read=True)


@pytest.mark.parametrize("reads_padding", [True, False])
def test_of_trimmed_texts_what_is_computed_is_counted(meta, reads_padding):
    config = variant("tiny", 16, 160)
    assert config.decoder is not None
    trimming = replace(config.text, pad_id=0)
    config = replace(config, text=trimming, decoder=replace(config.decoder, reads_padding=reads_padding))
    model, (images, ids) = OpenVision(config), inputs(config, 160, batch=2)
    # Beside its 16 ids each text has its class token.
    forward = sum(tower.forward for tower in sample_flops(config, 160, 2, caption_tokens=0, text_tokens=17))
    masked = masked_flops(config, 160)
    assert count(partial(model, text_lengths=np.full(4, 16)), images, ids, ids) == 2 * (forward + masked)
    assert forward < sum(tower.forward for tower in sample_flops(config, 160, 2, caption_tokens=0))


@pytest.mark.parametrize(
    ("size", "patch", "resolution"),
    [("tiny", 16, 160), pytest.param("small", 8, 160, marks=pytest.mark.slow), ("large", 14, 84)],
)
def test_training_is_three_forwards_less_the_gradient_of_pixels(meta, size, patch, resolution):
    config = variant(size, patch, resolution)
    model = OpenVision(config)
    images, ids = inputs(config, resolution, batch=2)

    def step() -> None:
        output = model(images, ids, ids)
        assert output.caption_states is not None
        assert model.decoder is not None
        valid = output.caption_states[:, :60]
        loss = output.image_embeds.sum() + output.text_embeds.sum() + model.decoder.logits(valid).sum()
        loss.backward()

    masked = 3 * masked_flops(config, resolution)
    assert count(step) == 2 * (training_flops(config, resolution, texts=2, caption_tokens=60) + masked)


@pytest.mark.parametrize("frozen", [("text",), ("vision",), ("vision", "text")])
def test_training_with_frozen_towers(meta, frozen):
    """What is computed: no gradient of their blocks, but that of their heads."""
    config = replace(variant("tiny", 16, 160), decoder=None)
    model = OpenVision(config)
    for parameter in frozen_parameters(model, WarmStart(frozen=frozen)):
        parameter.requires_grad_(False)
    images, ids = inputs(config, 160, batch=2)

    def step() -> None:
        output = model(images, ids, ids)
        (output.image_embeds.sum() + output.text_embeds.sum()).backward()

    assert count(step) == 2 * training_flops(config, 160, texts=2, frozen=frozen)
    assert count(step) < 2 * training_flops(config, 160, texts=2)


def test_training_of_openvision2(meta):
    config = variant2("tiny", 16, 160)
    model = OpenVision2(config)
    keep = torch.zeros(1, config.patches_read(100), dtype=torch.long)
    ids = torch.zeros(1, config.decoder.caption_length, dtype=torch.long)
    counted = count(lambda: model.decoder.logits(model(torch.empty(1, 3, 160, 160), ids, keep)).sum().backward())
    assert counted == training_flops(config, 160, texts=0) + 3 * masked_flops(config, 160)


@pytest.mark.parametrize(("gated", "width"), [(True, 128), (False, 192)])
def test_training_of_genlip(meta, gated, width):
    """Exactly, vision alone and the whole step; with projections to the vocabulary's width and without."""
    config = GenLipConfig(
        GenLipVisionConfig(192, 3, 512, 3, 16, 160, gated=gated), GenLipTextConfig(width, vocab_size=500)
    )
    model = GenLip(config)
    images, ids = torch.empty(1, 3, 160, 160), torch.zeros(1, 127, dtype=torch.long)
    assert count(model.vision.patch_tokens, images) == vision_flops(config.vision, 160, None)
    counted = count(lambda: model.decoder.logits(model(images, ids)).sum().backward())
    assert counted == training_flops(config, 160, texts=0) + 3 * masked_flops(config, 160)
    for parameter in frozen_parameters(model, WarmStart(frozen=("vision",))):
        parameter.requires_grad_(False)
    locked = count(lambda: model.decoder.logits(model(images, ids)).sum().backward())
    assert locked == training_flops(config, 160, texts=0, frozen=("vision",)) + 3 * masked_flops(config, 160)


def test_plain_clip_has_two_towers_and_one_text():
    config = replace(variant("tiny", 16, 160), decoder=None)
    towers = sample_flops(config, 160, texts=1)
    assert [tower.name for tower in towers] == ["vision", "text"]
    assert towers[1].forward == text_flops(config.text, config.embed_dim)
    embed = patch_embed_flops(config.vision, 160)
    assert towers[0].training == 3 * towers[0].forward - embed
    assert training_flops(config, 160, texts=1) == sum(tower.training for tower in towers)
    assert masked_flops(config, 160) == 0


def test_logits_of_valid_tokens_only():
    config = variant("tiny", 16, 160)
    assert config.decoder
    short, long = (training_flops(config, 160, 2, tokens) for tokens in (60, 61))
    assert long - short == 3 * 2 * config.decoder.width * config.decoder.vocab_size
    assert head_flops(config.decoder, 1000) == head_flops(config.decoder, None)


def test_contrastive_logits(meta):
    features = torch.empty(32, 16)
    assert count(lambda: features @ features.T) == 32 * contrastive_flops(16, batch=32, texts=1)


@pytest.mark.parametrize("pixels_of", [1, 2])
def test_training_of_openvision3(meta, pixels_of):
    pixels = AutoencoderConfig("pixels", None, 192, 8, 1.0)
    config = OpenVision3Config(
        embed_dim=64,
        vision=LatentVisionConfig(96, 3, 192, 3, 16, 64, autoencoder=pixels),
        text=TextConfig(96, 2, 192, 3, 500, 12),
        decoder=AutoregressiveDecoderConfig(96, 2, 192, 3, 500, 20),
        reconstruction=ReconstructionConfig(128, 2, 256, 4, pixels_of=pixels_of),
    )
    model = OpenVision3(config)
    text, ids = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 20, dtype=torch.long)

    def step() -> None:
        output = model(torch.empty(2, 3, 64, 64), text, input_ids=ids)
        loss = output.image_embeds.sum() + output.text_embeds.sum() + output.predicted.sum()
        (loss + model.decoder.logits(output.caption_states).sum()).backward()

    assert count(step) == 2 * (training_flops(config, 64, texts=1) + 3 * masked_flops(config, 64))
    # The autoencoder: forward before the tower, forward and the gradient of its input behind the decoder.
    vision = replace(config.vision, autoencoder=AutoencoderConfig("conv", "x", 16, 8, 1.0))
    with_one = {t.name: t.training for t in sample_flops(replace(config, vision=vision), 64, texts=1)}
    cost = autoencoder_cost(vision.autoencoder, 64)
    assert (with_one["encoding"], with_one["decoding"]) == (cost.encode, 2 * (cost.decode // pixels_of))
