"""Validation, encoding and generation on a pretended accelerator: they run there, and wait in the listed places."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from openvision.data.shards.dataset import ShardDataset
from openvision.encoding import class_embeddings, encode_images, generate_captions, text_encoder, write_captions
from openvision.models.openvision2 import build_model
from openvision.models.vision import VisionTransformer
from openvision.runtime import SINGLE_PROCESS
from openvision.text.tokenizer import Tokenizer
from openvision.training.validation import validate
from tests.accelerator.fake import Accelerator, fake_accelerator
from tests.accelerator.test_step import WAITS, recipe_of

# The table of positions, copied once a resolution.
POSITIONS = "models/vision.py"
# Where an evaluation may wait, and for what.
MAY_WAIT = {
    "encoding.py": "vectors of a set of images or texts, ids of captions",
    "evaluation/evaluators/model.py": "vectors of a batch",
    "evaluation/evaluators/model.py, HostCopy": "logit scale",
    "evaluation/evaluators/caption_loss.py, HostCopy": "caption loss of a batch, at the end",
    "models/decoders/autoregressive.py, HostCopy": "whether all captions have ended, two tokens later",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a red square on white", "a blue bar"], 400)


def model_on(accelerator: Accelerator, kind: str) -> Any:
    """A model of the recipes of the steps, in evaluation."""
    config = recipe_of(kind).model
    with torch.device("meta"):
        model = build_model(config)
    return accelerator.place(model).eval()


def images(count: int) -> torch.Tensor:
    return torch.from_numpy(np.zeros((count, 3, 32, 32), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["openvision", "clip", "openvision2"])
def test_validation(kind, shapes_folder, tokenizer):
    split = ShardDataset(shapes_folder / "validation")
    with fake_accelerator() as accelerator:
        model = model_on(accelerator, kind)
        numbers = validate(model, tokenizer, split, 32, replace(SINGLE_PROCESS, device=accelerator.device))
        assert {"top1", "t2i_r1", "i2t_r1"} <= numbers.keys() or "caption_loss" in numbers
        assert accelerator.to_device
        assert all(place.endswith(", sent") or place == POSITIONS for place in accelerator.to_device)
        assert accelerator.to_device[POSITIONS] == 1
        assert accelerator.to_host
        assert accelerator.to_host.keys() <= MAY_WAIT.keys(), accelerator.to_host
        # Zero-shot and retrieval encode the images once.
        assert accelerator.to_host["evaluation/evaluators/model.py"] == (kind != "openvision2")


def test_images_and_texts_are_encoded_with_one_wait_each(tokenizer):
    with fake_accelerator() as accelerator:
        model = model_on(accelerator, "openvision")
        vectors = encode_images(model, images(10), batch_size=4)
        assert vectors.shape == (10, 16)
        assert accelerator.to_device == {POSITIONS: 1, "encoding.py, sent": 3}
        assert accelerator.to_host == {"encoding.py": 1}
        accelerator.forget()
        assert class_embeddings(text_encoder(model, tokenizer), ["bar", "pole"], ["{}", "a {}"]).shape == (2, 16)
        assert accelerator.to_host == {"encoding.py": 1}


def test_captions_of_all_positions_at_once(tokenizer):
    with fake_accelerator() as accelerator:
        model = model_on(accelerator, "openvision")
        assert len(generate_captions(model, tokenizer, images(3), ["a bar"] * 3, batch_size=2)) == 3
        assert accelerator.to_device == {POSITIONS: 1, "encoding.py, sent": 4}
        assert accelerator.to_host == {"encoding.py": 2}


def test_captions_token_by_token(tokenizer):
    with fake_accelerator() as accelerator:
        model = model_on(accelerator, "openvision2")
        assert len(write_captions(model, tokenizer, images(2), batch_size=2)) == 2
        assert accelerator.to_device == {POSITIONS: 1, "encoding.py, sent": 1}
        # The host learns two tokens later that all have ended; here they have at once.
        assert accelerator.to_host == {"models/decoders/autoregressive.py, HostCopy": 3, "encoding.py": 1}


def test_a_wait_that_is_put_in_is_found(tokenizer, monkeypatch):
    encode = VisionTransformer.encode_image
    monkeypatch.setattr(
        VisionTransformer, "encode_image", lambda self, x: encode(self, x) * encode(self, x).sum().item()
    )
    with fake_accelerator() as accelerator, pytest.raises(WAITS):
        encode_images(model_on(accelerator, "clip"), images(2))


def test_generation_that_asks_at_every_token_is_found(tokenizer, monkeypatch):
    monkeypatch.setattr("openvision.models.decoders.autoregressive.HostCopy", lambda ended: bool(ended))
    with fake_accelerator() as accelerator, pytest.raises(WAITS):
        write_captions(model_on(accelerator, "openvision2"), tokenizer, images(2))
