"""Tensors of all processes in one, with a gradient, and sums over processes.

A group of `torch.distributed` is always given by hand: None means this process alone, and nothing is exchanged.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# The second names are those of torch before 2.13, which warns about them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world_size(group: dist.ProcessGroup | None) -> int:
    """Number of processes in the group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


class _Gather(torch.autograd.Function):
    """Forward: all parts, in the order of the ranks. Backward: the sum over ranks of the gradient of this part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ranks = dist.get_world_size(group)
        whole = tensor.new_empty(ranks * len(tensor), *tensor.shape[1:])
        _all_gather(whole, tensor.contiguous(), group=group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_whole: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ranks = dist.get_world_size(ctx.group)
        part = grad_whole.new_empty(len(grad_whole) // ranks, *grad_whole.shape[1:])
        if dist.get_backend(ctx.group) == "nccl":
            _reduce_scatter(part, grad_whole.contiguous(), group=ctx.group)
        else:
            # Gloo has no reduce-scatter in some releases; on a CPU the whole sum is affordable.
            total = grad_whole.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total, group=ctx.group)
            part.copy_(total.chunk(ranks)[dist.get_rank(ctx.group)])
        return part, None


def gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The tensors of all ranks, concatenated along the first dimension; differentiable once.

    The gradient that a rank receives is that of the SUM over ranks of what they computed from the whole. All ranks must
    take part in the backward pass, in the same order.

    Args:
        tensor: (b, ...), of the same shape and dtype on every rank.
        group: the processes; None returns the tensor itself.

    Returns:
        (ranks * b, ...), rank r's part at [r * b : (r + 1) * b].
    """
    if group is None or world_size(group) == 1:
        return tensor
    whole: Tensor = _Gather.apply(tensor, group)  # pyright: ignore[reportAssignmentType]
    return whole


@torch.no_grad()
def all_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over ranks, without a gradient: for counts of tokens and for values to be logged."""
    total = tensor.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total
