"""How close images are to others: PSNR, SSIM, and a Frechet distance of features.

PSNR and SSIM take uint8 images as people see them, a value an image. A Frechet distance is a number of two whole sets,
and means something only beside the name of the network: with Inception's features it is FID, with others it is not.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

# Wang et al., 2004: a Gaussian window of 11 pixels and deviation 1.5.
_WINDOW, _DEVIATION = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
# Of equal images the PSNR is infinite; nobody can see the difference at this one.
MOST_PSNR = 100.0


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) twice -> peak signal-to-noise ratio float64 (B,), decibels, at most 100."""
    # On the host: not every accelerator has float64.
    error = (images.cpu().double() - others.cpu().double()).square().mean(dim=(1, 2, 3)) / 255**2
    return (-10 * error.clamp(min=10 ** (-MOST_PSNR / 10)).log10()).clamp(max=MOST_PSNR)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) twice -> structural similarity float32 (B,), mean over places and channels.

    Raises ValueError for images smaller than the window.
    """
    if min(images.shape[-2:]) < _WINDOW:
        raise ValueError(f"SSIM needs images of at least {_WINDOW} px a side, not {tuple(images.shape[-2:])}")
    x, y = images.float() / 255, others.float() / 255
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blur(images: Tensor) -> Tensor:
    places = torch.arange(_WINDOW, device=images.device) - _WINDOW // 2
    line = torch.exp(-(places.float() ** 2) / (2 * _DEVIATION**2))
    line = (line / line.sum()).expand(images.shape[1], 1, 1, -1)
    across = F.conv2d(images, line, groups=images.shape[1])
    return F.conv2d(across, line.transpose(2, 3), groups=images.shape[1])


def frechet_distance(features: NDArray[np.floating], others: NDArray[np.floating]) -> float:
    """Frechet distance of Gaussians fitted to features (n, D) and (m, D); n and m at least 2.

    Below D images its covariances are singular and it depends much on the number of images: compare equal numbers only.
    """
    first, second = (np.asarray(each, dtype=np.float64) for each in (features, others))
    means = [each.mean(axis=0) for each in (first, second)]
    covariances = [np.cov(each, rowvar=False).reshape(each.shape[1], -1) for each in (first, second)]
    root = _square_root(covariances[0])
    product = np.linalg.eigvalsh(root @ covariances[1] @ root)
    traces = np.trace(covariances[0]) + np.trace(covariances[1])
    return float(np.square(means[0] - means[1]).sum() + traces - 2 * np.sqrt(product.clip(min=0)).sum())


def _square_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
