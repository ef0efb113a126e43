"""Stock open_clip and timm as teachers: our own export read by them says what our encoder says."""

import json

import numpy as np
import pytest
import torch

from openvision.errors import OpenVisionError
from openvision.models.layers import unit
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig
from openvision.teachers.load import load_teacher
from openvision.text.tokenizer import Tokenizer
from openvision.weights.export.targets import export
from openvision.weights.load import Checkpoint

CONFIG = OpenVisionConfig(
    embed_dim=24,
    vision=VisionConfig(width=48, depth=3, mlp_dim=100, heads=3, patch_size=8, image_size=40),
    text=TextConfig(width=32, depth=2, mlp_dim=64, heads=2, vocab_size=120, context_length=12),
)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    model = OpenVision(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tokenizer = Tokenizer.train(["a red circle on white"], 100)
    return Checkpoint(model.eval().vision, model, tokenizer, "test", {})


@pytest.mark.parametrize("library", ["open_clip", "timm"])
def test_an_export_teaches_what_our_encoder_does(checkpoint, tmp_path, library):
    export(checkpoint, library, tmp_path / "model")
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 40, 40), dtype=np.uint8))
    teacher = load_teacher(str(tmp_path / "model"), library)
    found = teacher(images)
    assert teacher.preprocessing.size == 40
    with torch.no_grad():
        # timm gives what a probe would read, without the head.
        pooled = checkpoint.vision.forward_features(images).pooled
        expected = checkpoint.vision.encode_image(images) if library == "open_clip" else unit(pooled)
    torch.testing.assert_close(found.pooled, expected, atol=1e-4, rtol=1e-4)
    assert found.patches is not None
    assert found.patches.shape == (3, 48, 5, 5)


@pytest.mark.parametrize(("library", "file"), [("open_clip", "open_clip_config.json"), ("timm", "config.json")])
def test_a_config_without_normalisation_is_refused(checkpoint, tmp_path, library, file):
    export(checkpoint, library, tmp_path / "model")
    path = tmp_path / "model" / file
    content = json.loads(path.read_text())
    for table in (content, content.get("preprocess_cfg", {}), content.get("pretrained_cfg", {})):
        table.pop("mean", None)
    path.write_text(json.dumps(content))
    with pytest.raises(OpenVisionError, match="its preprocessing is unknown"):
        load_teacher(str(tmp_path / "model"), library)
