"""Losses of a student against a frozen teacher: vectors and patches by their cosine, batches by their similarities.

- A cosine leaves out the scale of the teacher's features, which no projection needs to learn (AM-RADIO,
  arXiv 2312.06709, takes it for pooled vectors).
- Rows of similarities say how the teacher orders the other images of the batch (SEED, arXiv 2101.04731, and
  CLIP-KD, arXiv 2307.12732); student and teacher may differ in width, so it needs no projection.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from openvision.objectives.gather import gather, world_size


def cosine_distance(student: Tensor, teacher: Tensor, share: Tensor) -> Tensor:
    """Sum over samples of `share` times the mean over places of 1 - cosine, scalar, in float32.

    Args:
        student: (B, D) or (B, N, D); the gradient flows here.
        teacher: the same shape.
        share: (B,), what each sample counts; one over the batch gives the mean.
    """
    with torch.autocast(student.device.type, enabled=False):
        wide = torch.promote_types(student.dtype, torch.float32)
        distance = 1 - F.cosine_similarity(student.to(wide), teacher.to(wide), dim=-1)
        return (distance.flatten(1).mean(dim=1) if distance.ndim > 1 else distance).mul(share).sum()


def similarity_divergence(
    student: Tensor, teacher: Tensor, temperature: float, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Mean over images of KL(teacher || student) of the softmax over the batch's other images of cosine / temperature.

    In float32 (float64 stays). It holds two matrices of own images times images of all processes. With several
    processes a rank's value is the mean over its own images; gradients are as for `contrastive.info_nce`.

    Args:
        student: (B, E) unit vectors.
        teacher: (B, P) unit vectors, without a gradient.
        temperature: of both softmaxes.
        group: the processes whose images form the batch; None for this one alone.
    """
    with torch.autocast(student.device.type, enabled=False):
        wide = torch.promote_types(student.dtype, torch.float32)
        first = 0 if group is None or world_size(group) == 1 else dist.get_rank(group) * len(student)
        rows = [
            (own @ gather(own, group).T / temperature).diagonal_scatter(
                torch.full((len(own),), torch.finfo(wide).min, dtype=wide, device=own.device), offset=first
            )
            for own in (student.to(wide), teacher.to(wide))
        ]
        ours, wanted = (F.log_softmax(logits, dim=1) for logits in rows)
        return F.kl_div(ours, wanted, reduction="batchmean", log_target=True)
