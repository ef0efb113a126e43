"""Batches of conversations: the order of samples, and their collation into padded or packed rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from openvision.multimodal.data.conversation import IGNORED
from openvision.multimodal.data.dataset import Item
from openvision.multimodal.model.geometry import Geometry
from openvision.multimodal.model.native import pad_images

# Batches whose samples are sorted together: enough for similar lengths, few enough to stay shuffled.
_POOL = 50


class SampleOrder(Sampler[int]):
    """Indices of exactly `steps` batches, from consecutive shuffled epochs.

    The order depends on the seed only, so a resumed run reads the same samples as an uninterrupted one. With `lengths`,
    samples of similar length share a batch.
    """

    def __init__(self, size: int, batch_size: int, steps: int, seed: int, lengths: Sequence[int] | None = None) -> None:
        """`batch_size` is that of an optimizer step, over all devices."""
        self.size = size
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self.lengths = lengths

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __iter__(self) -> Iterator[int]:
        stream = self._shuffled()
        left = self.steps
        while left > 0:
            batches = min(_POOL, left)
            yield from self._arranged([next(stream) for _ in range(batches * self.batch_size)], left)
            left -= batches

    def _shuffled(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(self.size, generator=generator).tolist()

    def _arranged(self, pool: list[int], left: int) -> list[int]:
        """The same samples, in batches of similar lengths and random order."""
        lengths = self.lengths
        if lengths is None:
            return pool
        pool = sorted(pool, key=lambda index: -lengths[index])
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + left)
        order = torch.randperm(len(pool) // self.batch_size, generator=generator).tolist()
        return [pool[batch * self.batch_size + at] for batch in order for at in range(self.batch_size)]


class ImageInputs(TypedDict, total=False):
    """Images of a batch; empty without images."""

    pixel_values: Tensor
    """Pixels float32 (squares, 3, S, S), or features (squares, 1, N, D); native shapes are padded to the largest."""
    image_sizes: Tensor
    """int64 (n, 2): heights and widths, for anyres of the images, for native shapes of what the tower reads."""


class Batch(ImageInputs):
    """Inputs of a LLaVA model in training."""

    input_ids: Tensor
    """int64 (B, L), or (1, total) when packed."""
    labels: Tensor
    """int64, shape of `input_ids`."""
    attention_mask: NotRequired[Tensor]
    """int64, shape of `input_ids`; padded rows only."""
    position_ids: NotRequired[Tensor]
    """int64, shape of `input_ids`; packed rows only."""
    use_cache: bool
    """False: training needs no key-value cache, and with one transformers lets packed samples attend to each other."""


@dataclass
class _Row:
    input_ids: list[int]
    labels: list[int]
    attended: int
    """Tokens before the blank image and the padding."""


@dataclass(frozen=True)
class Collator:
    """Collate items of a `ConversationDataset` into inputs of a stock LLaVA model.

    `packed` concatenates the samples into one row with positions that restart at each sample; transformers keeps
    attention within a sample. `blank` adds a black image behind the attention mask to a batch without images, so that
    every process runs the tower and the projector has a gradient (zero); it changes no loss.
    """

    pad_token_id: int
    image_token_id: int
    geometry: Geometry
    packed: bool = False
    blank: bool = False
    cached: bool = False
    """Whether images are cached features; then a blank one is, too."""

    def __call__(self, items: Sequence[Item]) -> Batch:
        """Collate items into one batch."""
        rows = [_Row(list(item["input_ids"]), list(item["labels"]), len(item["input_ids"])) for item in items]
        images = self._images(items)
        if not images and self.blank:
            images = self._blank_image()
            self._append_blank(rows)
        return {**(self._pack(rows) if self.packed else self._pad(rows)), **images}

    def _images(self, items: Sequence[Item]) -> ImageInputs:
        if self.geometry.native is not None:
            return self._native([image for item in items for image in item.get("native", [])], items)
        found = [item["features"] for item in items if "features" in item]
        found = found or [item["pixel_values"] for item in items if "pixel_values" in item]
        if not found:
            return {}
        return self._as_pixels(torch.cat(found), [size for item in items for size in item["image_sizes"]])

    def _native(self, images: Sequence[Tensor], items: Sequence[Item]) -> ImageInputs:
        """Images of several shapes, pixels (3, H, W) or features (N, D), padded to the largest."""
        if not images:
            return {}
        shapes = self.geometry.native
        assert shapes is not None
        sizes = torch.tensor([shapes.shape_of(*size) for item in items for size in item["image_sizes"]])
        if images[0].ndim == 2:
            return {"pixel_values": pad_sequence(list(images), batch_first=True)[:, None], "image_sizes": sizes}
        return {"pixel_values": pad_images(images), "image_sizes": sizes}

    def _as_pixels(self, values: Tensor, sizes: Sequence[tuple[int, int]]) -> ImageInputs:
        # Features (squares, N, D) take the place of pixels (squares, 3, S, S), see `feature_cache.CachedTower`.
        inputs: ImageInputs = {"pixel_values": values if values.ndim == 4 else values[:, None]}
        if self.geometry.pinpoints:
            inputs["image_sizes"] = torch.tensor(sizes)
        return inputs

    def _blank_image(self) -> ImageInputs:
        if self.geometry.native is not None:
            height, width = self.geometry.native.shape_of(1, 1)
            count = height * width // self.geometry.patch_size**2
            values = torch.zeros(1, 1, count, self.geometry.width) if self.cached else torch.zeros(1, 3, height, width)
            return {"pixel_values": values, "image_sizes": torch.tensor([[height, width]])}
        side = self.geometry.image_size
        squares, features = self.geometry.squares(side, side), (self.geometry.patches, self.geometry.width)
        values = torch.zeros(squares, *features) if self.cached else torch.zeros(squares, 3, side, side)
        return self._as_pixels(values, [(side, side)])

    def _append_blank(self, rows: Sequence[_Row]) -> None:
        """Append the blank image's tokens to the shortest row."""
        row = min(rows, key=lambda row: len(row.input_ids))
        count = self.geometry.tokens(self.geometry.image_size, self.geometry.image_size)
        if self.geometry.native is not None:
            # Nobody reads where its rows end.
            rows_of_patches, columns = self.geometry.native_grid(1, 1)
            count = rows_of_patches * columns
        row.input_ids += [self.image_token_id] * count
        row.labels += [IGNORED] * count

    def _pad(self, rows: Sequence[_Row]) -> Batch:
        length = max(len(row.input_ids) for row in rows)
        ids = [row.input_ids + [self.pad_token_id] * (length - len(row.input_ids)) for row in rows]
        labels = [row.labels + [IGNORED] * (length - len(row.labels)) for row in rows]
        mask = [[1] * row.attended + [0] * (length - row.attended) for row in rows]
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "attention_mask": torch.tensor(mask),
            "use_cache": False,
        }

    def _pack(self, rows: Sequence[_Row]) -> Batch:
        ids, labels, positions = [], [], []
        for row in rows:
            ids += row.input_ids
            # The previous sample must not learn to predict this one's first token.
            labels += [IGNORED, *row.labels[1:]]
            positions += [*range(row.attended), *range(len(row.input_ids) - row.attended)]
        return {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.tensor([positions]),
            "use_cache": False,
        }
