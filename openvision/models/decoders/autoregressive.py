"""The caption decoder of OpenVision 2: next-token prediction with teacher forcing (spec section 9).

What the paper says is followed, and the released code, which does not run and contradicts itself, only where the paper
is silent:

- The caption's own tokens are fed in; state i predicts token i + 1. There is no text tower and no alt-text.
- Image tokens, projected without bias, stand in front of the text: concatenation, no cross-attention.
- Image tokens never see the text, whatever `image_attention`: "prefix" (default) lets them see each other in full, as
  in the decoder of v1. "causal" is what the released code does by a default argument that nobody passes: each sees the
  image tokens before it only. The paper does not say; the tokens kept in training are a random set, and a set has no
  order for a causal mask to follow.
- `text_positions` is "none" by default, as in the released code: under a causal mask a transformer tells positions
  apart without being told. "sincos" (fixed) and "learned" are there to be compared.
- Two attention calls a block, as in v1: the (image + text) square is never formed, and the last block computes the
  text only. Generation keeps keys and values: a token costs one pass of one token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from openvision.models.bounds import MAX_LENGTH, MAX_VOCABULARY, MIN_CAPTION, check_transformer
from openvision.models.decoders.parallel import DecoderBlock
from openvision.models.kernels.dispatch import attention, compute_dtype, linear_fp32
from openvision.models.layers import LayerNorm, init_text_block, is_skeleton
from openvision.models.text import embedding
from openvision.runtime import HostCopy
from openvision.untrusted import check_count

ImageAttention = Literal["prefix", "causal"]
TextPositions = Literal["none", "sincos", "learned"]
# Tokens that an accelerator may be ahead of the host, which learns whether all captions have ended.
GENERATION_LAG = 2


@dataclass(frozen=True)
class AutoregressiveDecoderConfig:
    """Shape of an autoregressive caption decoder; `caption_length` is the most ids it reads of a caption.

    The original counts 128 with the class token at the end, which is cut off before the decoder: 127 are read.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    width: int
    depth: int
    mlp_dim: int
    heads: int
    vocab_size: int = 32000
    caption_length: int = 127
    image_attention: ImageAttention = "prefix"
    """"prefix": image tokens see each other in full; "causal": only those before them."""
    text_positions: TextPositions = "none"
    """Positions of the caption's tokens; with "none" causal attention alone tells them apart."""

    def __post_init__(self) -> None:
        check_transformer(self.width, self.depth, self.mlp_dim, self.heads)
        check_count("vocab_size", self.vocab_size, 1, MAX_VOCABULARY)
        check_count("caption_length", self.caption_length, MIN_CAPTION, MAX_LENGTH)
        for name, value, known in (
            ("image_attention", self.image_attention, get_args(ImageAttention)),
            ("text_positions", self.text_positions, get_args(TextPositions)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r:.80}")


def teacher_forcing_ids(labels: Tensor, bos_id: int) -> Tensor:
    """The ids a decoder reads while it is taught `labels`: [bos], then every label but the last.

    `labels` int64 (B, T) hold token i + 1 of the caption at i, as `Tokenizer.encode_target` lays them out -> (B, T).
    """
    return torch.cat([labels.new_full((len(labels), 1), bos_id), labels[:, :-1]], dim=1)


def text_sincos(length: int, width: int) -> Tensor:
    """Fixed 1-D sin-cos positions, float32 (length, width), frequencies from 1 to 1/10000 with both ends included."""
    if width % 2 or width < 4:
        raise ValueError(f"sin-cos positions of text need an even width of at least 4, not {width}")
    half = width // 2
    omega = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - 1))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


@dataclass
class LayerCache:
    """Keys and values of one block, (B, heads, capacity, head_dim), of which the first `length` are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, heads, L, head_dim) more; returns everything stored so far."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = keys, values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def empty_caches(x: Tensor, heads: int, depth: int, room: int) -> list[LayerCache]:
    """Caches of `depth` blocks for tokens like `x` (B, L, D), with room for so many more."""
    batch, length, width = x.shape
    shape = (batch, heads, length + room, width // heads)
    return [LayerCache(x.new_empty(shape), x.new_empty(shape)) for _ in range(depth)]


def write_tokens(
    logits_of: Callable[[Tensor, int], Tensor],
    first: Tensor,
    eos_id: int,
    length: int,
    sampler: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Captions token by token -> ids int64 (B, L), without the `first` ones, (B, 1); L at most `length`.

    `logits_of(ids, position)` reads the ids (B, 1) at a position and gives the logits (B, 1, V) of the next. The token
    with the largest logit is next; a `sampler` changes the logits (B, V) before. Ends when every caption has its [eos];
    what stands after an [eos] is [eos].
    """
    ids = first
    finished = torch.zeros_like(ids, dtype=torch.bool)
    generated: list[Tensor] = []
    ended: list[HostCopy] = []
    # An accelerator is not waited for: what it computes past the end before the host knows of it is cut off.
    lag = 0 if first.device.type == "cpu" else GENERATION_LAG
    for position in range(length):
        logits = logits_of(ids, position)
        if sampler is not None:
            logits = sampler(logits[:, -1])[:, None]
        ids = logits.argmax(dim=-1)
        ids = ids.masked_fill(finished, eos_id)
        generated.append(ids)
        finished |= ids == eos_id
        ended.append(HostCopy(finished.all()))
        if position >= lag and ended[position - lag].values()[0]:
            break
    last = next((place for place, end in enumerate(ended) if end.values()[0]), length)
    return torch.cat(generated[: last + 1], dim=1)


