"""Model folders give back what was saved, and say what is wrong with them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from openvision.errors import OpenVisionError
from openvision.weights.folder import load_folder


@pytest.fixture
def folder(tiny_run, tmp_path):
    return shutil.copytree(tiny_run / "model", tmp_path / "model")


def edit(folder, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_a_loaded_model_computes(folder):
    model, tokenizer, info = load_folder(folder)
    assert not model.training
    embeddings = model.encode_image(torch.randn(2, 3, 32, 32))
    assert embeddings.shape == (2, 16)
    assert model.encode_text(torch.from_numpy(tokenizer.encode(["a red bar"], 12))).shape == (1, 16)
    assert info["samples_seen"] == 96


def test_every_problem_with_tensors_is_listed(folder):
    def change(state):
        del state["vision.cls_token"]
        state["extra"] = torch.zeros(1)
        state["text.head.weight"] = torch.zeros(3, 3)

    edit(folder, change)
    with pytest.raises(
        OpenVisionError, match=r"extra is not part.*text\.head\.weight is \(3, 3\).*cls_token is missing"
    ):
        load_folder(folder)


def test_a_checkpoint_of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision"]["width"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OpenVisionError, match="a checkpoint of another size"):
        load_folder(folder)


def test_missing_and_broken_files(folder, tmp_path):
    with pytest.raises(OpenVisionError, match="is not a model folder"):
        load_folder(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OpenVisionError, match=r"model\.safetensors is not a readable safetensors file"):
        load_folder(folder)
    weights.unlink()
    with pytest.raises(OpenVisionError, match=r"model\.safetensors does not exist"):
        load_folder(folder)
    (folder / "config.json").write_text('{"embed_dim": 3, "shape": 4}')
    with pytest.raises(OpenVisionError, match="does not describe an OpenVision model"):
        load_folder(folder)
