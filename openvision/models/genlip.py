"""GenLIP: image patches and caption in one decoder-only transformer, trained by the caption's loss alone.

arXiv 2605.00809 and its code (github.com/YanFangCS/GenLIP, Apache-2.0). The tokens of an image and of its caption are
one sequence, [v1 .. vN, [bos], t1 .. tT]:

- Patches see each other in full and never the text; text sees every patch and, causally, itself.
- Positions are rotary, on three axes: a patch is at (0, row, column), token j of the text at s + j on all axes, where s
  is the larger side of the grid. The frequencies of a head go to time, row and column in turn.
- What attention returns is multiplied by a sigmoid of the block's input, the paper's remedy against attention sinks.
- SwiGLU, a learned scale on both branches of a block, biases everywhere but on the vocabulary, no class token.

The encoder is the same transformer on an image alone: `GenLipTower` is a vision tower like the others, and
`LanguageEnds` what captions need beside it. The patches' half of the last block is never computed in training, since
nothing reads it: `GenLipVisionConfig.readout` says which tokens are the features. What the sources leave open or
contradict, and what is ours, is in docs/beyond.md.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openvision.files import JsonObject
from openvision.models.bounds import MAX_LENGTH, MAX_VOCABULARY, MAX_WIDTH, MIN_CAPTION
from openvision.models.decoders.autoregressive import AutoregressiveBlock, LayerCache, empty_caches, write_tokens
from openvision.models.decoders.lengths import Lengths, states_by_length
from openvision.models.decoders.parallel import Heads
from openvision.models.kernels.dispatch import (
    Gelu,
    Linear,
    attention,
    compute_dtype,
    linear_fp32,
    merge_heads,
    training_on_cpu,
)
from openvision.models.layers import LayerNorm, Mlp, is_skeleton
from openvision.models.text import embedding
from openvision.models.vision import MaskedPatches, PatchEmbed, VisionConfig, VisionTransformer
from openvision.untrusted import check_count

KIND_GENLIP = "genlip"
AXES = 3
"""Time, row, column."""


@dataclass(frozen=True)
class GenLipVisionConfig(VisionConfig):
    """Shape of the transformer; `mlp_dim` is the hidden width of its SwiGLU."""

    gated: bool = True
    """Whether attention is gated, as in the paper; False is its ablation."""
    layer_scale: float = 0.1
    """Initial value of the learned scale on both branches of a block."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    readout: Literal["last", "before_last"] = "last"
    """Which hidden states of the patches are its features: what leaves the last block, or what enters it. In training
    the patches are keys and values of the last block, so no loss reaches what leaves it."""

    @property
    def prefix_tokens(self) -> int:
        """None: there is no class token."""
        return 0

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = VisionConfig(
            self.width, self.depth, self.mlp_dim, self.heads, self.patch_size, self.image_size, aspects=self.aspects
        )
        if any(getattr(self, name) != value for name, value in vars(plain).items()):
            raise ValueError("position_side, init, registers and pool belong to sin-cos positions; leave them out")
        if self.width // self.heads % 2:
            raise ValueError(f"heads {self.heads} make heads of {self.width // self.heads}; rotary ones must be even")
        if not 0 < self.layer_scale <= 10:
            raise ValueError(f"layer_scale must be above 0 and at most 10, not {self.layer_scale}")
        if not 1 < self.rope_theta <= 1e9:
            raise ValueError(f"rope_theta must be above 1 and at most 1e9, not {self.rope_theta}")
        if self.readout not in ("last", "before_last"):
            raise ValueError(f"readout must be last or before_last, not {self.readout!r:.80}")