class AutoregressiveBlock(DecoderBlock):
    """A block over image tokens and text kept as two tensors, or over whatever comes next of a cached sequence."""

    def extend(self, x: Tensor, cache: LayerCache, causal: bool = False, places: Tensor | None = None) -> Tensor:
        """The next L tokens (B, L, D) of a sequence -> (B, L, D); if `causal` none sees those behind itself."""
        q, k, v, gate = self._heads(x, places)
        keys, values = cache.append(k, v)
        return self._finish(x, attention(q, keys, values, causal), gate)


class AutoregressiveCaptionDecoder(nn.Module):
    """Predicts each token of a caption from image tokens and the tokens before it."""

    def __init__(self, config: AutoregressiveDecoderConfig, image_width: int) -> None:
        super().__init__()
        self.config = config
        self.token_embed = embedding(config.vocab_size, config.width)
        self.image_proj = nn.Linear(image_width, config.width, bias=False)
        learned = config.text_positions == "learned"
        self.pos_embed = nn.Parameter(torch.empty(1, config.caption_length, config.width)) if learned else None
        self.blocks = nn.ModuleList(
            AutoregressiveBlock(config.width, config.heads, config.mlp_dim) for _ in range(config.depth)
        )
        self.norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self._sincos: dict[torch.device, Tensor] = {}
        if not is_skeleton(self):
            self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter as the original does; learned positions as in the text tower."""
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.image_proj.weight, std=self.image_proj.in_features**-0.5)
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=0.01)
        for block in self._blocks():
            init_text_block(block, self.config.width)
        self.norm.reset_parameters()
        nn.init.normal_(self.head.weight, std=self.config.width**-0.5)

    def forward(self, image_tokens: Tensor, input_ids: Tensor) -> Tensor:
        """Image tokens (B, K, Dv) and caption ids int64 (B, T), [bos] first -> normalised states (B, T, D).

        State i has seen ids 0 to i and predicts id i + 1 through `logits`. The states have the parameters' dtype.
        Raises ValueError for more ids than `caption_length`.
        """
        images, text = self.embed_images(image_tokens), self.embed_text(input_ids)
        *blocks, last = self._blocks()
        for block in blocks:
            images, text = block.forward_prefix(images, text, self._causal_images)
        return self._normalised(last.forward_queries(images, text))

    def embed_images(self, image_tokens: Tensor) -> Tensor:
        """(B, K, Dv) -> (B, K, D) in the compute dtype; projected in float32."""
        return linear_fp32(image_tokens, self.image_proj.weight).to(compute_dtype(self.image_proj.weight))

    def embed_text(self, ids: Tensor, start: int = 0) -> Tensor:
        """Ids (B, T) at positions `start` and on -> (B, T, D) in the compute dtype."""
        end = start + ids.shape[1]
        if end > self.config.caption_length:
            raise ValueError(f"captions have {end} ids, the decoder reads at most {self.config.caption_length}")
        x = self.token_embed(ids)
        positions = self._positions(x.device)
        if positions is not None:
            x = x + positions[start:end]
        return x.to(compute_dtype(x))

    def logits(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., vocab_size), float32."""
        return linear_fp32(states, self.head.weight)

    def prefill(self, image_tokens: Tensor, room: int) -> list[LayerCache]:
        """Read image tokens (B, K, Dv); the caches of all blocks, with room for that many ids of text."""
        x = self.embed_images(image_tokens)
        caches = empty_caches(x, self.config.heads, self.config.depth, room)
        self._extend(x, caches, self._causal_images)
        return caches

    def step(self, ids: Tensor, position: int, caches: list[LayerCache]) -> Tensor:
        """The id at `position` of each caption, (B, 1), after everything cached -> states (B, 1, D)."""
        return self._normalised(self._extend(self.embed_text(ids, position), caches))

    @torch.no_grad()
    def generate(
        self,
        image_tokens: Tensor,
        bos_id: int,
        eos_id: int,
        max_length: int | None = None,
        sampler: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Captions of image tokens (B, K, Dv) -> ids int64 (B, L), without [bos]; L at most `max_length`.

        `max_length` is `caption_length` by default and at most; see `write_tokens`.
        """
        length = min(max_length or self.config.caption_length, self.config.caption_length)
        caches = self.prefill(image_tokens, length)
        first = torch.full((len(image_tokens), 1), bos_id, device=image_tokens.device)
        return write_tokens(
            lambda ids, position: self.logits(self.step(ids, position, caches)), first, eos_id, length, sampler
        )

    def _extend(self, x: Tensor, caches: list[LayerCache], causal: bool = False) -> Tensor:
        for block, cache in zip(self._blocks(), caches, strict=True):
            x = block.extend(x, cache, causal)
        return x

    @property
    def _causal_images(self) -> bool:
        return self.config.image_attention == "causal"

    def _positions(self, device: torch.device) -> Tensor | None:
        if self.config.text_positions == "none":
            return None
        if self.pos_embed is not None:
            return self.pos_embed[0]
        if device not in self._sincos:
            self._sincos[device] = text_sincos(self.config.caption_length, self.config.width).to(device)
        return self._sincos[device]

    def _normalised(self, x: Tensor) -> Tensor:
        return self.norm(x.to(self.norm.weight.dtype))

    def _blocks(self) -> Iterator[AutoregressiveBlock]:
        return iter(self.blocks)  # pyright: ignore[reportReturnType]
