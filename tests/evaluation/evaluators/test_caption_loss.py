"""The caption loss: that of training, for both versions, whatever the batch."""

import math

import pytest
import torch

from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.encoding import write_captions
from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.caption_loss import CaptionLoss
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.images.preprocess import decode_image, prepare, to_batch
from openvision.models.decoders.autoregressive import AutoregressiveDecoderConfig, teacher_forcing_ids
from openvision.models.decoders.parallel import DecoderConfig
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.openvision2 import OpenVision2, OpenVision2Config
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig, normalize
from openvision.objectives.caption import caption_loss
from openvision.text.tokenizer import Tokenizer

VISION = VisionConfig(width=16, depth=1, mlp_dim=32, heads=2, patch_size=8, image_size=32)
SET = "heldout_random"


@pytest.fixture(scope="module")
def samples(fake_data):
    return list(ShardDataset(fake_data / SET))


@pytest.fixture(scope="module")
def images(samples):
    return to_batch([prepare(decode_image(sample.image), 32) for sample in samples])


@pytest.fixture(scope="module")
def captions(samples):
    return [str(sample.synthetic) for sample in samples]


@pytest.fixture(scope="module")
def tokenizer(captions):
    return Tokenizer.train(captions, 80)


def version2() -> OpenVision2:
    return OpenVision2(OpenVision2Config(VISION, AutoregressiveDecoderConfig(16, 1, 32, 2, 80, 20)))


def measure(model, tokenizer, data, **options):
    return CaptionLoss(data=SET, **options).measure(EvaluatedModel(model.vision, model, tokenizer), data)


def test_it_is_the_loss_of_training_with_every_patch(images, captions, tokenizer, fake_data):
    model = version2()
    labels, mask = map(torch.from_numpy, tokenizer.encode_target(captions, 20))
    states = model(images, teacher_forcing_ids(labels, tokenizer.bos_id))
    expected = caption_loss(states, labels, mask, model.decoder.head.weight).item()
    measured = measure(model, tokenizer, fake_data)
    assert measured.values["caption_loss"] == pytest.approx(expected, rel=1e-5)
    assert measured.values["caption_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert measured.facts["tokens"] == int(mask.sum())
    assert measured.facts["images"] == 6


def test_batches_change_nothing(tokenizer, fake_data):
    model = version2()
    sizes = (1, 4, 100)
    losses = [measure(model, tokenizer, fake_data, batch_size=size).values["caption_loss"] for size in sizes]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert model.training, "the mode is left as it was"


def test_version_1(images, captions, samples, tokenizer, fake_data):
    text = TextConfig(16, 1, 32, 2, 80, 12)
    model = OpenVision(OpenVisionConfig(8, VISION, text, DecoderConfig(16, 1, 32, 2, 80, 20)))
    labels, mask = map(torch.from_numpy, tokenizer.encode_target(captions, 20))
    alts = torch.from_numpy(tokenizer.encode([str(sample.alt) for sample in samples], 12))
    output = model(images, alts)
    assert model.decoder is not None
    expected = caption_loss(output.caption_states, labels, mask, model.decoder.head.weight).item()
    assert measure(model, tokenizer, fake_data).values["caption_loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(OpenVisionError, match="no caption decoder"):
        measure(OpenVision(OpenVisionConfig(8, VISION, text)), tokenizer, fake_data)


def test_an_alt_text_stands_in_for_a_caption_and_nothing_for_both(tokenizer, fake_data, tmp_path, picture):
    with ShardWriter(tmp_path / SET) as writer:
        writer.write("one", picture("red", "bar"), "png", "a red bar", {})
    found = measure(version2(), tokenizer, tmp_path)
    assert found.facts["tokens"] == int(tokenizer.encode_target(["a red bar"], 20)[1].sum())
    with pytest.raises(OpenVisionError, match="sample one has neither 'synthetic' nor 'alt'"):
        measure(version2(), tokenizer, tmp_path, alt="alt")


def test_a_model_that_learned_one_caption_writes_it(images, captions, tokenizer):
    model = version2()
    labels, mask = map(torch.from_numpy, tokenizer.encode_target(captions[:1], 20))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        states = model(normalize(images[:1]), teacher_forcing_ids(labels, tokenizer.bos_id))
        caption_loss(states, labels, mask, model.decoder.head.weight).backward()
        optimizer.step()
    (written,) = write_captions(model, tokenizer, images[:1])
    assert tokenizer.tokens([written])[0] == tokenizer.tokens(captions[:1])[0][:18]
