"""A head that pools patch tokens by attention: one learned query, cross attention, an MLP with a residual.

It is the head of SigLIP (arXiv 2303.15343) and of big_vision's ViT, under timm's names (`AttentionPoolLatent`).
"""

import torch
from torch import Tensor, nn

from openvision.models.kernels.dispatch import Linear, attention, merge_heads, split_heads
from openvision.models.layers import LayerNorm, Mlp


class AttentionPool(nn.Module):
    """(B, N, D) normed tokens -> (B, D); the MLP's GELU is exact, as in the vision tower."""

    def __init__(self, width: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)
        self.norm = LayerNorm(width)
        self.mlp = Mlp(width, mlp_dim, gelu="none")

    def init_weights(self) -> None:
        """Initialise every parameter: the query by its width, matrices as in the blocks of the vision tower."""
        nn.init.normal_(self.latent, std=self.latent.shape[-1] ** -0.5)
        for linear in (self.q, self.kv, self.proj, self.mlp.fc1, self.mlp.fc2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.norm.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """What the query finds among the tokens (B, N, D) of each image: (B, D)."""
        (q,) = split_heads(self.q(self.latent.expand(tokens.shape[0], -1, -1)), 1, self.heads)
        k, v = split_heads(self.kv(tokens), 2, self.heads)
        x = self.proj(merge_heads(attention(q, k, v)))
        return (x + self.mlp(self.norm(x)))[:, 0]
