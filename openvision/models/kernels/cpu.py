"""The two operations that a training step on a CPU spends its time in, forward and backward, faster than stock.

- Attention: scores of a few sequences at a time, which stay in the cache; those of long sequences are made again in the
  backward pass. In self-attention one copy brings queries, keys and values together into the layout of the products,
  and their gradients go back in one. The fused kernel's backward pass is slow, most of all in bfloat16.
- Float32 products by oneDNN, which is a tenth faster than MKL's on processors that are not Intel's.

Both compute what `torch.nn.functional` does, but for the rounding of sums. Anything else (other devices, other dtypes,
compilation, export) takes the stock operations.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores of attention computed at a time, to be used again while they are in the cache.
CHUNK_SCORES = 2**18
# Up to so many keys the scores' softmax is kept for the backward pass; beyond it would be most of a block's memory.
SHORT = 128

_HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def eager_training_on_cpu(x: Tensor) -> bool:
    """Whether an operation on `x` is one of a training step that is run as it is written, on a CPU."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _Attention:
    """Attention of N sequences, q (N, Q, d) over k and v (N, K, d), as many at a time as stay in the cache.

    `mask` (Q, K) is boolean, True where a query may look; None lets every query look everywhere.
    """

    def __init__(self, qkv: Sequence[Tensor] | Tensor, mask: Tensor | None) -> None:
        self.q, self.k, self.v = qkv
        q = self.q
        self.scale = q.shape[-1] ** -0.5
        self.kept: Tensor | None = None
        self.bias = None if mask is None else q.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))

    def shares(self, rows: slice) -> Tensor:
        """How much of each value every query of these sequences takes, (n, Q, K)."""
        if self.kept is not None:
            return self.kept[rows]
        bias, beta = (self.q.new_empty(1), 0) if self.bias is None else (self.bias, 1)
        return torch.softmax(torch.baddbmm(bias, self.q[rows], self.k[rows].mT, beta=beta, alpha=self.scale), dim=-1)

    def chunks(self) -> Iterator[slice]:
        """The sequences in turn."""
        step = max(1, CHUNK_SCORES // (self.q.shape[1] * self.k.shape[1]))
        for start in range(0, len(self.q), step):
            yield slice(start, min(start + step, len(self.q)))

    def forward(self) -> Tensor:
        """Attended values (N, Q, d)."""
        attended = torch.empty_like(self.q)
        for rows in self.chunks():
            torch.bmm(self.shares(rows), self.v[rows], out=attended[rows])
        return attended

    def backward(self, of_attended: Tensor, of_q: Tensor, of_k: Tensor, of_v: Tensor) -> None:
        """Write the gradients into the last three; shares that were not kept are computed again."""
        for rows in self.chunks():
            shares = self.shares(rows)
            torch.bmm(shares.mT, of_attended[rows], out=of_v[rows])
            of_shares = torch.bmm(of_attended[rows], self.v[rows].mT)
            of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
            for out, scores, other in ((of_q, of_scores, self.k), (of_k, of_scores.mT, self.q)):
                torch.baddbmm(out[rows], scores, other[rows], beta=0, alpha=self.scale, out=out[rows])


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        batch, length, width = qkv.shape
        with torch.autocast("cpu", enabled=False):
            packed = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4).reshape(3, batch * heads, length, -1)
            attention = _Attention(packed, None)
            if length <= SHORT:
                attention.kept = attention.shares(slice(None))
            attended = attention.forward()
        ctx.save_for_backward(packed, attention.kept)
        ctx.heads = heads
        return attended.view(batch, heads, length, -1).transpose(1, 2).reshape(batch, length, width // 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        packed, kept = ctx.saved_tensors
        batch, length, width = grad.shape
        with torch.autocast("cpu", enabled=False):
            of_attended = grad.view(batch, length, ctx.heads, -1).transpose(1, 2).reshape(packed[0].shape)
            grads = torch.empty_like(packed)
            attention = _Attention(packed, None)
            attention.kept = kept
            attention.backward(of_attended, *grads)
        grads = grads.view(3, batch, ctx.heads, length, -1).permute(1, 3, 0, 2, 4)
        return grads.reshape(batch, length, 3 * width), None


class _HeadAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            flat = [x.flatten(0, 1).contiguous() for x in (q, k, v)]
            attended = _Attention(flat, mask).forward()
        ctx.save_for_backward(*flat)
        ctx.mask = mask
        return attended.view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        flat = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            grads = [torch.empty_like(x) for x in flat]
            _Attention(flat, ctx.mask).backward(grad.flatten(0, 1).contiguous(), *grads)
        of_q, of_k, of_v = (x.view(*grad.shape[:2], *x.shape[1:]) for x in grads)
        return of_q, of_k, of_v, None


def packed_attention(qkv: Tensor, heads: int) -> Tensor:
    """Attention of every position to every position, scaled by d^-0.5.

    `qkv` (B, L, 3 * D) holds queries, keys, values, each of `heads` heads -> (B, L, D), in the dtype of `qkv`.
    """
    attended: Tensor = _PackedAttention.apply(qkv, heads)  # pyright: ignore[reportAssignmentType]
    return attended


def head_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of q (B, h, Q, d) over k and v (B, h, K, d), scaled by d^-0.5 -> (B, h, Q, d).

    `mask` (Q, K) is boolean, True where a query may look; None lets every query look everywhere.
    """
    attended: Tensor = _HeadAttention.apply(q, k, v, mask)  # pyright: ignore[reportAssignmentType]
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


class _NormMlp(torch.autograd.Function):
    """LayerNorm, linear, GELU, linear; of the MLP's tensors only the wide one before the GELU is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, shift: Tensor, *rest: Any) -> Tensor:
        w1, b1, w2, b2, gelu, eps = rest
        with torch.autocast("cpu", enabled=False):
            normed, mean, deviation = torch.native_layer_norm(x, x.shape[-1:], norm, shift, eps)
            # The casts of autocast, once a step.
            w1, b1, w2, b2 = (parameter.to(x.dtype) for parameter in (w1, b1, w2, b2))
            hidden = _product(normed, w1, b1)
            y = _product(F.gelu(hidden, approximate=gelu), w2, b2)
        ctx.save_for_backward(x, norm, shift, mean, deviation, w1, w2, hidden)
        ctx.gelu, ctx.eps, ctx.parameter_dtype = gelu, eps, rest[0].dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, norm, shift, mean, deviation, w1, w2, hidden = ctx.saved_tensors
        shape, dtype = x.shape[-1:], ctx.parameter_dtype
        with torch.autocast("cpu", enabled=False):
            grad = grad.contiguous()
            active = F.gelu(hidden, approximate=ctx.gelu)
            of_w2, of_b2 = _of_parameters(grad, active)
            of_hidden = torch.ops.aten.gelu_backward(_product(grad, w2.t(), None), hidden, approximate=ctx.gelu)
            normed = torch.native_layer_norm(x, shape, norm, shift, ctx.eps)[0]
            of_w1, of_b1 = _of_parameters(of_hidden, normed)
            of_normed = _product(of_hidden, w1.t(), None)
            of_x, of_norm, of_shift = torch.ops.aten.native_layer_norm_backward(
                of_normed, x, shape, mean, deviation, norm, shift, [True, True, True]
            )
        of_rest = (g.to(dtype) for g in (of_w1, of_b1, of_w2, of_b2))
        return of_x, of_norm, of_shift, *of_rest, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, without a gradient."""
    if _HAS_ONEDNN_LINEAR and x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _of_parameters(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of a linear map."""
    rows = grad.flatten(0, -2)
    return rows.t() @ x.flatten(0, -2), rows.sum(0)


def norm_mlp(x: Tensor, norm: torch.nn.LayerNorm, fc1: torch.nn.Linear, fc2: torch.nn.Linear, gelu: str) -> Tensor:
    """`fc2(gelu(fc1(norm(x))))` that keeps half of what the stock operations keep for the backward pass."""
    parameters = (norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    y: Tensor = _NormMlp.apply(x, *parameters, gelu, norm.eps)  # pyright: ignore[reportAssignmentType]
    return y


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
