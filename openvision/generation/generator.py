"""A generator on the tokens of an OpenVision 3 encoder: a small diffusion transformer, trained by flow matching.

    x_t = (1 - t) x + t eps,   v = eps - x,   loss = |model(x_t, t, c) - v|^2

The paper evaluates its encoders in RAE's framework; this is that recipe in small: tokens normalised at every place and
channel, t logit-normal and shifted towards noise by the size of the tokens, velocity prediction, Euler steps, guidance.
The condition is the encoder's own embedding of a text: a class is conditioned on by its name, a caption by itself.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from openvision.models.bounds import MAX_LENGTH, MAX_WIDTH, check_transformer
from openvision.models.layers import Attention, Mlp, sincos_position_table
from openvision.untrusted import check_count

# RAE's time shift is sqrt(elements / 4096), relative to the 4 x 32 x 32 latents that the schedule was made for.
_REFERENCE_ELEMENTS = 4096
_FREQUENCIES = 128


@dataclass(frozen=True)
class GeneratorConfig:
    """Shape of the generator and of the tokens that it makes."""

    tokens: int
    token_width: int
    condition_width: int
    width: int = 192
    depth: int = 6
    mlp_dim: int = 768
    heads: int = 3

    def __post_init__(self) -> None:
        check_transformer(self.width, self.depth, self.mlp_dim, self.heads)
        for name in ("token_width", "condition_width"):
            check_count(name, getattr(self, name), 1, MAX_WIDTH)
        if math.isqrt(check_count("tokens", self.tokens, 1, MAX_LENGTH)) ** 2 != self.tokens:
            raise ValueError(f"tokens {self.tokens} are no square grid")

    @property
    def shift(self) -> float:
        """How far times are moved towards noise: 1 moves none."""
        return max(1.0, math.sqrt(self.tokens * self.token_width / _REFERENCE_ELEMENTS))


class GeneratorBlock(nn.Module):
    """A transformer block whose norms are scaled, shifted and gated by the condition; it begins as the identity."""

    def __init__(self, width: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, mlp_dim, gelu="tanh")
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, D) and the condition (B, D) -> (B, N, D)."""
        changes = self.modulation(nn.functional.silu(condition))[:, None].chunk(6, dim=-1)
        x = x + changes[2] * self.attn(self.norm1(x) * (1 + changes[0]) + changes[1])
        return x + changes[5] * self.mlp(self.norm2(x) * (1 + changes[3]) + changes[4])


class Generator(nn.Module):
    """Noisy tokens, a time and a condition to the velocity; and tokens from noise."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.enter = nn.Linear(config.token_width, config.width)
        self.time = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.condition = nn.Linear(config.condition_width, config.width)
        self.no_condition = nn.Parameter(torch.zeros(config.width))
        self.blocks = nn.ModuleList(
            GeneratorBlock(config.width, config.heads, config.mlp_dim) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.leave = nn.Linear(config.width, config.token_width)
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
            nn.init.zeros_(block.modulation.bias)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        side = math.isqrt(config.tokens)
        self.register_buffer("positions", sincos_position_table(side, side, config.width), persistent=False)
        self.register_buffer("mean", torch.zeros(config.tokens, config.token_width))
        self.register_buffer("deviation", torch.ones(config.tokens, config.token_width))

    def forward(self, noisy: Tensor, times: Tensor, condition: Tensor, keep: Tensor) -> Tensor:
        """Velocity (B, N, Dt) at normalised noisy tokens (B, N, Dt) and times (B,) from 0 (tokens) to 1 (noise).

        `condition` (B, E) are text embeddings, read where `keep`, bool (B,).
        """
        frequencies = torch.exp(-math.log(10_000) * torch.arange(_FREQUENCIES, device=times.device) / _FREQUENCIES)
        angles = 1000 * times[:, None] * frequencies
        about = torch.where(keep[:, None], self.condition(condition), self.no_condition)
        about = about + self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        x = self.enter(noisy) + self.positions
        for block in self.blocks:
            x = block(x, about)
        return self.leave(self.norm(x))

    def loss(self, tokens: Tensor, condition: Tensor, dropped: float, generator: torch.Generator) -> Tensor:
        """Mean squared error of the velocity, shape (), for tokens (B, N, Dt) and conditions (B, E).

        The condition is left out with probability `dropped`, which is what guidance needs. All random numbers come from
        `generator`, on the CPU.
        """
        clean, batch = (tokens - self.mean) / self.deviation, len(tokens)
        times = shifted(torch.randn(batch, generator=generator).sigmoid(), self.config.shift).to(tokens.device)
        noise = torch.randn(clean.shape, generator=generator).to(tokens.device)
        keep = (torch.rand(batch, generator=generator) >= dropped).to(tokens.device)
        along = times[:, None, None]
        velocity = self((1 - along) * clean + along * noise, times, condition, keep)
        return (velocity - (noise - clean)).square().mean()

    @torch.no_grad()
    def sample(self, condition: Tensor, steps: int, guidance: float, generator: torch.Generator) -> Tensor:
        """Tokens (B, N, Dt) for conditions (B, E) in `steps` Euler steps; `guidance` 1 is none."""
        batch, device = len(condition), condition.device
        x = torch.randn(batch, *self.mean.shape, generator=generator).to(device)
        times = shifted(torch.linspace(1, 0, steps + 1), self.config.shift).tolist()
        both = torch.tensor([True] * batch + [False] * batch, device=device)
        for now, after in pairwise(times):
            at = torch.full((2 * batch,), now, device=device)
            told, alone = self(x.repeat(2, 1, 1), at, condition.repeat(2, 1), both).chunk(2)
            x = x + (after - now) * (alone + guidance * (told - alone))
        return x * self.deviation + self.mean

    def fit(self, tokens: Tensor) -> None:
        """Take mean and deviation at every place and channel from tokens (n, N, Dt)."""
        self.mean.copy_(tokens.mean(dim=0))
        # A channel that never changes is no reason to divide by zero.
        self.deviation.copy_(tokens.std(dim=0).clamp(min=1e-3))


def shifted(times: Tensor, shift: float) -> Tensor:
    """Times from 0 to 1 moved towards noise: s t / (1 + (s - 1) t)."""
    return shift * times / (1 + (shift - 1) * times)
