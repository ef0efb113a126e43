"""The text tower: a bidirectional transformer that reads the class token in the last column (spec section 2).

Neither causal nor padding mask: pads attend and are attended to, as in the original's training; `pad_id` hides them.
The class token is an ordinary vocabulary row that the tokenizer puts last.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision.files import JsonObject
from openvision.models.bounds import MAX_LENGTH, MAX_VOCABULARY, MIN_CONTEXT, check_transformer, stored
from openvision.models.decoders.lengths import Lengths, groups_by_length
from openvision.models.kernels.dispatch import compute_dtype, linear_fp32
from openvision.models.layers import LAYER_NORM_EPS, Block, LayerNorm, init_text_block, is_skeleton, zero_biases
from openvision.untrusted import check_count


@dataclass(frozen=True)
class TextConfig:
    """Shape of a text tower; `context_length` counts every id, the class token included."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    width: int
    depth: int
    mlp_dim: int
    heads: int
    vocab_size: int = 32000
    context_length: int = 80
    pad_id: int | None = None
    """Id of padding, to which no position attends; None: padding is read like any token, as published."""
    pool: Literal["class", "mean"] = "class"
    """What is projected: the "class" token, as published, or the "mean" of all tokens that are neither class token nor
    padding, which needs `pad_id`."""
    encoder: Literal["openvision", "bert"] = "openvision"
    """"bert" is the encoder of BERT and RoBERTa, for weights of a sentence encoder (`warm_start.text`): norms behind
    branches and embeddings, the class token in front."""
    first: Literal["class", "bos"] = "class"
    """First id of a text of a "bert" tower: the class token, as in BERT, or [bos], which is "<s>" in RoBERTa's kind."""
    norm_eps: float = LAYER_NORM_EPS
    """Epsilon of the norms of a "bert" tower."""

    def __post_init__(self) -> None:
        check_transformer(self.width, self.depth, self.mlp_dim, self.heads)
        check_count("vocab_size", self.vocab_size, 1, MAX_VOCABULARY)
        if self.pad_id is not None and not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(f"pad_id {self.pad_id} is no id of a vocabulary of {self.vocab_size}")
        if self.pool == "mean" and self.pad_id is None:
            raise ValueError('pool "mean" leaves padding out: give pad_id, 0 in vocabularies of this project')
        check_count("context_length", self.context_length, MIN_CONTEXT, MAX_LENGTH)
        if self.encoder == "openvision" and (self.first, self.norm_eps) != ("class", LAYER_NORM_EPS):
            raise ValueError('first and norm_eps are of encoder "bert"; leave them out')
        if self.encoder == "bert" and self.pad_id is None:
            raise ValueError('encoder "bert" reads no padding: give pad_id, 0 in vocabularies of BERT')
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps must be between 0 and 1, not {self.norm_eps}")

    def to_dict(self) -> JsonObject:
        """Plain dictionary, as written to `config.json`: options that are off are left out, as older versions need."""
        return stored(self, ("pad_id", "pool", "encoder", "first", "norm_eps"))


@dataclass(frozen=True)
class TextFeatures:
    """What the text tower computes for B texts of L ids."""

    tokens: Tensor
    """(B', L - 1, D): all but the class token, before the norm, of the texts whose tokens are read: the caption decoder
    reads them. Of trimmed texts (B', T, D), T reaching as far as the longest of them; what is beyond a text is no
    number to rely on."""
    pooled: Tensor
    """(B, D): the normalised class token, or mean token, in the dtype of the parameters."""


