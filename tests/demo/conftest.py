"""Two checkpoints: one that captions and one that cannot, and a folder of images."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openvision.demo.checkpoint import DemoCheckpoint, distinct_names, load_demo
from openvision.inference.encoder import Encoder
from openvision.models.openvision import OpenVision
from tests.conftest import COLOURS, SHAPES, draw


@pytest.fixture(scope="session")
def able(tiny_run) -> DemoCheckpoint:
    return load_demo(str(tiny_run), torch.device("cpu"))


@pytest.fixture(scope="session")
def both(able) -> list[DemoCheckpoint]:
    """`able`, and a model of other weights without a decoder."""
    assert isinstance(able.encoder, Encoder)
    torch.manual_seed(1)
    assert isinstance(able.encoder.model, OpenVision)
    plain = OpenVision(replace(able.encoder.model.config, decoder=None))
    return distinct_names([able, DemoCheckpoint(able.name, Encoder(plain, able.encoder.tokenizer))])


@pytest.fixture(scope="session")
def shapes_images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for colour in COLOURS:
        for shape in SHAPES:
            (folder / f"{colour}-{shape}.png").write_bytes(draw(colour, shape))
    return folder
