"""Sampling of the next token in a batch, such that a caption depends on its own seed and not on its neighbours.

Adding Gumbel noise to log-probabilities and taking the largest is drawing from them: so a sampler is a function of
logits, and greedy decoding, here or in transformers, does the rest.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Sampler:
    """Logits (B, V) -> logits (B, V) whose largest entry is a draw from the `top_k` likeliest tokens of each row."""

    def __init__(self, seeds: Sequence[int], temperatures: Sequence[float], top_k: int = 0) -> None:
        """One seed and one temperature a row; a row of temperature 0 stays greedy, `top_k` 0 is all tokens."""
        # Drawn on the CPU: the same seed gives the same caption on every device, up to rounding of the logits.
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperatures = torch.tensor(temperatures)
        self._top_k = top_k

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (B, V) -> float32 (B, V), whose largest is the sampled token."""
        kept = min(self._top_k or logits.shape[-1], logits.shape[-1])
        # In order of likelihood: the noise of a row is the same wherever rounding moves a token of the tail.
        values, tokens = logits.float().topk(kept, dim=-1)
        noise = torch.stack([torch.empty(kept).exponential_(generator=one) for one in self._generators]).log()
        temperatures = self._temperatures.to(logits.device)[:, None]
        values = values - temperatures * noise.to(logits.device)
        return torch.full_like(logits, -torch.inf, dtype=torch.float32).scatter(-1, tokens, values)
