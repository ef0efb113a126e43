"""What patches learn from an averaged tower: targets that tell patches apart, and crops that show them otherwise.

The target is not a patch's feature as it is, of which most is common to all patches, but what sets it apart from the
other patches of its image (data2vec 2.0, arXiv 2212.07525, normalises its targets so). Each sample is normalised alone,
so micro-batches change nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6


def patch_targets(tokens: Tensor) -> Tensor:
    """Patch tokens (B, N, D) -> each channel less its mean over the N patches, over its deviation; float32.

    float64 stays. A channel that is the same in all patches becomes 0.
    """
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=1, keepdim=True, correction=0)
    return (wide - mean) * (variance + _EPS).rsqrt()


def crop_boxes(uniform: Tensor, area: tuple[float, float]) -> Tensor:
    """Rectangles of the image's own aspect, float (B, 2, 3), as affine maps from the crop to the image.

    Args:
        uniform: (B, 3) numbers in [0, 1): they choose area, column and row.
        area: lowest and highest share of the image's area.
    """
    side = (area[0] + (area[1] - area[0]) * uniform[:, 0]).sqrt()
    column, row = ((2 * uniform[:, axis] - 1) * (1 - side) for axis in (1, 2))
    nothing = torch.zeros_like(side)
    return torch.stack([side, nothing, column, nothing, side, row], dim=1).unflatten(1, (2, 3))


def read_crops(maps: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, C, H, W) inside `boxes` -> (B, C, *size), bilinear between the centres of pixels or patches.

    Images and maps of patches of the same images give the same places, whatever autocast is on: it would round the
    places. Nothing is blurred before it is made smaller.
    """
    with torch.autocast(maps.device.type, enabled=False):
        grid = F.affine_grid(boxes.to(maps.dtype), [len(maps), 1, *size], align_corners=False)
        return F.grid_sample(maps, grid, padding_mode="border", align_corners=False)


def crop_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches as which a crop is read: half of the image's, rounded up."""
    rows, columns = ((side + 1) // 2 for side in grid)
    return rows, columns
