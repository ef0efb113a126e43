"""Masked prediction of patches: what stands for the patches of an image that a student does not see.

The target is not a patch's feature as it is, of which most is common to all patches, but what sets it apart from the
other patches of its image (data2vec 2.0, arXiv 2212.07525, normalises its targets so). Each sample is normalised alone,
so micro-batches change nothing.
"""

import torch
from torch import Tensor

_EPS = 1e-6


def patch_targets(tokens: Tensor) -> Tensor:
    """Patch tokens (B, N, D) -> each channel less its mean over the N patches, over its deviation; float32.

    float64 stays. A channel that is the same in all patches becomes 0.
    """
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=1, keepdim=True, correction=0)
    return (wide - mean) * (variance + _EPS).rsqrt()