@dataclass(frozen=True)
class GenLipTextConfig:
    """The ends of a caption: its token embedding and its vocabulary; `caption_length` is the most ids that are read."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    width: int
    """Of the embedding and of the vocabulary's matrix; projected to the transformer's width where they differ."""
    vocab_size: int = 32000
    caption_length: int = 127

    def __post_init__(self) -> None:
        check_count("width", self.width, 1, MAX_WIDTH)
        check_count("vocab_size", self.vocab_size, 1, MAX_VOCABULARY)
        check_count("caption_length", self.caption_length, MIN_CAPTION, MAX_LENGTH)


@dataclass(frozen=True)
class GenLipConfig:
    """Shape of a whole model."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    text: ClassVar[None] = None
    """No text tower."""
    embed_dim: ClassVar[None] = None
    """No projection head, since there is no text to compare with."""
    keep_ratio: ClassVar[None] = None
    """Every patch is read."""

    vision: GenLipVisionConfig
    decoder: GenLipTextConfig
    kind: Literal["genlip"] = KIND_GENLIP
    """Distinguishes this model from the others in recipes and in `config.json`."""

    def patches_read(self, patches: int) -> int:
        """How many of `patches` tokens the caption reads in training: all."""
        return patches

    def to_dict(self) -> JsonObject:
        """Plain nested dictionary, as written to `config.json`."""
        return asdict(self) | {"vision": self.vision.to_dict()}

    @staticmethod
    def from_dict(data: JsonObject) -> "GenLipConfig":
        """Inverse of `to_dict`; raises TypeError, KeyError or ValueError on what does not fit."""
        rest = {key: value for key, value in data.items() if key not in ("vision", "decoder")}
        return GenLipConfig(
            vision=GenLipVisionConfig(**data["vision"]), decoder=GenLipTextConfig(**data["decoder"]), **rest
        )


def rotary_table(positions: Tensor, head_width: int, theta: float) -> Tensor:
    """Cosines and sines, float32 (2, L, head_width), of positions (3, L): time, row, column of L tokens."""
    half = head_width // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) * 2 / head_width)
    angle = positions.double()[torch.arange(half) % AXES].T * frequency
    return torch.stack([angle.cos(), angle.sin()]).repeat(1, 1, 2).float()


