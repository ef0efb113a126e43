"""The two operations that a training step on a CPU spends its time in, forward and backward, faster than stock.

- Attention of short sequences: one copy brings queries, keys and values together into the layout of the products, and
  their gradients are written into one buffer that goes back in one copy. Stock operations copy each of them apart,
  twice; the fused kernel has a slow backward pass.
- Float32 products by oneDNN, which is a tenth faster than MKL's on processors that are not Intel's.

Both compute what `torch.nn.functional` does, but for the rounding of sums. Anything else (other devices, other dtypes,
compilation, export) takes the stock operations.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def eager_training_on_cpu(x: Tensor) -> bool:
    """Whether an operation on `x` is one of a training step that is run as it is written, on a CPU."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _PackedAttention(torch.autograd.Function):
    """Packed queries, keys, values (B, L, 3 * D) -> attended values (B, L, D)."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        batch, length, width = qkv.shape
        with torch.autocast("cpu", enabled=False):
            packed = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4).reshape(3, batch * heads, length, -1)
            q, k, v = packed
            scale = q.shape[-1] ** -0.5
            scores = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=scale)
            shares = torch.softmax(scores, dim=-1)
            attended = torch.bmm(shares, v)
        ctx.save_for_backward(packed, shares)
        ctx.heads, ctx.scale = heads, scale
        return attended.view(batch, heads, length, -1).transpose(1, 2).reshape(batch, length, width // 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        packed, shares = ctx.saved_tensors
        q, k, v = packed
        batch, length, width = grad.shape
        with torch.autocast("cpu", enabled=False):
            of_attended = grad.view(batch, length, ctx.heads, -1).transpose(1, 2).reshape(q.shape)
            grads = torch.empty_like(packed)
            torch.bmm(shares.mT, of_attended, out=grads[2])
            of_shares = torch.bmm(of_attended, v.mT)
            of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
            torch.baddbmm(grads[0], of_scores, k, beta=0, alpha=ctx.scale, out=grads[0])
            torch.baddbmm(grads[1], of_scores.mT, q, beta=0, alpha=ctx.scale, out=grads[1])
        grads = grads.view(3, batch, ctx.heads, length, -1).permute(1, 3, 0, 2, 4)
        return grads.reshape(batch, length, 3 * width), None


def packed_attention(qkv: Tensor, heads: int) -> Tensor:
    """Attention of every position to every position, scaled by d^-0.5.

    `qkv` (B, L, 3 * D) holds queries, keys, values, each of `heads` heads -> (B, L, D), in the dtype of `qkv`.
    """
    attended: Tensor = _PackedAttention.apply(qkv, heads)  # pyright: ignore[reportAssignmentType]
    return attended


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        rows = grad.flatten(0, -2)
        of_x = torch.ops.mkldnn._linear_pointwise(grad, weight.t(), None, "none", [], "")
        return of_x, rows.t() @ x.flatten(0, -2), rows.sum(0)


class Linear(torch.nn.Linear):
    """A linear map with bias, by oneDNN where a training step in float32 runs on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D')."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x @ weight.T + bias`."""
    single = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    # Without a gradient to x nobody trains through here, and a Function would compute one in vain.
    if _HAS_ONEDNN_LINEAR and single and x.requires_grad and weight.requires_grad and eager_training_on_cpu(x):
        y: Tensor = _OneDnnLinear.apply(x, weight, bias)  # pyright: ignore[reportAssignmentType]
        return y
    return F.linear(x, weight, bias)
