"""The caption loss of a split: that of training, for both versions, whatever the batch."""

import math

import pytest
import torch

from openvision.data.shards.dataset import ShardDataset
from openvision.encoding import write_captions
from openvision.errors import OpenVisionError
from openvision.evaluation.data.split import read_split
from openvision.evaluation.evaluators.captioning import measure_captions
from openvision.models.autoregressive import AutoregressiveDecoderConfig, teacher_forcing_ids
from openvision.models.decoder import DecoderConfig
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.openvision2 import OpenVision2, OpenVision2Config
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig, normalize
from openvision.objectives.caption import caption_loss
from openvision.text.tokenizer import Tokenizer

VISION = VisionConfig(width=16, depth=1, mlp_dim=32, heads=2, patch_size=8, image_size=32)


@pytest.fixture(scope="module")
def split(fake_data):
    return read_split(ShardDataset(fake_data / "heldout_random"), 32)


@pytest.fixture(scope="module")
def tokenizer(split):
    return Tokenizer.train(split.captions, 80)


def version2() -> OpenVision2:
    return OpenVision2(OpenVision2Config(VISION, AutoregressiveDecoderConfig(16, 1, 32, 2, 80, 20)))


def test_it_is_the_loss_of_training_with_every_patch(split, tokenizer):
    model = version2()
    labels, mask = map(torch.from_numpy, tokenizer.encode_target(split.captions, 20))
    states = model(normalize(split.images), teacher_forcing_ids(labels, tokenizer.bos_id))
    expected = caption_loss(states, labels, mask, model.decoder.head.weight).item()
    measured = measure_captions(model, tokenizer, split)
    assert measured["caption_loss"] == pytest.approx(expected, rel=1e-5)
    assert measured["caption_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert measured["caption_tokens"] == int(mask.sum())


def test_batches_change_nothing(split, tokenizer):
    model = version2()
    losses = [measure_captions(model, tokenizer, split, size)["caption_loss"] for size in (1, 4, 100)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert model.training, "the mode is left as it was"


def test_version_1(split, tokenizer):
    text = TextConfig(16, 1, 32, 2, 80, 12)
    model = OpenVision(OpenVisionConfig(8, VISION, text, DecoderConfig(16, 1, 32, 2, 80, 20)))
    labels, mask = map(torch.from_numpy, tokenizer.encode_target(split.captions, 20))
    alts = torch.from_numpy(tokenizer.encode(split.alts, 12))
    output = model(normalize(split.images), alts)
    assert model.decoder is not None
    expected = caption_loss(output.caption_states, labels, mask, model.decoder.head.weight).item()
    assert measure_captions(model, tokenizer, split)["caption_loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(OpenVisionError, match="no caption decoder"):
        measure_captions(OpenVision(OpenVisionConfig(8, VISION, text)), tokenizer, split)


def test_a_model_that_learned_one_caption_writes_it(split, tokenizer):
    model = version2()
    labels, mask = map(torch.from_numpy, tokenizer.encode_target(split.captions[:1], 20))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        states = model(normalize(split.images[:1]), teacher_forcing_ids(labels, tokenizer.bos_id))
        caption_loss(states, labels, mask, model.decoder.head.weight).backward()
        optimizer.step()
    (written,) = write_captions(model, tokenizer, split.images[:1])
    assert tokenizer.tokens([written])[0] == tokenizer.tokens(split.captions[:1])[0][:18]
