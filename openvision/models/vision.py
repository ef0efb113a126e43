"""The vision tower: a plain pre-norm ViT with fixed positions and mean pooling before the last norm (spec section 1).

- Images come in as uint8 and are normalised here, and nowhere else. Floats are taken as normalised already.
- Patch convolution without bias, in float32; class token carried along but never read out.
- No norm before the blocks; the patch tokens handed on are un-normalised.
- Pooled = LayerNorm(mean of the patch tokens); embedding = bias-free head on it, in float32.
- Options beyond the paper, off by default: registers beside the class token, and pooling by attention (pooling.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision.files import JsonObject
from openvision.models.bounds import MAX_REGISTERS, check_aspects, check_patches, check_transformer, stored
from openvision.models.kernels.dispatch import compute_dtype, full_precision, linear_fp32
from openvision.models.layers import (
    Block,
    Init,
    LayerNorm,
    init_vision_block,
    is_skeleton,
    sincos_position_table,
    unit,
)
from openvision.models.pooling import AttentionPool
from openvision.untrusted import check_count

Pool = Literal["mean", "map"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 with ImageNet mean and deviation, on the tensor's own device."""
    # Filled in on the device: a tensor made from a list would be copied there at every call.
    mean, deviation = (
        torch.stack([torch.full((1, 1), value, device=images.device) for value in values]) * 255
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (images.float() - mean) / deviation


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a vision tower. `image_size` (pixels) is the default resolution: parameters do not depend on it."""

    # Recipes are parsed by pydantic, which reads this: a misspelt key is an error.
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    width: int
    depth: int
    mlp_dim: int
    heads: int
    patch_size: int
    image_size: int
    position_side: int | None = None
    """Rows and columns of the grid on which patches have their positions, whatever their number; None: their own
    indices, as published."""
    init: Init = "published"
    """Initial values of the blocks: "published", a deviation of 0.02 in every width, or "by_width", as in the text
    tower: narrow towers leave the first plateau sooner."""
    registers: int = field(default=0, kw_only=True)
    """Learned tokens that attend beside the class token and are dropped from every output (arXiv 2309.16588)."""
    pool: Pool = field(default="mean", kw_only=True)
    """"mean" norms the mean patch token, as published; "map" pools the normed patches by attention, as SigLIP does."""
    aspects: tuple[float, ...] = field(default=(), kw_only=True)
    """Width over height of the shapes that it was trained on, which a run of native shapes fills in; empty: squares."""

    def __post_init__(self) -> None:
        # A list in config.json.
        object.__setattr__(self, "aspects", tuple(self.aspects))
        check_aspects(self.aspects)
        check_transformer(self.width, self.depth, self.mlp_dim, self.heads)
        check_count("registers", self.registers, 0, MAX_REGISTERS)
        if self.pool not in ("mean", "map"):
            raise ValueError(f'pool {self.pool!r} of a vision tower must be "mean" or "map"')
        if self.width % 4 or self.width < 8:
            raise ValueError(
                f"width {self.width} of a vision tower must be a multiple of 4 and at least 8: positions need it"
            )
        check_patches(self.image_size, self.patch_size)
        if self.position_side is not None and self.position_side < 1:
            raise ValueError(f"position_side {self.position_side} of a vision tower must be at least 1")

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return 1 + self.registers

    @property
    def is_published(self) -> bool:
        """Whether the tower is the papers': no registers, pooled by the mean."""
        return self.registers == 0 and self.pool == "mean"

    def to_dict(self) -> JsonObject:
        """Plain dictionary, as written to `config.json`: options that are off are left out, as older versions need."""
        return stored(self, ("registers", "pool", "position_side", "init", "aspects"))

    @property
    def input_channels(self) -> int:
        """Channels of what is cut into patches: RGB."""
        return 3

    @property
    def kernel(self) -> int:
        """Side of a patch in what is cut into patches: pixels."""
        return self.patch_size

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Rows and columns of patches for an image of the given pixels; what does not fill a patch is dropped."""
        return (height or self.image_size) // self.patch_size, (width or self.image_size) // self.patch_size

    def positions(self, rows: int, columns: int) -> Tensor:
        """Fixed positions of a grid of patches, float32 (rows * columns, width), row-major."""
        return sincos_position_table(rows, columns, self.width, self.position_side)


@dataclass(frozen=True)
class LayerTokens:
    """The residual stream after one block, for B images of N patches."""

    patch_tokens: Tensor
    """(B, N, D), row-major."""
    class_token: Tensor | None
    """(B, D); None in a tower without one."""


@dataclass(frozen=True)
class VisionFeatures:
    """What the vision tower computes for B images of N patches."""

    patch_tokens: Tensor
    """(B, N, D), output of the last block before any norm, row-major."""
    class_token: Tensor | None
    """(B, D), output of the last block before any norm; OpenVision never reads it. None in a tower without one."""
    pooled: Tensor
    """(B, D), LayerNorm of the mean patch token, or what the attention pool makes of all of them."""
    grid: tuple[int, int]
    """Rows and columns of patches; N is their product."""
    layers: tuple[LayerTokens, ...] = ()
    """Tokens of the layers that were asked for, in that order."""
    num_prefix_tokens: int = 1
    """Tokens before the patches inside the tower: the class token, kept apart here, and registers, dropped."""


@dataclass(frozen=True)
class MaskedPatches:
    """Patches of B images of N patches that the tower does not see."""

    mask: Tensor
    """bool (B, N)."""
    token: Tensor
    """(D,), what stands in their place."""


class PatchEmbed(nn.Module):
    """Cut images into patches and project them, in float32; OpenVision's has no bias."""

    def __init__(self, patch_size: int, width: int, channels: int = 3, bias: bool = False) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D), row-major."""
        with torch.autocast(images.device.type, enabled=False):
            # The same numbers as a strided convolution, by one matrix product: faster on CPU, forward and backward.
            weight = full_precision(self.proj.weight.flatten(1))
            bias = None if self.proj.bias is None else full_precision(self.proj.bias)
            patches = F.pixel_unshuffle(self._crop(images).to(weight.dtype), self.patch_size)
            return F.linear(patches.flatten(2).transpose(1, 2), weight, bias)

    def _crop(self, images: Tensor) -> Tensor:
        height, width = (size - size % self.patch_size for size in images.shape[-2:])
        return images[..., :height, :width]


class VisionTransformer(nn.Module):
    """OpenVision's image encoder. `embed_dim` None leaves the head out (OpenVision 2)."""

    def __init__(self, config: VisionConfig, embed_dim: int | None) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.kernel, config.width, config.input_channels)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        registers = torch.empty(1, config.registers, config.width) if config.registers else None
        self.reg_token: nn.Parameter | None = None if registers is None else nn.Parameter(registers)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_dim, gelu="none") for _ in range(config.depth)
        )
        self.fc_norm = LayerNorm(config.width)
        self.attn_pool = AttentionPool(config.width, config.heads, config.mlp_dim) if config.pool == "map" else None
        self.head = nn.Linear(config.width, embed_dim, bias=False) if embed_dim else None
        self._positions: dict[tuple[int, int, torch.device], Tensor] = {}
        if not is_skeleton(self):
            self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter as the original does."""
        bound = math.sqrt(6 / (self.config.input_channels * self.config.kernel**2))
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        nn.init.normal_(self.cls_token, std=1e-6)
        for block in self.blocks:
            init_vision_block(block, self.config.width, self.config.init)  # pyright: ignore[reportArgumentType]
        self.fc_norm.reset_parameters()
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)
        if self.attn_pool is not None:
            self.attn_pool.init_weights()

    def position_table(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Fixed positions (rows * columns, D) for any grid; computed once a grid and device, never a parameter."""
        if isinstance(rows, torch.SymInt) or isinstance(columns, torch.SymInt):
            # An export with free resolution: the table is computed inside the graph.
            return self._make_positions(rows, columns).to(device)
        key = (rows, columns, device)
        if key not in self._positions:
            # Rotary ones are needed in a backward pass, for which nothing made in inference mode can be kept.
            with torch.inference_mode(False):
                self._positions[key] = self._make_positions(rows, columns).to(device)
        return self._positions[key]

    def _make_positions(self, rows: int, columns: int) -> Tensor:
        return self.config.positions(rows, columns)

    @property
    def readout(self) -> int:
        """The layer, numbered as in `forward_features`, whose tokens are the features: the last."""
        return len(self.blocks)

    def block_inputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """What every block is given of a batch of images beside its tokens: nothing, positions are added before."""
        return ()

    def inputs(self, images: Tensor) -> Tensor:
        """What is cut into patches: images (B, 3, H, W), normalised if they are uint8."""
        return normalize(images) if images.dtype == torch.uint8 else images

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of a batch of images."""
        return self.config.grid(*images.shape[-2:])

    def embed(self, images: Tensor, masked: MaskedPatches | None = None) -> Tensor:
        """Images (B, 3, H, W) -> (B, 1 + R + N, D) in the compute dtype: class token, R registers, patches.

        The one place where pixels are normalised: uint8 images are, floats are taken as normalised already. Patches
        that are `masked` keep their position.
        """
        inputs = self.inputs(images)
        rows, columns = self._patch_grid(inputs)
        patches = self.patch_embed(inputs)
        if masked is not None:
            patches = torch.where(masked.mask[..., None], masked.token.to(patches), patches)
        return self.with_prefix(patches + self.position_table(rows, columns, inputs.device))

    def with_prefix(self, patches: Tensor) -> Tensor:
        """Patches (B, N, D) behind class token and registers, whose positions are all zeros: none are added."""
        prefix = self.cls_token if self.reg_token is None else torch.cat([self.cls_token, self.reg_token], dim=1)
        x = torch.cat([prefix.expand(patches.shape[0], -1, -1), patches], dim=1)
        return x.to(compute_dtype(self.cls_token))

    def forward_features(self, images: Tensor, layers: Sequence[int] = (), norm: bool = False) -> VisionFeatures:
        """Encode images (B, 3, H, W), uint8 or normalised floats, of any size that holds a patch.

        `layers` are numbered like the hidden states of transformers: 0 is what enters the first block, i what leaves
        block i, -1 what leaves the last one, -2 (what most multimodal models read) what leaves the one before.
        `norm` applies the final LayerNorm to each token of these layers; it was trained on mean tokens only, so the
        default hands the tokens on as the caption decoder reads them. Raises ValueError for a layer that is not there.
        """
        wanted = [self._layer_index(layer) for layer in layers]
        kept: dict[int, LayerTokens] = {}
        x, places = self.embed(images), self.block_inputs(images)
        read = x
        for index, block in enumerate((None, *self.blocks)[: 1 + max((self.readout, *wanted))]):
            x = x if block is None else block(x, *places)
            if index in wanted:
                kept[index] = self._tokens(x, norm)
            if index == self.readout:
                read = x
        prefix = self.config.prefix_tokens
        return VisionFeatures(
            patch_tokens=read[:, prefix:],
            class_token=read[:, 0] if prefix else None,
            pooled=self.pool(read[:, prefix:]),
            grid=self.grid_of(images),
            layers=tuple(kept[index] for index in wanted),
            num_prefix_tokens=prefix,
        )

    def pool(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, N, D) of the last block -> pooled (B, D).

        Of one patch alone (N = 1) it is that patch in the space of pooled vectors: what text is compared with.
        """
        if self.attn_pool is None:
            return self.fc_norm(tokens.mean(dim=1))
        return self.attn_pool(self.fc_norm(tokens))

    def embed_patches(self, tokens: Tensor) -> Tensor:
        """Patch tokens (..., D) of the last block -> unit vectors (..., E), each patch pooled alone."""
        alone = tokens.flatten(0, -2)[:, None]
        return unit(self.project(self.pool(alone))).unflatten(0, tokens.shape[:-1])

    def patch_tokens(self, images: Tensor, keep: Tensor | None = None, masked: MaskedPatches | None = None) -> Tensor:
        """Images (B, 3, H, W) -> un-normalised patch tokens (B, N, D) of the last block, and nothing else.

        Patches that are `masked` are not seen. `keep`, int64 (B, K), asks for these patches only, in this order:
        (B, K, D). All patches attend in every block; the last one computes the queries and MLP of the patches asked
        for. Same numbers as picking them afterwards.
        """
        x, places = self.embed(images, masked), self.block_inputs(images)
        prefix = self.config.prefix_tokens
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, *places)
        if keep is None:
            return last(x, *places)[:, prefix:]
        return last.forward_rows(x, keep + prefix)  # pyright: ignore[reportCallIssue]

    def _layer_index(self, layer: int) -> int:
        states = len(self.blocks) + 1
        if not -states <= layer < states:
            raise ValueError(
                f"layer {layer} does not exist: this tower has layers 0 to {states - 1}, or -{states} to -1"
            )
        return layer % states

    def _tokens(self, x: Tensor, norm: bool) -> LayerTokens:
        x, prefix = self.fc_norm(x) if norm else x, self.config.prefix_tokens
        return LayerTokens(patch_tokens=x[:, prefix:], class_token=x[:, 0] if prefix else None)

    def _patch_grid(self, inputs: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of what is cut into patches; raises ValueError where there are none."""
        rows, columns = (side // self.config.kernel for side in inputs.shape[-2:])
        if not rows or not columns:
            height, width = (side * self.config.patch_size // self.config.kernel for side in inputs.shape[-2:])
            raise ValueError(f"images of {height} x {width} px are smaller than a patch of {self.config.patch_size} px")
        return rows, columns

    def project(self, pooled: Tensor) -> Tensor:
        """(B, D) pooled -> (B, E) embedding, float32, not normalised."""
        if self.head is None:
            raise ValueError("this vision tower has no projection head: it was not trained with a text tower")
        return linear_fp32(pooled, self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E) embedding, float32, not normalised."""
        return self.project(self.forward_features(images).pooled)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> unit vectors (B, E), float32."""
        return unit(self(images))
