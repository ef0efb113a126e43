"""Teachers of every library read the student's pixels as they were trained, and one whose way is unknown is refused."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from openvision.errors import OpenVisionError
from openvision.models.decoders.autoregressive import AutoregressiveDecoderConfig
from openvision.models.layers import unit
from openvision.models.openvision2 import OpenVision2, OpenVision2Config
from openvision.models.openvision3 import OpenVision3, OpenVision3Config
from openvision.models.vision import VisionConfig, VisionTransformer, normalize
from openvision.recipe.sections import TeacherTable
from openvision.teachers.load import Library, load_teacher
from openvision.text.tokenizer import Tokenizer
from openvision.training.distillation import open_teacher
from openvision.weights.folder import save_folder
from openvision.weights.load import Checkpoint, Request, load_checkpoint
from tests.training.small_step import recipe_of

VISION = VisionConfig(width=32, depth=1, mlp_dim=64, heads=2, patch_size=8, image_size=32)


def images(size: int, count: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def test_our_own_is_the_encoder_itself_and_stays_frozen(tiny_run):
    tower = load_checkpoint(tiny_run).vision
    teacher = load_teacher(str(tiny_run))
    found = teacher(images(32))
    torch.testing.assert_close(found.pooled, tower.encode_image(images(32)))
    expected = F.layer_norm(tower.forward_features(normalize(images(32))).patch_tokens, (32,))
    assert found.patches is not None
    torch.testing.assert_close(found.patches.flatten(2).transpose(1, 2), expected, atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    assert (teacher.pooled_width, teacher.patch_width) == (16, 32)


def test_an_encoder_of_latents_reads_pixels_from_minus_one_to_one(tmp_path):
    config = recipe_of("openvision3").model
    assert isinstance(config, OpenVision3Config)
    save_folder(tmp_path / "model", OpenVision3(config), Tokenizer.train(["a red bar"], 40), "", {})
    teacher = load_teacher(str(tmp_path / "model"))
    expected = load_checkpoint(tmp_path / "model").vision.encode_image(images(32))
    torch.testing.assert_close(teacher(images(32)).pooled, expected)


def test_it_reads_the_size_it_is_told(tiny_run):
    teacher = load_teacher(str(tiny_run), resolution=24)
    found = teacher(images(40))
    assert found.patches is not None
    assert found.patches.shape == (2, 32, 3, 3)
    torch.testing.assert_close(found.pooled.norm(dim=1), torch.ones(2))


def test_efficientnet_has_its_imagenet_weights():
    """Two crops of one image are nearer to each other than to another image."""
    teacher = load_teacher("efficientnet-lite0", "efficientnet_lite")
    smooth = F.interpolate(images(8).float(), (120, 120), mode="bicubic").clamp(0, 255).to(torch.uint8)
    views = torch.cat([smooth[..., :100, :100], smooth[..., 20:, 20:]])
    found = teacher(views)
    similar = found.pooled @ found.pooled.T
    assert similar[0, 2] > max(similar[0, 1], similar[0, 3])
    assert similar[1, 3] > max(similar[1, 0], similar[1, 2])
    assert (teacher.pooled_width, teacher.patch_width) == (1280, 1280)
    assert found.patches is not None
    assert found.patches.shape[-2:] == (7, 7)
    with pytest.raises(OpenVisionError, match="224 px; leave resolution out"):
        load_teacher("efficientnet-lite0", "efficientnet_lite", 128)


@pytest.fixture
def dino(tmp_path):
    """A tiny DINOv2 as transformers writes it."""
    import transformers

    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, patch_size=4, image_size=16
    )
    model = transformers.Dinov2WithRegistersModel(config).eval()
    model.save_pretrained(tmp_path)
    how = {
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 16, "width": 16},
        "size": {"shortest_edge": 20},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(how))
    return tmp_path, model


def test_transformers(dino):
    folder, model = dino
    teacher = load_teacher(str(folder), "transformers")
    found = teacher(images(16))
    mean, deviation = (torch.tensor(x)[:, None, None] for x in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    with torch.no_grad():
        expected = model(pixel_values=(images(16) / 255 - mean) / deviation)
    torch.testing.assert_close(found.pooled, unit(expected.pooler_output))
    tokens = F.layer_norm(expected.last_hidden_state[:, 5:], (16,))
    assert found.patches is not None
    torch.testing.assert_close(found.patches.flatten(2).transpose(1, 2), tokens, atol=1e-4, rtol=1e-4)
    assert "reads 16 px, bicubic, mean 0.4/0.5/0.6" in teacher.describe()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_mean": None}, "says no image_mean"),
        ({"image_std": [0.2]}, "says no image_std"),
        ({"resample": 1}, "resample that is 2 .bilinear. or 3 .bicubic., but 1"),
        ({"resample": None}, "resample that is 2 .bilinear. or 3 .bicubic., but None"),
        ({"do_normalize": False}, "do_normalize that is true"),
        ({"do_rescale": False}, "do_rescale that is true"),
        ({"rescale_factor": 1.0}, "rescale_factor that is 1 / 255"),
        ({"crop_size": {"height": 16, "width": 20}, "size": None}, "square size"),
    ],
)
def test_unknown_preprocessing_is_refused(dino, change, message):
    folder, _ = dino
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(OpenVisionError, match=f"preprocessing is unknown.*{message}"):
        load_teacher(str(folder), "transformers")


def test_a_damaged_folder_is_one_sentence(dino):
    folder, _ = dino
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(OpenVisionError, match="cannot be loaded: "):
        load_teacher(str(folder), "transformers")


def test_a_captioner_teaches_patches_alone(tmp_path):
    decoder = AutoregressiveDecoderConfig(32, 1, 64, 2, vocab_size=60, caption_length=9)
    tokenizer = Tokenizer.train(["a red picture"], 60)
    save_folder(tmp_path / "v2", OpenVision2(OpenVision2Config(VISION, decoder)), tokenizer, "", {})
    table = TeacherTable(source=str(tmp_path / "v2"))
    with pytest.raises(OpenVisionError, match="only captions, so its pooled vector was never trained; set its pooled"):
        open_teacher(table)
    taught = open_teacher(table.model_copy(update={"pooled": 0.0, "similarity": 0.0, "patches": 1.0}))
    assert taught.patch_width == 32


def test_a_jax_tree_is_read_at_the_resolution_of_the_table(monkeypatch):
    """It does not contain its own."""
    asked = []

    def load(source: str, request: Request) -> Checkpoint:
        asked.append(request.image_size)
        return Checkpoint(VisionTransformer(VISION, 16), None, None, source, {})

    monkeypatch.setattr("openvision.teachers.load.load_checkpoint", load)
    assert load_teacher("tree.npz", resolution=48).preprocessing.size == 48
    assert asked == [48]


def test_missing_preprocessing_is_refused(dino):
    folder, _ = dino
    (folder / "preprocessor_config.json").unlink()
    files: dict[Library, str] = {
        "transformers": "preprocessor_config.json",
        "open_clip": "open_clip_config.json",
        "timm": "config.json",
    }
    for library, file in files.items():
        (folder / file).unlink(missing_ok=True)
        with pytest.raises(OpenVisionError, match=rf"teacher .*preprocessing is unknown, there is no {file}, which"):
            load_teacher(str(folder), library)
    with pytest.raises(OpenVisionError, match="is not a folder"):
        load_teacher(str(folder / "missing"), "transformers")
    for file in ("open_clip_config.json", "config.json"):
        (folder / file).write_text("{}")
    with pytest.raises(OpenVisionError, match=r"preprocessing is unknown, open_clip_config.json says no mean"):
        load_teacher(str(folder), "open_clip")
    with pytest.raises(OpenVisionError, match=r"preprocessing is unknown, config.json says no mean"):
        load_teacher(str(folder), "timm")
