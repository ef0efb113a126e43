"""One dispatch for the operations of a transformer: stock PyTorch, `kernels/cpu.py` while training on a CPU, or
`kernels/gpu.py` in half precision on CUDA.

The layers call these functions and test no device, dtype or sequence length themselves. Every choice computes the same
operation up to the rounding of sums. Compiled and exported graphs always contain stock operations.
"""

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision.models.kernels import cpu, gpu

Gelu = Literal["none", "tanh"]

EXPLICIT_KEYS_ON_CPU = 128
"""Up to this many keys a CPU computes attention as two matrix products: for short sequences the backward pass of the
fused kernel is several times slower. Beyond, the memory traffic of the products costs more (docs/decisions.md)."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the residual stream: autocast's where autocast is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` in float32 even under autocast: heads and decoder projections (spec 1, mixed precision)."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(full_precision(x), full_precision(weight), None if bias is None else full_precision(bias))


def training_on_cpu(x: Tensor) -> bool:
    """Whether an operation on `x` belongs to an eager training step on a CPU."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x @ weight.T + bias`: (..., D) -> (..., D')."""
    single = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    # An autograd function computes both gradients, so it pays only where both are needed.
    if cpu.HAS_ONEDNN_LINEAR and single and x.requires_grad and weight.requires_grad and training_on_cpu(x):
        return cpu.linear(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """Linear layer with bias that goes through the dispatch."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D')."""
        return linear(x, self.weight, self.bias)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, L, parts * D) -> `parts` tensors of shape (B, heads, L, D / heads)."""
    batch, length, _ = x.shape
    return x.view(batch, length, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, L, d) -> (B, L, heads * d)."""
    return x.transpose(1, 2).flatten(2)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Boolean (queries, keys): query i sees keys up to i + keys - queries, so that the last one sees all."""
    key = torch.arange(keys, device=device)
    return key <= torch.arange(queries, device=device)[:, None] + (keys - queries)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, seen: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of q (B, h, Q, d) over k and v (B, h, K, d) -> (B, h, Q, d).

    Every query attends everywhere or, if `causal`, as `causal_mask` says. `seen`, bool (B, K), leaves keys out for
    every query of a sample; each sample needs one that is seen.
    """
    if seen is None and _on_gpu(q, q.shape[-1]):
        return gpu.attention(q, k, v, causal)
    mask = causal_mask(q.shape[2], k.shape[2], q.device) if causal else None
    if seen is not None:
        seen = seen[:, None, None, :]
        mask = seen if mask is None else mask & seen
    many_keys = k.shape[2] > EXPLICIT_KEYS_ON_CPU
    if training_on_cpu(q) and q.dtype == torch.bfloat16 and many_keys and seen is None:
        return cpu.attention(q, k, v, mask)
    if q.device.type != "cpu" or torch.compiler.is_exporting() or many_keys:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


def self_attention(qkv: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    """Self-attention of packed queries, keys and values (B, L, 3 * D) -> (B, L, D), over `seen` keys, bool (B, L)."""
    if seen is not None:
        q, k, v = split_heads(qkv, 3, heads)
        return merge_heads(attention(q, k, v, seen=seen))
    if _on_gpu(qkv, qkv.shape[-1] // (3 * heads)):
        return gpu.self_attention(qkv, heads)
    if training_on_cpu(qkv) and (qkv.shape[1] <= EXPLICIT_KEYS_ON_CPU or qkv.dtype == torch.bfloat16):
        return cpu.self_attention(qkv, heads)
    q, k, v = split_heads(qkv, 3, heads)
    return merge_heads(attention(q, k, v))


def _on_gpu(x: Tensor, head_width: int) -> bool:
    if torch.compiler.is_dynamo_compiling():
        return gpu.IN_COMPILED_CODE and gpu.takes(x, head_width)
    return gpu.takes(x, head_width) and not torch.compiler.is_exporting()


class Mlp(Protocol):
    """Linear, GELU, linear."""

    fc1: Linear
    fc2: Linear
    gelu: Gelu

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        ...


def recomputed_mlp(x: Tensor, norm: nn.LayerNorm, mlp: Mlp) -> Tensor:
    """`mlp(norm(x))`; training on a CPU recomputes the norm and the GELU in the backward pass.

    Elsewhere activation checkpointing does that from outside. A layer that something else has replaced, LoRA for
    example, is called as it is.
    """
    if training_on_cpu(x) and type(mlp.fc1) is type(mlp.fc2) is Linear:
        return cpu.norm_mlp(x, norm, mlp.fc1, mlp.fc2, mlp.gelu)
    return mlp(norm(x))
