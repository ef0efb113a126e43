"""The sigmoid loss: every pair of image and text is judged by itself (SigLIP, arXiv 2303.15343).

No pair needs the others' logits, so the loss and its gradient come out of one pass over chunks of rows: three matrix
products, where a softmax over a batch that does not fit into memory needs four. With several processes each keeps its
own images as rows and sees the texts of all as columns; nothing but the texts is exchanged.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from openvision.objectives.contrastive import CHUNK_LOGITS, Chunks
from openvision.objectives.gather import gather, world_size


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    scale: Tensor,
    bias: Tensor,
    chunk: int = CHUNK_LOGITS,
    group: dist.ProcessGroup | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Minus the log-likelihood of all B * B pairs, divided by B: a pair is right or wrong with sigmoid(logit).

    A logit is `scale * cosine + bias`; the pairs of the diagonal are right. In float32 (float64 stays float64),
    whatever autocast says. O(chunk + B E) memory; the gradient cannot be differentiated again. What a rank's value is
    among several processes is as in `info_nce`: call backward on it as it is.

    Args:
        image_embeds: (B, E) unit vectors.
        text_embeds: (B, E) unit vectors; row i belongs to image i.
        scale: factor on cosines, exp of the parameter, shape ().
        bias: what is added to them, shape ().
        chunk: logits held at a time; two such buffers exist.
        group: the processes whose pairs form the batch; None for this one alone.
        groups: int64 (B,), a number for each text, the same for equal texts: all texts of a group are right for its
            images. None: each image has its own text.

    Returns:
        Scalar loss, nats.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        images, texts = (x if x.dtype == torch.float64 else x.float() for x in (image_embeds, text_embeds))
        group = None if world_size(group) == 1 else group
        first = 0 if group is None else dist.get_rank(group) * len(images)
        both = None if groups is None else (groups, gather(groups, group))
        columns, numbers = gather(texts, group), (scale.to(images.dtype), bias.to(images.dtype))
        loss: Tensor = _Sigmoid.apply(images, columns, *numbers, chunk, first, both)  # pyright: ignore[reportAssignmentType]
    return loss


def sigmoid_losses(
    image_embeds: Tensor,
    text_embeds: Tensor,
    scale: Tensor,
    bias: Tensor,
    chunk: int = CHUNK_LOGITS,
    group: dist.ProcessGroup | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """One `sigmoid_loss` for each of the K kinds of text, (K,), as `contrastive_losses` has it for the softmax.

    `scale` is of shape (), or (K,) with one for each kind.
    """
    numbers = [None] * len(text_embeds) if groups is None else groups
    kinds = zip(text_embeds, scale if scale.ndim else [scale] * len(text_embeds), numbers, strict=True)
    return torch.stack([sigmoid_loss(image_embeds, texts, s, bias, chunk, group, equal) for texts, s, equal in kinds])


class _Sigmoid(torch.autograd.Function):
    """Row i belongs to column `first + i` or, with `groups` of rows and of columns, to all columns of its group."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        bias: Tensor,
        chunk: int,
        first: int,
        groups: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        losses = []
        differentiated = any(ctx.needs_input_grad)  # pyright: ignore[reportAttributeAccessIssue]
        grad_rows, grad_columns, grad_bias = torch.empty_like(rows), torch.zeros_like(columns), torch.zeros_like(bias)
        for part, logits, spare in Chunks(rows, columns, scale, chunk):
            # The sign of a right pair is turned: softplus is then the loss of every pair, sigmoid its gradient.
            signed = logits.add_(bias)
            if groups is None:
                signed.diagonal(first + part.start).neg_()
                right = None
            else:
                right = groups[0][part, None] == groups[1]
                signed.copy_(torch.where(right, -signed, signed))
            losses.append(F.softplus(signed).sum())
            if not differentiated:
                continue
            grad = torch.sigmoid(signed, out=spare)
            if right is None:
                grad.diagonal(first + part.start).neg_()
            else:
                grad.copy_(torch.where(right, -grad, grad))
            torch.mm(grad, columns, out=grad_rows[part])
            grad_columns.addmm_(grad.T, rows[part])
            grad_bias += grad.sum()
        # d loss / d scale is the sum of (d loss / d logits) * rows @ columns.T, of which one product is at hand.
        grad_scale = (rows * grad_rows).sum()
        ctx.save_for_backward(grad_rows.mul_(scale), grad_columns.mul_(scale), grad_scale, grad_bias)
        return torch.stack(losses).sum() / len(rows)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, grad_loss: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None, None]:
        gradients: tuple[Tensor, ...] = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        factor = grad_loss / len(gradients[0])
        rows, columns, scale, bias = (gradient * factor for gradient in gradients)
        return rows, columns, scale, bias, None, None, None
