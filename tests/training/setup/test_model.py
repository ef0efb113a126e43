"""A run starts from given weights: parts that both have are taken, others keep their random values."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from openvision.errors import OpenVisionError
from openvision.models.autoregressive import AutoregressiveDecoderConfig
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.openvision2 import OpenVision2, OpenVision2Config
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig
from openvision.text.tokenizer import Tokenizer
from openvision.training.setup.model import start_from
from openvision.weights.folder import save_folder
from openvision.weights.jax import to_jax

VISION = VisionConfig(width=32, depth=2, mlp_dim=64, heads=2, patch_size=8, image_size=32)
V1 = OpenVisionConfig(16, VISION, TextConfig(32, 1, 64, 2, 64, 8))
V2 = OpenVision2Config(VISION, AutoregressiveDecoderConfig(32, 1, 64, 2, 64, 9))


def saved(model: OpenVision | OpenVision2, folder: Path) -> str:
    save_folder(folder, model, Tokenizer.train(["a red bar"], 64), "", {})
    return str(folder)


def equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_whole_model(tmp_path):
    source, fresh = OpenVision(V1), OpenVision(V1)
    source.logit_scale.data.fill_(3.0)
    assert start_from(fresh, saved(source, tmp_path / "v1")) == ["vision", "text", "logit_scale"]
    assert equal(fresh, source)


def test_version_2_from_a_tower_of_version_1(tmp_path):
    source, fresh = OpenVision(V1), OpenVision2(V2)
    decoder = fresh.decoder.head.weight.clone()
    assert start_from(fresh, saved(source, tmp_path / "v1")) == ["vision"]
    assert equal(fresh.vision.blocks[1], source.vision.blocks[1])
    assert torch.equal(fresh.decoder.head.weight, decoder)


def test_version_1_from_a_tower_without_head(tmp_path):
    source, fresh = OpenVision2(V2), OpenVision(V1)
    assert fresh.vision.head is not None
    head = fresh.vision.head.weight.clone()
    assert start_from(fresh, saved(source, tmp_path / "v2")) == ["vision"]
    assert torch.equal(fresh.vision.head.weight, head)
    assert torch.equal(fresh.vision.cls_token, source.vision.cls_token)


def test_version_2_takes_its_decoder_along(tmp_path):
    source, fresh = OpenVision2(V2), OpenVision2(V2)
    assert start_from(fresh, saved(source, tmp_path / "v2")) == ["vision", "decoder"]
    assert equal(fresh, source)


def test_a_tree_of_the_original(tmp_path):
    source, fresh = OpenVision(V1), OpenVision(V1)
    # One axis a head, which says how many there are.
    tree = {name: with_head_axis(name, array) for name, array in to_jax(source.state_dict()).items()}
    np.savez(tmp_path / "tree.npz", **tree)  # pyright: ignore[reportArgumentType]
    assert start_from(fresh, str(tmp_path / "tree.npz")) == ["vision", "text", "logit_scale"]
    assert equal(fresh, source)


def with_head_axis(name: str, array: np.ndarray) -> np.ndarray:
    if "/out/kernel" in name:
        return array.reshape(2, -1, array.shape[-1])
    projection = any(f"/{part}/" in name for part in ("query", "key", "value"))
    return array.reshape(*array.shape[:-1], 2, -1) if projection else array


def test_another_number_of_heads_is_refused(tmp_path):
    other = OpenVision(replace(V1, text=replace(V1.text, heads=4)))
    with pytest.raises(OpenVisionError, match=r"its text tower has 2 heads, the recipe's model\.text has 4"):
        start_from(other, saved(OpenVision(V1), tmp_path / "v1"))


@pytest.mark.parametrize("depth", [1, 3])
def test_another_shape_is_refused_before_anything_changes(tmp_path, depth):
    other = OpenVision(replace(V1, vision=replace(VISION, depth=depth)))
    before = other.vision.cls_token.clone()
    with pytest.raises(OpenVisionError, match=r"vision tower has another shape than the recipe's model\.vision"):
        start_from(other, saved(OpenVision(V1), tmp_path / "v1"))
    assert torch.equal(other.vision.cls_token, before)
