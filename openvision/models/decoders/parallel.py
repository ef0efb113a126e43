"""The caption decoder of OpenVision v1: all positions of the caption predicted in parallel (spec section 3).

OpenVision 2's, which predicts token after token, is in autoregressive.py.

- Learned queries stand for the caption's positions; ground-truth tokens are never fed in.
- The prefix (image tokens, then tokens of the alt-text) attends to itself in full and never sees the queries;
  the queries see the whole prefix and, causally, each other.
- The (prefix + queries) square is never formed: two attention calls a block, and the last block computes the
  queries only, since nothing reads its prefix.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision.files import JsonObject
from openvision.models.bounds import MAX_LENGTH, MAX_VOCABULARY, MIN_CAPTION, check_transformer, stored
from openvision.models.decoders.lengths import Lengths, states_by_length
from openvision.models.kernels.dispatch import attention, compute_dtype, linear_fp32
from openvision.models.layers import Block, LayerNorm, init_text_block, is_skeleton
from openvision.untrusted import check_count


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a caption decoder; `caption_length` is the number of queries, one a predicted position."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    width: int
    depth: int
    mlp_dim: int
    heads: int
    vocab_size: int = 32000
    caption_length: int = 128
    reads_padding: bool = True
    """Whether padding of the alt-text is read like any token, as published; false needs `model.text.pad_id`."""

    def __post_init__(self) -> None:
        check_transformer(self.width, self.depth, self.mlp_dim, self.heads)
        check_count("vocab_size", self.vocab_size, 1, MAX_VOCABULARY)
        check_count("caption_length", self.caption_length, MIN_CAPTION, MAX_LENGTH)

    def to_dict(self) -> JsonObject:
        """Plain dictionary, as written to `config.json`: an option that is off is left out."""
        return stored(self, ("reads_padding",))


Heads = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Queries, keys and values (B, h, L, d), and the gate of what attention returns (B, L, D), where there is one."""


class DecoderBlock(Block):
    """A pre-norm block over a prefix and queries kept as two tensors."""

    def __init__(self, width: int, heads: int, mlp_dim: int) -> None:
        super().__init__(width, heads, mlp_dim, gelu="tanh")

    def forward_prefix(
        self,
        prefix: Tensor,
        queries: Tensor,
        causal_prefix: bool = False,
        prefix_places: Tensor | None = None,
        places: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, P, D) and (B, Q, D) -> the same shapes; queries see the prefix and the queries up to themselves.

        The prefix sees all of itself or, if `causal_prefix`, what comes before; of it nobody sees more than what is
        `seen`, bool (B, P). Blocks with rotary positions are given those of the prefix, (2, P, d), and of the queries,
        (2, Q, d).
        """
        qp, kp, vp, gate_p = self._heads(prefix, prefix_places)
        qq, kq, vq, gate_q = self._heads(queries, places)
        seen_by_prefix = attention(qp, kp, vp, causal_prefix, seen)
        prefix = self._finish(prefix, seen_by_prefix, gate_p)
        return prefix, self._finish(queries, _attend_queries(qq, kp, vp, kq, vq, seen), gate_q)

    def forward_queries(
        self,
        prefix: Tensor,
        queries: Tensor,
        prefix_places: Tensor | None = None,
        places: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """The queries' half of `forward_prefix`, without computing what becomes of the prefix."""
        kp, vp = self._keys(prefix, prefix_places)
        qq, kq, vq, gate = self._heads(queries, places)
        return self._finish(queries, _attend_queries(qq, kp, vp, kq, vq, seen), gate)

    def _heads(self, x: Tensor, places: Tensor | None) -> Heads:
        """Queries, keys and values of tokens (B, L, D) and, in blocks that have it, the gate of their attention."""
        q, k, v = self.attn.split_heads(self.attn.qkv(self.norm1(x)), 3)
        return q, k, v, None

    def _keys(self, x: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens (B, L, D), without their queries."""
        width = x.shape[-1]
        weight, bias = self.attn.qkv.weight[width:], self.attn.qkv.bias[width:]
        keys, values = self.attn.split_heads(F.linear(self.norm1(x), weight, bias), 2)
        return keys, values

    def _finish(self, x: Tensor, attended: Tensor, gate: Tensor | None) -> Tensor:
        x = x + self.attn.project(attended)
        return x + self.feed_forward(x)


def _attend_queries(qq: Tensor, kp: Tensor, vp: Tensor, kq: Tensor, vq: Tensor, seen: Tensor | None) -> Tensor:
    keys, values = torch.cat([kp, kq], dim=2), torch.cat([vp, vq], dim=2)
    return attention(qq, keys, values, True, None if seen is None else F.pad(seen, (0, kq.shape[2]), value=True))


class ParallelCaptionDecoder(nn.Module):
    """Predicts the whole synthetic caption from image tokens and the tokens of the alt-text."""

    def __init__(self, config: DecoderConfig, image_width: int, text_width: int) -> None:
        super().__init__()
        self.config = config
        self.image_proj = nn.Linear(image_width, config.width, bias=False)
        self.text_proj = nn.Linear(text_width, config.width, bias=False)
        self.queries = nn.Parameter(torch.empty(config.caption_length, config.width))
        self.blocks = nn.ModuleList(
            DecoderBlock(config.width, config.heads, config.mlp_dim) for _ in range(config.depth)
        )
        self.norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if not is_skeleton(self):
            self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter as the original does."""
        for projection in (self.image_proj, self.text_proj):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        nn.init.normal_(self.queries, std=1.0)
        for block in self.blocks:
            init_text_block(block, self.config.width)  # pyright: ignore[reportArgumentType]
        self.norm.reset_parameters()
        nn.init.normal_(self.head.weight, std=self.config.width**-0.5)

    def forward(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        lengths: Lengths | None = None,
        text_seen: Tensor | None = None,
    ) -> Tensor:
        """Image tokens (B, N, Dv) and text tokens (B, T, Dt) -> normalised states (B, Q, D), in the dtype
        of the parameters.

        State i predicts token i + 1 of the caption through `logits`. With `lengths` only that many states of each
        caption are promised (see lengths.py); the others may be zeros. `text_seen`, bool (B, T), are the text tokens
        that may be attended to; None is all.
        """

        def states_of(rows: Tensor | slice, reach: int) -> Tensor:
            seen = None if text_seen is None else F.pad(text_seen[rows], (image_tokens.shape[1], 0), value=True)
            return self._states(image_tokens[rows], text_tokens[rows], reach, seen)

        return states_by_length(lengths, len(self.queries), states_of, image_tokens.device)

    def _states(self, image_tokens: Tensor, text_tokens: Tensor, reach: int, seen: Tensor | None) -> Tensor:
        """The first `reach` states; `seen`, bool (B, N + T), is what of the prefix may be attended to."""
        prefix = torch.cat(
            [
                linear_fp32(image_tokens, self.image_proj.weight),
                linear_fp32(text_tokens, self.text_proj.weight),
            ],
            dim=1,
        )
        queries = self.queries[:reach].expand(len(prefix), -1, -1)
        dtype = compute_dtype(self.queries)
        prefix, queries = prefix.to(dtype), queries.to(dtype)
        *blocks, last = self.blocks
        for block in blocks:
            prefix, queries = block.forward_prefix(prefix, queries, False, None, None, seen)  # pyright: ignore[reportCallIssue]
        queries = last.forward_queries(prefix, queries, None, None, seen)  # pyright: ignore[reportCallIssue]
        return self.norm(queries.to(self.norm.weight.dtype))

    def logits(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., vocab_size), float32."""
        return linear_fp32(states, self.head.weight)
