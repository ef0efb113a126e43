"""Attention in half precision on CUDA: kernels of our own (triton_attention.py), where Triton is installed.

Triton comes with PyTorch for CUDA. Its import takes a while, so it waits until something is computed.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
HEAD_WIDTHS = (32, 64, 128)
"""Widths of a head that the kernels are written for."""
IN_COMPILED_CODE = True
"""Whether torch.compile takes the kernels too; benchmarks/train_gpu.py compares both."""


def takes(x: Tensor, head_width: int) -> bool:
    """Whether the kernels compute attention of queries, keys and values like `x`, heads of `head_width` each."""
    return HAS_TRITON and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and head_width in HEAD_WIDTHS


def self_attention(qkv: Tensor, heads: int) -> Tensor:
    """Unmasked self-attention of packed queries, keys and values (B, L, 3 * D) -> (B, L, D)."""
    from openvision.models.kernels import triton_attention

    return triton_attention.self_attention(qkv, heads)[0]


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """q (B, h, Q, d) over k and v (B, h, K, d) -> (B, h, Q, d); `causal`: query i sees keys up to i + K - Q."""
    from openvision.models.kernels import triton_attention

    return triton_attention.attention(q, k, v, causal)[0]


def operators() -> set[object]:
    """The operators of the kernels, as a compiler or a checkpointing policy meets them."""
    if not HAS_TRITON:
        return set()
    from openvision.models.kernels import triton_attention

    return {triton_attention.self_attention._opoverload, triton_attention.attention._opoverload}
