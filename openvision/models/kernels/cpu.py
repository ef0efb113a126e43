"""Attention, linear layers and the MLP for training on a CPU: forward and backward passes faster than the stock ones.

- Attention computes the scores of a few sequences at a time, so that they stay in the cache, and recomputes those of
  long sequences in the backward pass. Self-attention copies queries, keys and values once into the layout of the matrix
  products, and their gradients once back. The backward pass of the fused kernel is slow, most of all in bfloat16.
- Matrix products in float32 use oneDNN, a tenth faster than MKL on processors that are not Intel's.

Results equal those of `torch.nn.functional` up to the rounding of sums. `dispatch.py` decides when they are used.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Attention scores computed at a time: few enough to stay in the cache until they are used.
CHUNK_SCORES = 2**18
# Attention probabilities over up to this many keys are kept for the backward pass; more would be most of the memory.
KEPT_KEYS = 128

HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def self_attention(qkv: Tensor, heads: int) -> Tensor:
    """Unmasked self-attention of packed queries, keys and values (B, L, 3 * D) -> (B, L, D), in the dtype of `qkv`."""
    attended: Tensor = _SelfAttention.apply(qkv, heads)  # pyright: ignore[reportAssignmentType]
    return attended


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of q (B, h, Q, d) over k and v (B, h, K, d) -> (B, h, Q, d).

    `mask` (Q, K) is boolean, True where a query attends; None attends everywhere.
    """
    attended: Tensor = _HeadAttention.apply(q, k, v, mask)  # pyright: ignore[reportAssignmentType]
    return attended


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x @ weight.T + bias` in float32 by oneDNN: (..., D) -> (..., D')."""
    y: Tensor = _Linear.apply(x, weight, bias)  # pyright: ignore[reportAssignmentType]
    return y


def norm_mlp(x: Tensor, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, gelu: str) -> Tensor:
    """`fc2(gelu(fc1(norm(x))))`, keeping half of what the stock operations keep for the backward pass."""
    parameters = (norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    y: Tensor = _NormMlp.apply(x, *parameters, gelu, norm.eps)  # pyright: ignore[reportAssignmentType]
    return y


class _Attention:
    """Attention of N sequences, q (N, Q, d) over k and v (N, K, d), in chunks of sequences."""

    def __init__(self, qkv: Sequence[Tensor] | Tensor, mask: Tensor | None, kept: Tensor | None = None) -> None:
        self.q, self.k, self.v = qkv
        self.scale = self.q.shape[-1] ** -0.5
        self.kept = kept
        self.bias = None if mask is None else self.q.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))

    def probabilities(self, rows: slice) -> Tensor:
        """Attention probabilities of these sequences, (n, Q, K)."""
        if self.kept is not None:
            return self.kept[rows]
        bias, beta = (self.q.new_empty(1), 0) if self.bias is None else (self.bias, 1)
        return torch.softmax(torch.baddbmm(bias, self.q[rows], self.k[rows].mT, beta=beta, alpha=self.scale), dim=-1)

    def chunks(self) -> Iterator[slice]:
        """Slices of sequences whose scores fit the cache."""
        step = max(1, CHUNK_SCORES // (self.q.shape[1] * self.k.shape[1]))
        for start in range(0, len(self.q), step):
            yield slice(start, min(start + step, len(self.q)))

    def forward(self) -> Tensor:
        """Attended values (N, Q, d)."""
        attended = torch.empty_like(self.q)
        for rows in self.chunks():
            torch.bmm(self.probabilities(rows), self.v[rows], out=attended[rows])
        return attended

    def backward(self, grad_attended: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> None:
        """Write the gradients of queries, keys and values into the last three arguments."""
        for rows in self.chunks():
            probabilities = self.probabilities(rows)
            torch.bmm(probabilities.mT, grad_attended[rows], out=grad_v[rows])
            grad_probabilities = torch.bmm(grad_attended[rows], self.v[rows].mT)
            grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
            for out, scores, other in ((grad_q, grad_scores, self.k), (grad_k, grad_scores.mT, self.q)):
                torch.baddbmm(out[rows], scores, other[rows], beta=0, alpha=self.scale, out=out[rows])


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, heads: int) -> Tensor:
        batch, length, width = qkv.shape
        with torch.autocast("cpu", enabled=False):
            packed = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4).reshape(3, batch * heads, length, -1)
            chunked = _Attention(packed, None)
            if length <= KEPT_KEYS:
                chunked.kept = chunked.probabilities(slice(None))
            attended = chunked.forward()
        ctx.save_for_backward(packed, chunked.kept)
        ctx.heads = heads
        return attended.view(batch, heads, length, -1).transpose(1, 2).reshape(batch, length, width // 3)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        packed, kept = ctx.saved_tensors
        batch, length, width = grad.shape
        with torch.autocast("cpu", enabled=False):
            grad_attended = grad.view(batch, length, ctx.heads, -1).transpose(1, 2).reshape(packed[0].shape)
            grads = torch.empty_like(packed)
            _Attention(packed, None, kept).backward(grad_attended, *grads)
        grads = grads.view(3, batch, ctx.heads, length, -1).permute(1, 3, 0, 2, 4)
        return grads.reshape(batch, length, 3 * width), None


class _HeadAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            flat = [x.flatten(0, 1).contiguous() for x in (q, k, v)]
            attended = _Attention(flat, mask).forward()
        ctx.save_for_backward(*flat)
        ctx.mask = mask
        return attended.view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        flat = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            grads = [torch.empty_like(x) for x in flat]
            _Attention(flat, ctx.mask).backward(grad.flatten(0, 1).contiguous(), *grads)
        grad_q, grad_k, grad_v = (x.view(*grad.shape[:2], *x.shape[1:]) for x in grads)
        return grad_q, grad_k, grad_v, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = torch.ops.mkldnn._linear_pointwise(grad, weight.t(), None, "none", [], "")
        return grad_x, *_parameter_gradients(grad, x)


class _NormMlp(torch.autograd.Function):
    """LayerNorm, linear, GELU, linear; keeps the wide tensor before the GELU and recomputes the others."""

    @staticmethod
    def forward(ctx, x, gamma, beta, w1, b1, w2, b2, gelu: str, eps: float) -> Tensor:
        ctx.gelu, ctx.eps, ctx.parameter_dtype = gelu, eps, w1.dtype
        with torch.autocast("cpu", enabled=False):
            normed, mean, deviation = torch.native_layer_norm(x, x.shape[-1:], gamma, beta, eps)
            # The casts of autocast, once a step.
            w1, b1, w2, b2 = (parameter.to(x.dtype) for parameter in (w1, b1, w2, b2))
            hidden = _product(normed, w1, b1)
            y = _product(F.gelu(hidden, approximate=gelu), w2, b2)
        ctx.save_for_backward(x, gamma, beta, mean, deviation, w1, w2, hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gamma, beta, mean, deviation, w1, w2, hidden = ctx.saved_tensors
        shape = x.shape[-1:]
        with torch.autocast("cpu", enabled=False):
            grad = grad.contiguous()
            active = F.gelu(hidden, approximate=ctx.gelu)
            grad_w2, grad_b2 = _parameter_gradients(grad, active)
            grad_hidden = torch.ops.aten.gelu_backward(_product(grad, w2.t(), None), hidden, approximate=ctx.gelu)
            normed = torch.native_layer_norm(x, shape, gamma, beta, ctx.eps)[0]
            grad_w1, grad_b1 = _parameter_gradients(grad_hidden, normed)
            grad_normed = _product(grad_hidden, w1.t(), None)
            grad_x, grad_gamma, grad_beta = torch.ops.aten.native_layer_norm_backward(
                grad_normed, x, shape, mean, deviation, gamma, beta, [True, True, True]
            )
        linears = (g.to(ctx.parameter_dtype) for g in (grad_w1, grad_b1, grad_w2, grad_b2))
        return grad_x, grad_gamma, grad_beta, *linears, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, not recorded by autograd."""
    if HAS_ONEDNN_LINEAR and x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _parameter_gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of a linear layer with input `x` and output gradient `grad`."""
    rows = grad.flatten(0, -2)
    return rows.t() @ x.flatten(0, -2), rows.sum(0)
