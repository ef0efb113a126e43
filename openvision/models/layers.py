"""Layers of all towers: attention, MLP, pre-norm block, fixed sin-cos positions, initialisation (spec sections 1-3).

- One block serves the vision tower, the text tower and the decoders; they differ in the GELU and the initialiser.
- LayerNorm epsilon is 1e-6 everywhere; every projection inside a block has a bias.
- How attention and linear layers are computed on a device is decided in kernels/dispatch.py. Under autocast the
  residual stream has the autocast dtype, as in the original: see `compute_dtype` there.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision.models.kernels.dispatch import (
    Gelu,
    Linear,
    attention,
    merge_heads,
    recomputed_mlp,
    self_attention,
    split_heads,
)

LAYER_NORM_EPS = 1e-6
# The original divides by (norm + 1e-8).
UNIT_EPS = 1e-8


Init = Literal["published", "by_width"]


def unit(x: Tensor) -> Tensor:
    """Scale rows to unit length: x / (|x| + 1e-8)."""
    return x / (x.norm(dim=-1, keepdim=True) + UNIT_EPS)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with epsilon 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=LAYER_NORM_EPS)


class Attention(nn.Module):
    """Multi-head self-attention with biases; `forward` takes (B, L, D) and returns (B, L, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def split_heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, L, parts * D) -> `parts` tensors of shape (B, heads, L, D / heads)."""
        return split_heads(x, parts, self.heads)

    def project(self, attended: Tensor) -> Tensor:
        """Merge heads and apply the output projection: (B, heads, L, D / heads) -> (B, L, D)."""
        return self.proj(merge_heads(attended))

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Attend from every position to those `seen`, bool (B, L), or to all: OpenVision masks not even padding."""
        return self.proj(self_attention(self.qkv(x), self.heads, seen))


class Mlp(nn.Module):
    """Linear, GELU, Linear; the GELU is exact in the vision tower, tanh-approximate elsewhere."""

    def __init__(self, width: int, hidden: int, gelu: Gelu) -> None:
        super().__init__()
        self.gelu: Gelu = gelu
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


class Block(nn.Module):
    """Pre-norm transformer block: x += attn(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, width: int, heads: int, mlp_dim: int, gelu: Gelu) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = self._make_mlp(width, mlp_dim, gelu)
        self.recompute_mlp = False
        """Whether training on a CPU recomputes norm and GELU of the MLP in the backward pass to save memory."""
        self.branch_scale: Tensor | None = None
        """Factors (2, B) of both residual branches of each sample, set by the trainer for stochastic depth."""

    def _make_mlp(self, width: int, mlp_dim: int, gelu: Gelu) -> Mlp:
        return Mlp(width, mlp_dim, gelu)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); `seen`, bool (B, L), are the positions that may be attended to."""
        normed = self.norm1(x)
        # What takes the place of this attention (LoRA, a kernel) need not know of masks where there is none.
        attended = self.attn(normed) if seen is None else self.attn(normed, seen)
        x = x + self._scaled(attended, 0)
        return x + self._scaled(self.feed_forward(x), 1)

    def forward_rows(self, x: Tensor, rows: Tensor, seen: Tensor | None = None) -> Tensor:
        """`forward(x, seen)` at positions `rows` only, int64 (B, K) -> (B, K, D): all are keys, `rows` are queries."""
        width = x.shape[-1]
        weight, bias = self.attn.qkv.weight, self.attn.qkv.bias
        kept = x.gather(1, rows[..., None].expand(-1, -1, width))
        k, v = self.attn.split_heads(F.linear(self.norm1(x), weight[width:], bias[width:]), 2)
        (q,) = self.attn.split_heads(F.linear(self.norm1(kept), weight[:width], bias[:width]), 1)
        kept = kept + self._scaled(self.attn.project(attention(q, k, v, seen=seen)), 0)
        return kept + self._scaled(self.feed_forward(kept), 1)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The MLP branch, mlp(norm2(x)): (B, L, D) -> (B, L, D)."""
        return recomputed_mlp(x, self.norm2, self.mlp) if self.recompute_mlp else self.mlp(self.norm2(x))

    def _scaled(self, branch: Tensor, index: int) -> Tensor:
        if self.branch_scale is None:
            return branch
        return branch * self.branch_scale[index, :, None, None].to(branch.dtype)


def sincos_position_table(rows: int, columns: int, width: int, side: int | None = None) -> Tensor:
    """Fixed 2-D sin-cos positions in MoCo-v3 style, float32 (rows * columns, width), row-major (spec section 1.3).

    omega_k = 10000^(-k / (width/4 - 1)) with both ends included; the column coordinate comes first. Indices
    are raw grid positions: nothing is rescaled between resolutions, so there is nothing to interpolate. With `side`
    a patch has the position of its centre on a grid of `side` x `side` patches over the same image (of the same area,
    where the image is not square): a place of the image keeps its position at every resolution.
    """
    if width % 4 or width < 8:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4 and at least 8, not {width}")
    # float64 inside, so that the table is the same on every device and build; rounded once at the end.
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / (quarter - 1))
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    if side is not None:
        step = side / (rows * columns) ** 0.5
        y, x = ((index + 0.5) * step - 0.5 for index in (y, x))
    x_angle = x.flatten()[:, None] * omega
    y_angle = y.flatten()[:, None] * omega
    return torch.cat([x_angle.sin(), x_angle.cos(), y_angle.sin(), y_angle.cos()], dim=1).float()


def init_text_block(block: Block, width: int) -> None:
    """Initialise a block of the text tower or the decoder (spec section 2).

    The residual projections are scaled by 24^-0.5 for every depth: the original never forwards its depth, so
    24 = 2 * 12 is what the released models were trained with.
    """
    residual_std = width**-0.5 * 24**-0.5
    nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
    nn.init.normal_(block.attn.proj.weight, std=residual_std)
    nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
    nn.init.normal_(block.mlp.fc2.weight, std=residual_std)
    zero_biases(block)


def init_vision_block(block: Block, width: int, init: Init = "published") -> None:
    """Initialise a block of the vision tower (spec section 1): fc2 has variance scaling 0.3072 over fan-out.

    The published deviation of 0.02 is that of a width of 1024 or so; "by_width" takes the text tower's values.
    """
    if init == "by_width":
        init_text_block(block, width)
        return
    for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1):
        nn.init.normal_(linear.weight, std=0.02)
    # Cutting a normal at two standard deviations leaves 0.8796 of its spread; divide so that the result is exact.
    std = math.sqrt(0.3072 / width) / 0.87962566103423978
    nn.init.trunc_normal_(block.mlp.fc2.weight, std=std, a=-2 * std, b=2 * std)
    zero_biases(block)


def is_skeleton(module: nn.Module) -> bool:
    """Whether `module` was built on the meta device, to be filled from a file: there is nothing to initialise.

    Random numbers on the meta device also import torch's compiler, which costs over a second at load time.
    """
    return next(module.parameters()).is_meta


def zero_biases(block: Block) -> None:
    """Set every projection bias of `block` to 0 and its LayerNorms to the identity."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
