"""The contrastive loss: symmetric InfoNCE of images against each kind of text, apart (spec section 5).

The alt-texts and the synthetic sentences form two problems of their own; one is never a negative of the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor) -> Tensor:
    """Mean of both cross-entropies of `scale * image_embeds @ text_embeds.T` against its diagonal.

    Args:
        image_embeds: (B, E) unit vectors, float32.
        text_embeds: (B, E) unit vectors, float32; row i belongs to image i.
        scale: exp of the learned temperature, shape ().

    Returns:
        Scalar loss, nats.
    """
    logits = scale * image_embeds @ text_embeds.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def contrastive_losses(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor) -> Tensor:
    """One `info_nce` for each of the K kinds of text, (K,); the objective is their mean.

    Args:
        image_embeds: (B, E) unit vectors.
        text_embeds: (K, B, E) unit vectors.
        scale: exp of the learned temperature, shape ().
    """
    return torch.stack([info_nce(image_embeds, texts, scale) for texts in text_embeds])
