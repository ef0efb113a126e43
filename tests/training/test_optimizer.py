"""The update equals the formula of spec section 5, and decay touches matrices only."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.text import TextConfig
from openvision.models.vision import VisionConfig
from openvision.recipe.sections import Optimizer
from openvision.training.optimizer import adam as optimizer_module
from openvision.training.optimizer.adam import Adam, tiles
from openvision.training.optimizer.build import build_optimizer


def bfloat16(x: np.ndarray | float) -> np.ndarray:
    return torch.as_tensor(x, dtype=torch.float32).to(torch.bfloat16).float().numpy()


def reference(weight: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float, storage) -> np.ndarray:
    """Adam written out one tensor at a time, with the first moment stored through `storage`."""
    b1, b2, eps = 0.9, 0.95, 1e-8
    stored, second = np.zeros_like(weight), np.zeros_like(weight)
    for t, gradient in enumerate(gradients, start=1):
        first = np.float32(1 - b1) * gradient + storage(storage(b1) * stored)
        second = np.float32(b2) * second + np.float32(1 - b2) * gradient**2
        stored = storage(first)
        direction = (first / (1 - b1**t)) / (np.sqrt(second / (1 - b2**t)) + eps)
        weight = weight - lr * (direction + decay * weight)
    return weight


@pytest.mark.parametrize(("dtype", "storage"), [(torch.bfloat16, bfloat16), (torch.float32, np.float32)])
def test_six_steps_equal_the_written_out_formula(dtype, storage):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(7, 5)).astype(np.float32)
    gradients = [rng.normal(scale=0.1, size=(7, 5)).astype(np.float32) for _ in range(6)]
    parameter = nn.Parameter(torch.from_numpy(weight.copy()))
    optimizer = Adam([{"params": [parameter], "lr": 0.01, "weight_decay": 0.2}], first_moment=dtype)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    expected = reference(weight, gradients, 0.01, 0.2, storage)
    assert np.abs(parameter.detach().numpy() - expected).max() < 3e-7
    assert optimizer.state[parameter]["exp_avg"].dtype == dtype


def test_storage_dtype_matters():
    rng = np.random.default_rng(1)
    gradients = [rng.normal(size=(50,)).astype(np.float32) for _ in range(6)]
    weight = np.ones(50, dtype=np.float32)
    rounded = reference(weight, gradients, 0.01, 0.0, bfloat16)
    exact = reference(weight, gradients, 0.01, 0.0, np.float32)
    assert np.abs(rounded - exact).max() > 1e-6


def test_parameters_without_gradient_are_left_alone():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Adam([{"params": [used, unused], "lr": 0.1, "weight_decay": 0.5}])
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert not torch.equal(used, torch.ones(2))


def trained(steps: int = 3) -> list[torch.Tensor]:
    """Parameters of odd sizes after some steps."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((70, 33), (5,), (), (401,), (1, 300))]
    optimizer = Adam([{"params": parameters[:2], "weight_decay": 0.2}, {"params": parameters[2:]}])
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("tile", [1, 64, 500, 2**20])
def test_tiles_change_no_number(tile, monkeypatch):
    whole = trained()
    monkeypatch.setattr(optimizer_module, "TILE_ON_CPU", tile)
    assert all(torch.equal(a, b) for a, b in zip(whole, trained(), strict=True))


def test_tiles_hold_every_element_once_and_no_more_than_asked():
    rows = [(torch.arange(size), torch.arange(size) + size) for size in (70, 5, 401)]
    found = list(tiles(rows, 128))
    assert [sum(len(tensor) for tensor in first) for first, _ in found] == [70, 69, 128, 128, 81]
    for place in (0, 1):
        joined = torch.cat([tensor for tile in found for tensor in tile[place]])
        assert torch.equal(joined, torch.cat([row[place] for row in rows]))


def test_decay_mask():
    config = OpenVisionConfig(
        embed_dim=16,
        vision=VisionConfig(width=16, depth=1, mlp_dim=32, heads=2, patch_size=4, image_size=8),
        text=TextConfig(width=16, depth=1, mlp_dim=32, heads=2, vocab_size=30, context_length=6),
    )
    model = OpenVision(config)
    optimizer = build_optimizer(model, Optimizer())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decayed | spared == set(names.values())
    assert spared >= {"logit_scale", "vision.cls_token", "text.pos_embed", "text.token_embed.weight"}
    assert {"vision.patch_embed.proj.weight", "vision.head.weight", "text.head.weight"} <= decayed
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
    assert math.isclose(optimizer.param_groups[1]["weight_decay"], 0.0)