class TextTransformer(nn.Module):
    """OpenVision's text encoder."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.token_embed = embedding(config.vocab_size, config.width)
        self.pos_embed = nn.Parameter(torch.empty(1, config.context_length, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_dim, gelu="tanh") for _ in range(config.depth)
        )
        self.norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, embed_dim, bias=False)
        if not is_skeleton(self):
            self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter as the original does."""
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        for block in self.blocks:
            init_text_block(block, self.config.width)  # pyright: ignore[reportArgumentType]
        self.norm.reset_parameters()
        nn.init.normal_(self.head.weight, std=self.config.width**-0.5)

    def forward_features(
        self, ids: Tensor, token_rows: int | None = None, lengths: Lengths | None = None
    ) -> TextFeatures:
        """Encode int64 ids (B, context_length), class token last.

        `token_rows` says of how many texts, the first ones, anybody reads the tokens; None is all. Of the others the
        last block computes the class token alone: every token is a key, one is a query. The numbers stay the same.

        Given `lengths`, the ids of each text before its padding, texts are computed in groups of similar length, and
        padding beyond a group's longest is left out. Nothing reads it, so that but for rounding the numbers stay the
        same here, too. Raises ValueError where padding is read.
        """
        if ids.shape[-1] != self.config.context_length:
            raise ValueError(f"texts have {ids.shape[-1]} ids, the tower reads exactly {self.config.context_length}")
        if lengths is None:
            return self.encode(ids, self.pos_embed, token_rows)
        if self.config.pad_id is None:
            raise ValueError("this tower reads padding, which cannot be trimmed: give model.text.pad_id")
        read = len(ids) if token_rows is None else token_rows
        parts = [
            self._encode_trimmed(ids[rows], lengths[rows], tokens_read)
            for rows, tokens_read in ((slice(read), True), (slice(read, None), False))
            if len(lengths[rows])
        ]
        return TextFeatures(tokens=parts[0].tokens, pooled=torch.cat([part.pooled for part in parts]))

    def _encode_trimmed(self, ids: Tensor, lengths: Lengths, tokens_read: bool) -> TextFeatures:
        """`forward_features` of texts whose tokens are all read, or none."""
        groups = groups_by_length(lengths, self.config.context_length - 1, ids.device)
        encoded = []
        for rows, reach in zip(groups.rows, groups.reaches, strict=True):
            kept = torch.cat([ids[rows][:, :reach], ids[rows][:, -1:]], dim=1)
            encoded.append(self.encode(kept, self.positions(reach), None if tokens_read else 0))
        longest = groups.reaches[-1]
        tokens = [F.pad(one.tokens, (0, 0, 0, longest - one.tokens.shape[1])) for one in encoded]
        pooled = torch.cat([one.pooled for one in encoded])[groups.back]
        return TextFeatures(torch.cat(tokens)[groups.back] if tokens_read else tokens[0], pooled)

    def positions(self, reach: int) -> Tensor:
        """Positions (1, reach + 1, D) of the first ids and of the class token, which keeps its place behind all."""
        return torch.cat([self.pos_embed[:, :reach], self.pos_embed[:, -1:]], dim=1)

    def encode(self, ids: Tensor, positions: Tensor, token_rows: int | None) -> TextFeatures:
        """Encode ids (B, L), class token last, at `positions` (1, L, D)."""
        mask = self.mask(ids)
        # Empty where nothing is masked, so that blocks are called as they always were.
        seen = () if mask is None else (mask,)
        x = self.token_embed(ids) + positions
        x = x.to(compute_dtype(x))
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, *seen)
        if self.config.pool == "mean":
            x = last(x, *seen)
            return TextFeatures(tokens=x[:token_rows, :-1], pooled=self.pooled(x, mask))
        read = len(x) if token_rows is None else token_rows
        whole, rest = x[:read], x[read:]
        parts = []
        if len(whole):
            whole = last(whole, *(keys[:read] for keys in seen))
            parts.append(whole[:, -1:])
        if len(rest):
            rows = self._class_token(rest)
            parts.append(last.forward_rows(rest, rows, *(keys[read:] for keys in seen)))  # pyright: ignore[reportCallIssue]
        class_token = torch.cat(parts)[:, 0]
        return TextFeatures(tokens=whole[:, :-1], pooled=self.norm(class_token.to(self.norm.weight.dtype)))

    def mask(self, ids: Tensor) -> Tensor | None:
        """What of ids (B, L) is no padding, bool (B, L); None where padding is read like any token."""
        return None if self.config.pad_id is None else ids != self.config.pad_id

    def pooled(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Output of the last block (B, L, D) and `mask` of its ids -> the normalised class or mean token (B, D)."""
        if mask is None or self.config.pool == "class":
            return self.norm(x[:, -1].to(self.norm.weight.dtype))
        # Every text has [bos] and [eos], so that no mean is one of nothing.
        kept = mask[:, :-1, None].to(self.norm.weight.dtype)
        return self.norm((x[:, :-1].to(kept.dtype) * kept).sum(dim=1) / kept.sum(dim=1))

    def _class_token(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 1), x.shape[1] - 1, device=x.device)

    def project(self, pooled: Tensor) -> Tensor:
        """(B, D) pooled -> (B, E) embedding, float32, not normalised."""
        return linear_fp32(pooled, self.head.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, E) embedding, float32, not normalised."""
        return self.project(self.forward_features(ids, token_rows=0).pooled)


class PostNormBlock(Block):
    """BERT's block: x = norm1(x + attn(x)); x = norm2(x + mlp(x))."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config.width, config.heads, config.mlp_dim, gelu="none")
        self.norm1.eps = self.norm2.eps = config.norm_eps

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); `seen`, bool (B, L), are the positions that may be attended to."""
        x = self.norm1(x + (self.attn(x) if seen is None else self.attn(x, seen)))
        return self.norm2(x + self.mlp(x))

    def forward_rows(self, x: Tensor, rows: Tensor, seen: Tensor | None = None) -> Tensor:
        """`forward(x, seen)` at positions `rows`, int64 (B, K) -> (B, K, D)."""
        return self.forward(x, seen).gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


class SentenceTower(TextTransformer):
    """BERT's encoder, and a projection of ours, behind the layout of ids that all text towers read.

    A text is [CLS] or <s>, its tokens, its end; the other of [bos] and class token is left out. The positions hold the
    embedding of token type 0 as well.
    """

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        # Its parts are others than those of TextTransformer; what they are called is the same.
        nn.Module.__init__(self)
        self.config = config
        self.token_embed = embedding(config.vocab_size, config.width)
        self.pos_embed = nn.Parameter(torch.empty(1, config.context_length - 1, config.width))
        self.embed_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.blocks = nn.ModuleList(PostNormBlock(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, embed_dim, bias=False)
        if not is_skeleton(self):
            self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter as BERT does, the projection as OpenVision does."""
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)
        self.embed_norm.reset_parameters()
        for block in self.blocks:
            assert isinstance(block, PostNormBlock)
            for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                nn.init.normal_(linear.weight, std=0.02)
            zero_biases(block)
        nn.init.normal_(self.head.weight, std=self.config.width**-0.5)

    def positions(self, reach: int) -> Tensor:
        """Positions (1, reach, D) of the first ids."""
        return self.pos_embed[:, :reach]

    def encode(self, ids: Tensor, positions: Tensor, token_rows: int | None) -> TextFeatures:
        """Encode ids (B, L), [bos] first and class token last, at `positions` (1, L - 1, D)."""
        mask = ids[:, :-1] != self.config.pad_id
        if self.config.first == "class":
            ids = torch.cat([ids[:, -1:], ids[:, 1:]], dim=1)
        x = self.embed_norm(self.token_embed(ids[:, :-1]) + positions)
        x = x.to(compute_dtype(x))
        for block in self.blocks:
            x = block(x, mask)
        return TextFeatures(tokens=x[:token_rows], pooled=self.pooled(x, mask))

    def pooled(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens (B, L, D) and which of them are no padding -> the first token or the mean (B, D)."""
        x = x.to(self.embed_norm.weight.dtype)
        if self.config.pool == "class" or mask is None:
            return x[:, 0]
        kept = mask[..., None].to(x.dtype)
        return (x * kept).sum(dim=1) / kept.sum(dim=1)


def build_text(config: TextConfig, embed_dim: int) -> TextTransformer:
    """The text tower of a configuration."""
    return SentenceTower(config, embed_dim) if config.encoder == "bert" else TextTransformer(config, embed_dim)


def embedding(entries: int, width: int) -> nn.Embedding:
    """An embedding that draws no random numbers on the meta device (see `is_skeleton`)."""
    if torch.get_default_device().type == "meta":
        return nn.Embedding.from_pretrained(torch.empty(entries, width), freeze=False)
    return nn.Embedding(entries, width)
