"""The parts that all towers share: attention, MLP, pre-norm block, fixed sin-cos positions (spec sections 1-3).

- One block serves the vision tower, the text tower and the decoder; they differ in the GELU and the initialiser.
- LayerNorm epsilon is 1e-6 everywhere; q, k, v and every other projection inside a block have biases.
- Under autocast the residual stream runs in the autocast dtype, as the original does: see `compute_dtype`.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision.models.kernels.cpu import Linear, eager_training_on_cpu, head_attention, norm_mlp, packed_attention

LAYER_NORM_EPS = 1e-6
# The original divides by (norm + 1e-8).
UNIT_EPS = 1e-8
Gelu = Literal["none", "tanh"]


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the residual stream: autocast's where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where that is what it has."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """Scale rows to unit length: x / (|x| + 1e-8)."""
    return x / (x.norm(dim=-1, keepdim=True) + UNIT_EPS)


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` in float32 even under autocast: heads and decoder projections (spec 1, mixed precision)."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(full_precision(x), full_precision(weight))


# On CPU the fused kernel's backward pass is several times slower than two matrix products while sequences are short
# (docs/decisions.md has the measurement); beyond this many keys the products' memory traffic loses in float32.
EXPLICIT_KEYS_ON_CPU = 128


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of q (B, h, Q, d) over k and v (B, h, K, d), scaled by d^-0.5 -> (B, h, Q, d).

    `mask` (Q, K) is boolean, True where a query may look; None lets every query look everywhere.
    """
    if eager_training_on_cpu(q) and q.dtype == torch.bfloat16 and k.shape[2] > EXPLICIT_KEYS_ON_CPU:
        return head_attention(q, k, v, mask)
    if q.device.type != "cpu" or torch.compiler.is_exporting() or k.shape[2] > EXPLICIT_KEYS_ON_CPU:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


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
        batch, length, _ = x.shape
        return x.view(batch, length, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def merge_heads(self, x: Tensor) -> Tensor:
        """(B, heads, L, D / heads) -> (B, L, D), through the output projection."""
        return self.proj(x.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """Attend every position to every position: OpenVision masks nothing, not even padding."""
        qkv = self.qkv(x)
        if eager_training_on_cpu(qkv) and (x.shape[1] <= EXPLICIT_KEYS_ON_CPU or qkv.dtype == torch.bfloat16):
            return self.proj(packed_attention(qkv, self.heads))
        q, k, v = self.split_heads(qkv, 3)
        return self.merge_heads(attend(q, k, v))


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
        self.mlp = Mlp(width, mlp_dim, gelu)
        self.lean = False
        """Whether training on a CPU keeps less for the backward pass and makes norms and GELUs again in it."""
        self.branch_scale: Tensor | None = None
        """Factors (2, B) of the two branches of each sample; set from outside for stochastic depth."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self._scaled(self.attn(self.norm1(x)), 0)
        return x + self._scaled(self.feed(x), 1)

    def forward_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """`forward(x)` at `rows` int64 (B, K) alone -> (B, K, D): every row is a key, those asked for are queries."""
        width = x.shape[-1]
        weight, bias = self.attn.qkv.weight, self.attn.qkv.bias
        kept = x.gather(1, rows[..., None].expand(-1, -1, width))
        k, v = self.attn.split_heads(F.linear(self.norm1(x), weight[width:], bias[width:]), 2)
        (q,) = self.attn.split_heads(F.linear(self.norm1(kept), weight[:width], bias[:width]), 1)
        kept = kept + self._scaled(self.attn.merge_heads(attend(q, k, v)), 0)
        return kept + self._scaled(self.feed(kept), 1)

    def feed(self, x: Tensor) -> Tensor:
        """The MLP's branch: mlp(norm2(x))."""
        mlp = self.mlp
        if self.lean and eager_training_on_cpu(x) and type(mlp.fc1) is type(mlp.fc2) is Linear:
            return norm_mlp(x, self.norm2, mlp.fc1, mlp.fc2, mlp.gelu)
        return mlp(self.norm2(x))

    def _scaled(self, branch: Tensor, number: int) -> Tensor:
        if self.branch_scale is None:
            return branch
        return branch * self.branch_scale[number, :, None, None].to(branch.dtype)


def sincos_position_table(rows: int, columns: int, width: int) -> Tensor:
    """Fixed 2-D sin-cos positions in MoCo-v3 style, float32 (rows * columns, width), row-major (spec section 1.3).

    omega_k = 10000^(-k / (width/4 - 1)) with both ends included; the column coordinate comes first. Indices
    are raw grid positions: nothing is rescaled between resolutions, so there is nothing to interpolate.
    """
    if width % 4 or width < 8:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4 and at least 8, not {width}")
    # float64 inside, so that the table is the same on every device and build; rounded once at the end.
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / (quarter - 1))
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
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


def init_vision_block(block: Block, width: int) -> None:
    """Initialise a block of the vision tower (spec section 1): fc2 has variance scaling 0.3072 over fan-out."""
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
