"""Visual tokens of an image: one square for LLaVA-1.5, anyres tiles with newlines for LLaVA-NeXT (papers.md 4), one
grid of its own shape for llava-native.

All counts follow from the vision tower's configuration and the grids, so they are checked before anything runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from openvision.errors import OpenVisionError
from openvision.images.native import NativeShapes
from openvision.multimodal.model.native import native_shapes

if TYPE_CHECKING:
    from openvision.multimodal.model.huggingface import LlavaConfig, Processor

Framework = Literal["llava-1.5", "llava-next", "llava-native"]
Aspect = Literal["pad", "crop", "anyres", "native"]
# Rows and columns of tiles that Open-LLaVA-NeXT chooses from, in its order.
ANYRES_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@dataclass(frozen=True)
class Geometry:
    """Resolution, patches and tokens of a vision tower, as the language model sees them."""

    image_size: int
    """Side of the tower's input in pixels."""
    patch_size: int
    prefix_tokens: int
    """Tokens before the patches: 1 for a class token, 0 for SigLIP. They are never given to the language model."""
    width: int
    """Width of a token."""
    depth: int
    """Blocks of the tower."""
    pinpoints: tuple[tuple[int, int], ...] = ()
    """Heights and widths in pixels that anyres may choose; empty for one square."""
    native: NativeShapes | None = None
    """Shapes in which an image keeps its aspect; None for squares."""

    @property
    def aspects(self) -> tuple[Aspect, ...]:
        """How images of this model may be read."""
        return ("native",) if self.native else ("anyres",) if self.pinpoints else ("pad", "crop")

    @property
    def grid(self) -> int:
        """Patches a side; pixels that do not fill a patch are dropped."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of one square."""
        return self.grid**2

    @property
    def tower_tokens(self) -> int:
        """Tokens that the tower returns for one square, prefix included."""
        return self.patches + self.prefix_tokens

    def tokens(self, height: int, width: int) -> int:
        """Tokens of an image of `height` x `width` pixels in the language model."""
        if self.native is not None:
            rows, columns = self.native_grid(height, width)
            return rows * columns + rows
        if not self.pinpoints:
            return self.patches
        rows, columns = self.unpadded(height, width)
        # The base image, the tiles without padding, and a newline after each of their rows.
        return self.patches + rows * columns + rows

    def native_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image that keeps its aspect; raises BadSampleError as `shape_of`."""
        assert self.native is not None
        tall, wide = self.native.shape_of(height, width)
        return tall // self.patch_size, wide // self.patch_size

    def image_ids(self, height: int, width: int, image_token: int, row_break: int) -> list[int]:
        """Ids of an image in the text: its tokens, in native shapes with `row_break` behind each row."""
        if self.native is None:
            return [image_token] * self.tokens(height, width)
        rows, columns = self.native_grid(height, width)
        return ([image_token] * columns + [row_break]) * rows

    @property
    def most_patches(self) -> int:
        """Patches of an image that the tower encodes at once, at most."""
        return self.patches if self.native is None else self.native.max_tokens

    def squares(self, height: int, width: int) -> int:
        """Squares of an image that the tower encodes: one, or the base and its tiles."""
        if not self.pinpoints:
            return 1
        rows, columns = self.tiles(height, width)
        return 1 + rows * columns

    def tiles(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles: the grid that keeps most pixels; ties go to the one that pads least."""
        best, best_key = self.pinpoints[0], (-1, 0)
        for rows, columns in self.pinpoints:
            scale = min(columns / width, rows / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            key = (kept, kept - rows * columns)
            if key > best_key:
                best, best_key = (rows, columns), key
        return best[0] // self.image_size, best[1] // self.image_size

    def unpadded(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tile patches without padding (`spatial_unpad`)."""
        tile_rows, tile_columns = self.tiles(height, width)
        rows, columns = tile_rows * self.grid, tile_columns * self.grid
        if width / height > columns / rows:
            filled = int(round(height * (columns / width), 7))
            return rows - (rows - filled) // 2 * 2, columns
        filled = int(round(width * (rows / height), 7))
        return rows, columns - (columns - filled) // 2 * 2


def anyres_pinpoints(image_size: int) -> tuple[tuple[int, int], ...]:
    """Heights and widths in pixels of Open-LLaVA-NeXT's grids for a tower of `image_size` pixels a side."""
    return tuple((rows * image_size, columns * image_size) for rows, columns in ANYRES_GRIDS)


def model_geometry(config: "LlavaConfig") -> Geometry:
    """Geometry of a built model, from its `LlavaConfig` or `LlavaNextConfig`."""
    vision = config.vision_config
    budget = (getattr(vision, "native", None) or {}).get("max_tokens")
    pinpoints = getattr(config, "image_grid_pinpoints", None) or ()
    return Geometry(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        prefix_tokens=1 if config.vision_feature_select_strategy == "default" else 0,
        width=vision.hidden_size,
        depth=vision.num_hidden_layers,
        pinpoints=tuple((height, width) for height, width in pinpoints),
        native=None if budget is None else native_shapes(vision.patch_size, budget, _aspects(config)),
    )


def set_budget(config: "LlavaConfig", max_tokens: int) -> None:
    """Have a model read native shapes of at most `max_tokens` patches; raises OpenVisionError for too few."""
    native_shapes(config.vision_config.patch_size, max_tokens, _aspects(config))
    config.vision_config.native = {"max_tokens": max_tokens}  # pyright: ignore[reportAttributeAccessIssue]


def _aspects(config: "LlavaConfig") -> Sequence[float]:
    """Buckets of the tower's own configuration, which is part of that of a model of native shapes."""
    return (getattr(config.vision_config, "tower", None) or {}).get("aspects", ())


def check_processor(processor: "Processor", config: "LlavaConfig", folder: object) -> Geometry:
    """Return the model's geometry; raise OpenVisionError when the processor prepares images for another tower."""
    geometry = model_geometry(config)
    size, crop = _side(processor.image_processor.size), _side(processor.image_processor.crop_size)
    for what, found in (("resizes images to", size), ("crops images to", crop)):
        if found != geometry.image_size:
            raise OpenVisionError(
                f"{folder}: the processor {what} {found} px, but the encoder takes {geometry.image_size} px; "
                "build the model again with `openvision vlm build`"
            )
    expected = {
        "patch_size": geometry.patch_size,
        "num_additional_image_tokens": geometry.prefix_tokens,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "image_token_id": config.image_token_id,
    }
    for name, value in expected.items():
        if getattr(processor, name) != value:
            raise OpenVisionError(
                f"{folder}: the processor says {name} = {getattr(processor, name)}, the model {value}; "
                "build the model again with `openvision vlm build`"
            )
    grids = tuple(map(tuple, getattr(processor.image_processor, "image_grid_pinpoints", None) or ()))
    if grids != geometry.pinpoints:
        raise OpenVisionError(
            f"{folder}: the processor tiles images by {grids}, the model by {geometry.pinpoints}; "
            "build the model again with `openvision vlm build`"
        )
    return geometry


def _side(size: Mapping[str, int]) -> int | None:
    values = {size[key] for key in ("height", "width", "shortest_edge") if size.get(key)}
    return values.pop() if len(values) == 1 else None
