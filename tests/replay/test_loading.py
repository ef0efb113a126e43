"""Public bug reports about weights that are loaded, tried here."""

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import openvision
from openvision.errors import OpenVisionError, require
from openvision.evaluation.data.images import folder_of_classes
from openvision.models.decoders.autoregressive import AutoregressiveDecoderConfig
from openvision.models.openvision import OpenVision
from openvision.models.openvision2 import OpenVision2, OpenVision2Config
from openvision.training.setup.start import describe_start, start_from
from openvision.weights.export.targets import at_resolution
from openvision.weights.folder import save_folder
from openvision.weights.load import Checkpoint, Request, load_checkpoint
from openvision.weights.open_clip import CONFIG_FILE, config_to_open_clip, to_open_clip
from tests.replay import models


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return models.checkpoint()


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    save_folder(tmp_path / "model", checkpoint.model, checkpoint.tokenizer, "", {})
    return tmp_path / "model"


@pytest.fixture
def released(checkpoint, tmp_path) -> Path:
    """The same model in the layout of open_clip."""
    place = tmp_path / "open_clip"
    place.mkdir()
    (place / CONFIG_FILE).write_text(json.dumps(config_to_open_clip(models.SHAPE)))
    state = to_open_clip(checkpoint.model.state_dict(), models.SHAPE)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, place / "open_clip_model.safetensors")
    return place


def image() -> torch.Tensor:
    return torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(2))


def test_a_training_checkpoint_is_unpacked(checkpoint, released):
    """zwx8981/LIQE#15: every tensor of a training checkpoint was missing: they were below `state_dict`."""
    state = load_file(released / "open_clip_model.safetensors")
    wrapped = {"epoch": 1, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    torch.save(wrapped, released / "epoch_1.pt")
    with torch.inference_mode():
        loaded = load_checkpoint(released / "epoch_1.pt").model
        assert loaded is not None
        assert torch.equal(loaded.encode_image(image()), checkpoint.model.encode_image(image()))


@pytest.mark.parametrize("name", ["vision.blocks.1.mlp.fc2.bias", "text.norm.weight", "logit_scale"])
def test_a_missing_tensor_is_never_random(folder, name):
    """huggingface/pytorch-image-models#1011: `strict=False` "solved" missing keys: they kept their random values."""
    state = load_file(folder / "model.safetensors")
    extra = state | {"vision.norm_pre.weight": torch.ones(48)}
    save_file({key: tensor for key, tensor in state.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(OpenVisionError, match=name.replace(".", r"\.")):
        load_checkpoint(folder)
    save_file(extra, folder / "model.safetensors")
    with pytest.raises(OpenVisionError, match=r"vision\.norm_pre\.weight"):
        load_checkpoint(folder)


def test_a_configuration_of_another_depth_is_refused(released):
    """mlfoundations/open_clip#1040: a name brought the configuration of another model, and blocks were left over."""
    other = replace(models.SHAPE, vision=replace(models.SHAPE.vision, depth=1))
    (released / CONFIG_FILE).write_text(json.dumps(config_to_open_clip(other)))
    with pytest.raises(OpenVisionError, match=r"vision\.blocks\.1\."):
        load_checkpoint(released)


def test_the_vision_tower_of_a_whole_model(checkpoint, folder, released):
    """zyxElsa/InST#51: weights of both towers, read by a class for one, left a list of keys that nobody could judge."""
    for place in (folder, released):
        tower = load_checkpoint(place, Request(vision_only=True))
        assert tower.model is None
        with torch.inference_mode():
            assert torch.equal(tower.vision(image()), checkpoint.vision(image()))


@pytest.mark.parametrize("resolution", [24, 64])
def test_another_resolution_needs_no_other_weights(checkpoint, folder, resolution):
    """YuchenLiu98/ECCV2022-SDA-FAS#1: learned positions of 256 px did not fit a model of 224 px."""
    images = torch.randn(1, 3, resolution, resolution)
    with torch.inference_mode():
        expected = checkpoint.vision(images)
        found = at_resolution(load_checkpoint(folder), resolution).vision(images)
    assert torch.allclose(found, expected, atol=1e-5)
    assert openvision.load(folder, resolution=resolution).grid == (resolution // 8, resolution // 8)


def test_another_objective_takes_what_it_has_in_common_and_says_so(folder):
    """mlfoundations/open_clip#1076: weights of one loss did not load for another, because parameters came or went."""
    captioner = OpenVision2(
        OpenVision2Config(models.SHAPE.vision, AutoregressiveDecoderConfig(32, 1, 64, 2, 160, 9)),
    )
    taken = start_from(captioner, str(folder))
    assert taken == ["vision"]
    assert describe_start(captioner, "x", taken) == "start x: copied vision; initialised at random: decoder"
    contrastive = OpenVision(models.SHAPE)
    assert start_from(contrastive, str(folder)) == ["vision", "text", "logit_scale"]
    # The scale comes along: it does not restart at its first value.
    loaded = load_checkpoint(folder).model
    assert loaded is not None
    assert torch.equal(contrastive.logit_scale, loaded.logit_scale)


def test_a_larger_vocabulary_is_named_with_both_sizes(folder):
    """mlfoundations/open_clip#335: a text encoder with added tokens did not load, and the sizes were hard to find."""
    larger = OpenVision(replace(models.SHAPE, text=replace(models.SHAPE.text, vocab_size=170)))
    with pytest.raises(OpenVisionError, match=r"the recipe's model\.text \(vocab_size 160, not 170\)"):
        start_from(larger, str(folder))


def test_a_torchvision_of_another_torch_is_one_sentence(tmp_path, monkeypatch):
    """pytorch/pytorch#157648: "operator torchvision::nms does not exist", and nothing said what to install."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "timm_here.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(OpenVisionError, match="the installed torchvision was built for another torch") as told:
        require("timm_here", extra="timm")
    major, minor, patch = importlib.metadata.version("torch").split("+")[0].split(".")
    assert major == "2"
    assert f"--no-deps torchvision==0.{int(minor) + 15}.{patch}" in str(told.value)


def test_class_names_belong_to_their_folders(tmp_path):
    """ultralytics/ultralytics#13936: classes were told apart by the order of the folders, not by their names.

    CSAILVision/places365#22: as texts "10" comes before "2", and the outputs were permuted.
    """
    names = [str(number) for number in range(12)]
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(tmp_path / name / "a.png")
    data = folder_of_classes(tmp_path, names)
    for row in range(12):
        assert data.images.load(row)[0, 0, 0] == 20 * int(data.classes[data.labels[row]])
    assert data.naming.startswith("by name")
    with pytest.raises(
        OpenVisionError, match=r"11 of 12 class names .* but '180' is not, and folder '11' is not listed"
    ):
        folder_of_classes(tmp_path, [*names[:-1], "180"])
