"""Perceptual distances: the stand-in measures, and LPIPS says what it lacks."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from openvision.errors import OpenVisionError
from openvision.frozen import perceptual
from openvision.frozen.perceptual import open_perceptual, open_stand_in, resized


@pytest.fixture(autouse=True)
def _fresh():
    open_perceptual.cache_clear()
    yield
    open_perceptual.cache_clear()


def test_the_stand_in_is_zero_for_equal_images_and_grows_with_the_difference():
    distance = open_perceptual("efficientnet-lite0")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    noise = torch.randn_like(images)
    with torch.no_grad():
        near, far = (distance(images, images + strength * noise) for strength in (0.05, 0.5))
        assert distance(images, images).tolist() == [0.0, 0.0]
    assert near.shape == (2,)
    assert (near > 0).all()
    assert (near < far).all()


def test_its_gradient_reaches_the_image_alone():
    distance, images = open_perceptual("efficientnet-lite0").train(), torch.rand(1, 3, 32, 32)
    changed = (images + 0.1 * torch.rand_like(images)).requires_grad_()
    distance(images, changed).sum().backward()
    assert changed.grad is not None
    assert changed.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in distance.parameters())
    assert not any(module.training for module in open_stand_in().network.modules())


def test_it_knows_what_imagenet_taught_it():
    """Features of a photograph-like gradient and of noise differ; equal images have equal features."""
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    features = open_stand_in().features
    with torch.no_grad():
        one, two, other = features(ramp), features(ramp), features(torch.rand(1, 3, 64, 64) * 2 - 1)
    assert one.shape == (1, 1280)
    assert torch.equal(one, two)
    assert (one - other).norm() > 0.1 * one.norm()


class _Stock(nn.Module):
    """What the package `lpips` gives, one layer of it: slices that keep torchvision's layer numbers."""

    def __init__(self, net: str, pnet_rand: bool, verbose: bool) -> None:
        super().__init__()
        assert (net, pnet_rand, verbose) == ("vgg", True, False), "nothing may be downloaded"
        self.net = nn.Module()
        self.layer = nn.Sequential(nn.Conv2d(3, 4, 3))
        self.net.slice1 = self.layer

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (self.layer(one) - self.layer(other)).square().mean(dim=(1, 2, 3), keepdim=True)


def test_lpips_takes_its_backbone_from_a_folder(tmp_path, monkeypatch):
    package = type(sys)("lpips")
    package.LPIPS = _Stock  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "lpips", package)
    weights = {
        "features.0.weight": torch.ones(4, 3, 3, 3),
        "features.0.bias": torch.zeros(4),
        "classifier": torch.ones(1),
    }
    save_file(weights, tmp_path / "vgg16.safetensors")
    distance = open_perceptual("lpips", str(tmp_path))
    # A sum over 27 pixels that differ by 0.1.
    assert distance(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.1)).item() == pytest.approx(2.7**2)
    save_file({"features.1.weight": torch.ones(1)}, tmp_path / "vgg16.safetensors")
    open_perceptual.cache_clear()
    with pytest.raises(OpenVisionError, match=r"has no features.0.weight"):
        open_perceptual("lpips", str(tmp_path))


def test_lpips_without_weights_or_package_says_so(tmp_path, monkeypatch):
    with pytest.raises(OpenVisionError, match="name the folder that holds vgg16"):
        open_perceptual("lpips")
    with pytest.raises(OpenVisionError, match="holds no backbone for LPIPS"):
        open_perceptual("lpips", str(tmp_path))
    (tmp_path / "vgg16.pth").write_bytes(b"no weights")
    with pytest.raises(OpenVisionError, match=r"vgg16.pth cannot be read"):
        open_perceptual("lpips", str(tmp_path))
    torch.save({}, tmp_path / "vgg16.pth")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(OpenVisionError, match=r"openvision-encoders\[lpips\]"):
        open_perceptual("lpips", str(tmp_path))


def test_images_are_resized_only_where_they_must_be():
    images = torch.rand(1, 3, 32, 32)
    assert resized(images, 32) is images
    assert resized(images, 16).shape == (1, 3, 16, 16)
    assert perceptual.STAND_IN == "EfficientNet-Lite0"
