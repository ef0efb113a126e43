"""all_gather of tensors with a gradient, and sums over processes.

A process group of `torch.distributed` is always passed explicitly: None means this process alone, and nothing is
exchanged.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# The second names are those of torch before 2.13, which warns about them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world_size(group: dist.ProcessGroup | None) -> int:
    """Number of processes in the group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


class _Context(FunctionCtx):
    group: dist.ProcessGroup


class _AllGather(torch.autograd.Function):
    """Forward: the tensors of all ranks, by rank. Backward: the sum over ranks of the gradient of this rank's."""

    @staticmethod
    def forward(ctx: _Context, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = tensor.new_empty(dist.get_world_size(group) * len(tensor), *tensor.shape[1:])
        _all_gather(gathered, tensor.contiguous(), group=group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ranks = dist.get_world_size(ctx.group)
        own = grad.new_empty(len(grad) // ranks, *grad.shape[1:])
        if grad.is_cuda:
            _reduce_scatter(own, grad.contiguous(), group=ctx.group)
        else:
            # Gloo, which CPU tensors take, has no reduce-scatter in some releases; the sum of everything is affordable.
            total = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total, group=ctx.group)
            own.copy_(total.chunk(ranks)[dist.get_rank(ctx.group)])
        return own, None


def gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The tensors of all ranks, concatenated along the first dimension; differentiable once.

    The gradient that a rank receives is that of the SUM over ranks of what they computed from the result. All ranks
    must take part in the backward pass, in the same order.

    Args:
        tensor: (b, ...), of the same shape and dtype on every rank.
        group: the processes; None returns the tensor itself.

    Returns:
        (ranks * b, ...), the rows of rank r at [r * b : (r + 1) * b].
    """
    if group is None or world_size(group) == 1:
        return tensor
    gathered: Tensor = _AllGather.apply(tensor, group)  # pyright: ignore[reportAssignmentType]
    return gathered


@torch.no_grad()
def all_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over ranks, without a gradient: for counts of tokens and for values to be logged."""
    total = tensor.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total