def rotate(x: Tensor, places: Tensor) -> Tensor:
    """Queries or keys (B, h, L, d), turned by the angles of `places` (2, L, d); the halves of d are pairs."""
    cos, sin = places.to(x.dtype).unbind()
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class SwiGlu(Mlp):
    """fc2(silu(gate(x)) * fc1(x)), all with biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden, "none")
        self.gate = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.fc2(F.silu(self.gate(x)) * self.fc1(x))


class GenLipBlock(AutoregressiveBlock):
    """A block over patches and text kept as two tensors: rotary positions, gated attention, SwiGLU, scaled branches."""

    mlp: SwiGlu

    def __init__(self, config: GenLipVisionConfig) -> None:
        super().__init__(config.width, config.heads, config.mlp_dim)
        self.gate = Linear(config.width, config.width) if config.gated else None
        self.scale1 = nn.Parameter(torch.empty(config.width))
        self.scale2 = nn.Parameter(torch.empty(config.width))

    def init_weights(self, layer_scale: float) -> None:
        """Initialise as the code of the paper does, where query and gate are one matrix."""
        width = self.norm1.weight.shape[0]
        gated = self.gate is not None
        for rows, out in zip(
            self.attn.qkv.weight.split(width), ((2 if gated else 1) * width, width, width), strict=True
        ):
            _xavier(rows, width + out)
        if self.gate is not None:
            _xavier(self.gate.weight, 3 * width)
        _xavier(self.attn.proj.weight, 2 * width)
        for linear in (self.mlp.fc1, self.mlp.fc2, self.mlp.gate):
            nn.init.normal_(linear.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.constant_(self.scale1, layer_scale)
        nn.init.constant_(self.scale2, layer_scale)

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """Patches (B, N, D) at `places` (2, N, d) -> (B, N, D)."""
        q, k, v, gate = self._heads(x, places)
        return self._finish(x, attention(q, k, v), gate)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The MLP branch; where a block recomputes it, in its backward pass as a whole."""

        def branch(x: Tensor) -> Tensor:
            return self.mlp(self.norm2(x))

        if not self.recompute_mlp or not training_on_cpu(x):
            return branch(x)
        recomputed = checkpoint(branch, x, use_reentrant=False)
        assert isinstance(recomputed, Tensor)
        return recomputed

    def _make_mlp(self, width: int, mlp_dim: int, gelu: Gelu) -> Mlp:
        return SwiGlu(width, mlp_dim)

    def _heads(self, x: Tensor, places: Tensor | None) -> Heads:
        x = self.norm1(x)
        q, k, v = self.attn.split_heads(self.attn.qkv(x), 3)
        gate = None if self.gate is None else self.gate(x).sigmoid()
        return (q, k, v, gate) if places is None else (rotate(q, places), rotate(k, places), v, gate)

    def _keys(self, x: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        keys, values = super()._keys(x, places)
        return keys if places is None else rotate(keys, places), values

    def _finish(self, x: Tensor, attended: Tensor, gate: Tensor | None) -> Tensor:
        attended = merge_heads(attended)
        branch = self.attn.proj(attended if gate is None else attended * gate)
        x = x + self._scaled(branch * self.scale1.to(branch.dtype), 0)
        branch = self.feed_forward(x)
        return x + self._scaled(branch * self.scale2.to(branch.dtype), 1)


class GenLipTower(VisionTransformer):
    """The transformer on an image alone: a vision tower without class token and head, positions in its attention."""

    config: GenLipVisionConfig

    def __init__(self, config: GenLipVisionConfig) -> None:
        # Its parts are others than those of VisionTransformer; what they are called is the same.
        nn.Module.__init__(self)
        self.config = config
        self.patch_embed = PatchEmbed(config.kernel, config.width, config.input_channels, bias=True)
        self.blocks = nn.ModuleList(GenLipBlock(config) for _ in range(config.depth))
        self.fc_norm = LayerNorm(config.width)
        self.attn_pool = self.head = None
        self._positions: dict[tuple[int, int, torch.device], Tensor] = {}
        if not is_skeleton(self):
            self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter as the code of the paper does."""
        nn.init.normal_(self.patch_embed.proj.weight, std=0.02)
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)
        for block in self.own_blocks():
            block.init_weights(self.config.layer_scale)
        self.fc_norm.reset_parameters()

    def embed(self, images: Tensor, masked: MaskedPatches | None = None) -> Tensor:
        """Images (B, 3, H, W) -> (B, N, D) in the compute dtype; positions come with attention."""
        if masked is not None:
            raise ValueError("GenLIP sees every patch; leave masked out")
        inputs = self.inputs(images)
        self._patch_grid(inputs)
        return self.patch_embed(inputs).to(compute_dtype(self.fc_norm.weight))

    def block_inputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines (2, N, d) of the patches' positions."""
        rows, columns = self.grid_of(images)
        return (self.position_table(rows, columns, images.device),)

    @property
    def readout(self) -> int:
        """The layer whose patches are the features, as the configuration says."""
        return len(self.blocks) - (self.config.readout == "before_last")

    def patch_tokens(self, images: Tensor, keep: Tensor | None = None, masked: MaskedPatches | None = None) -> Tensor:
        """Images (B, 3, H, W) -> un-normalised patch tokens (B, N, D) of the layer `readout`.

        Raises ValueError for a choice of patches: every one is read.
        """
        if keep is not None or masked is not None:
            raise ValueError("GenLIP reads every patch; leave keep and masked out")
        return self.forward_features(images).patch_tokens

    def own_blocks(self) -> Iterator[GenLipBlock]:
        """The blocks, by their type."""
        return iter(self.blocks)  # pyright: ignore[reportReturnType]

    def _make_positions(self, rows: int, columns: int) -> Tensor:
        row, column = (torch.arange(side) for side in (rows, columns))
        grid = torch.meshgrid(row, column, indexing="ij")
        places = torch.stack([torch.zeros_like(grid[0]), *grid]).flatten(1)
        return rotary_table(places, self.config.width // self.config.heads, self.config.rope_theta)


class LanguageEnds(nn.Module):
    """What a caption needs beside the transformer: its token embedding and its vocabulary."""

    def __init__(self, config: GenLipTextConfig, vision: GenLipVisionConfig) -> None:
        super().__init__()
        self.config = config
        projected = config.width != vision.width
        self.token_embed = embedding(config.vocab_size, config.width)
        self.in_proj = nn.Linear(config.width, vision.width) if projected else None
        self.out_proj = nn.Linear(vision.width, config.width) if projected else None
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if not is_skeleton(self):
            self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter as the code of the paper does."""
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        for linear in (self.in_proj, self.out_proj):
            if linear is not None:
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

    def embed(self, ids: Tensor, start: int = 0) -> Tensor:
        """Ids (B, T) at positions `start` and on -> (B, T, D) in the compute dtype; raises ValueError for too many."""
        end = start + ids.shape[1]
        if end > self.config.caption_length:
            raise ValueError(f"captions have {end} ids, the model reads at most {self.config.caption_length}")
        x = self.token_embed(ids)
        x = x if self.in_proj is None else linear_fp32(x, self.in_proj.weight, self.in_proj.bias)
        return x.to(compute_dtype(self.token_embed.weight))

    def states(self, normed: Tensor) -> Tensor:
        """Normalised hidden states (B, T, D) -> what the vocabulary is compared with, (B, T, width)."""
        return normed if self.out_proj is None else linear_fp32(normed, self.out_proj.weight, self.out_proj.bias)

    def logits(self, states: Tensor) -> Tensor:
        """(..., width) -> (..., vocab_size), float32."""
        return linear_fp32(states, self.head.weight)


class GenLip(nn.Module):
    """One transformer over patches and caption."""

    text: None = None
    """No text tower: what tells this model from version 1."""

    def __init__(self, config: GenLipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = GenLipTower(config.vision)
        self.decoder = LanguageEnds(config.decoder, config.vision)
        self._places: dict[tuple[int, torch.device], Tensor] = {}

    def untrained_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that no loss of this model reaches: none."""
        return iter(())

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        keep: Tensor | None = None,
        caption_lengths: Lengths | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) and caption ids int64 (B, T), [bos] first -> states (B, T, width).

        State i predicts id i + 1: give them to `objectives.caption.caption_loss` with `decoder.head.weight`.
        Given `caption_lengths`, states past the end of a caption may be zeros. Raises
        ValueError for a choice `keep` of patches: every one is read.
        """
        if keep is not None:
            raise ValueError("GenLIP reads every patch; leave keep out")
        patches, (image_places,) = self.vision.embed(images), self.vision.block_inputs(images)
        text_places = self._text_places(self.vision.grid_of(images), images.device)
        *blocks, last = self.vision.own_blocks()

        def states_of(rows: Tensor | slice, reach: int) -> Tensor:
            x, text = patches[rows], self.decoder.embed(input_ids[rows, :reach])
            places = text_places[:, :reach]
            for block in blocks:
                x, text = block.forward_prefix(x, text, False, image_places, places)
            return self._states(last.forward_queries(x, text, image_places, places))

        if last.branch_scale is not None:
            # Stochastic depth has a factor for each sample of the batch, in the batch's order.
            caption_lengths = None
        return states_by_length(caption_lengths, input_ids.shape[1], states_of, images.device)

    def caption_logits(self, images: Tensor, input_ids: Tensor) -> Tensor:
        """Images (B, 3, H, W) and ids (B, T), [bos] first -> logits (B, T, V), float32."""
        return self.decoder.logits(self(images, input_ids))

    def prefill(self, images: Tensor, room: int) -> list[LayerCache]:
        """Read images (B, 3, H, W); the caches of all blocks, with room for that many ids of text."""
        x, (places,) = self.vision.embed(images), self.vision.block_inputs(images)
        caches = empty_caches(x, self.config.vision.heads, self.config.vision.depth, room)
        for block, cache in zip(self.vision.own_blocks(), caches, strict=True):
            x = block.extend(x, cache, False, places)
        return caches

    def step(self, ids: Tensor, position: int, grid: tuple[int, int], caches: list[LayerCache]) -> Tensor:
        """The id at `position` of each caption, (B, 1), after everything cached -> states (B, 1, width)."""
        x = self.decoder.embed(ids, position)
        places = self._text_places(grid, ids.device)[:, position : position + 1]
        for block, cache in zip(self.vision.own_blocks(), caches, strict=True):
            x = block.extend(x, cache, False, places)
        return self._states(x)

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        bos_id: int,
        eos_id: int,
        max_length: int | None = None,
        sampler: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Caption images (B, 3, H, W) -> ids int64 (B, L), without [bos], as `write_tokens` does.

        `max_length` is `caption_length` by default and at most.
        """
        length = min(max_length or self.config.decoder.caption_length, self.config.decoder.caption_length)
        caches, grid = self.prefill(images, length), self.vision.grid_of(images)
        first = torch.full((len(images), 1), bos_id, device=images.device)
        return write_tokens(
            lambda ids, position: self.decoder.logits(self.step(ids, position, grid, caches)),
            first,
            eos_id,
            length,
            sampler,
        )

    def _states(self, x: Tensor) -> Tensor:
        norm = self.vision.fc_norm
        return self.decoder.states(norm(x.to(norm.weight.dtype)))

    def _text_places(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Cosines and sines (2, caption_length, d) of the text's positions behind patches of a grid."""
        key = (max(grid), device)
        if key not in self._places:
            vision = self.config.vision
            with torch.inference_mode(False):
                positions = (max(grid) + torch.arange(self.config.decoder.caption_length)).expand(AXES, -1)
                table = rotary_table(positions, vision.width // vision.heads, vision.rope_theta)
                self._places[key] = table.to(device)
        return self._places[key]


def _xavier(weight: Tensor, fans: int) -> None:
    """Xavier's uniform numbers of a matrix whose fans add up to `fans`, in place."""
    bound = math.sqrt(6 / fans)
    nn.init.uniform_(weight, -bound, bound)
