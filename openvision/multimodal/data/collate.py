"""Items to batches: padded rows, or all samples of a batch end to end in one row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openvision.multimodal.data.conversation import IGNORED
from openvision.multimodal.model.geometry import Geometry


@dataclass(frozen=True)
class Collator:
    """Called with the items of a `ConversationDataset`, returns what a stock LLaVA model takes.

    `packed` puts the samples one after the other into a single row with positions that start anew; transformers keeps
    attention within a sample. `blank` gives a batch without any picture a black one behind the attention mask, so that
    every process runs the tower and the projector has a gradient (zero); it changes no loss.
    """

    pad_token_id: int
    image_token_id: int
    geometry: Geometry
    packed: bool = False
    blank: bool = False
    cached: bool = False
    """Whether pictures come as features: a blank one must too."""

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `labels`, int64 (B, L) or (1, total); `pixel_values` or features; `image_sizes` for anyres."""
        rows = [(list(item["input_ids"]), list(item["labels"]), len(item["input_ids"])) for item in items]
        pictures = self._pictures(items)
        if not pictures and self.blank:
            pictures = self._blank_picture()
            self._hide(rows, pictures)
        # A cache of keys is of no use in training, and with one transformers would let packed samples see each other.
        return (self._pack(rows) if self.packed else self._pad(rows)) | pictures | {"use_cache": False}

    def _pictures(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        name = "features" if any("features" in item for item in items) else "pixel_values"
        found = [item[name] for item in items if name in item]
        if not found:
            return {}
        return self._as_pixels(torch.cat(found), [size for item in items for size in item["image_sizes"]])

    def _as_pixels(self, values: Tensor, sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        # Features (squares, N, D) take the place of pixels (squares, 3, S, S): `cache.CachedTower` knows them.
        pixels = values if values.ndim == 4 else values[:, None]
        return {"pixel_values": pixels} | ({"image_sizes": torch.tensor(sizes)} if self.geometry.pinpoints else {})

    def _blank_picture(self) -> dict[str, Tensor]:
        side = self.geometry.image_size
        squares, features = self.geometry.squares(side, side), (self.geometry.patches, self.geometry.width)
        values = torch.zeros(squares, *features) if self.cached else torch.zeros(squares, 3, side, side)
        return self._as_pixels(values, [(side, side)])

    def _hide(self, rows: list[tuple[list[int], list[int], int]], pictures: dict[str, Tensor]) -> None:
        shortest = min(range(len(rows)), key=lambda index: len(rows[index][0]))
        side = self.geometry.image_size
        count = self.geometry.tokens(side, side)
        ids, labels, seen = rows[shortest]
        rows[shortest] = (ids + [self.image_token_id] * count, labels + [IGNORED] * count, seen)

    def _pad(self, rows: Sequence[tuple[list[int], list[int], int]]) -> dict[str, Tensor]:
        length = max(len(ids) for ids, _, _ in rows)
        return {
            "input_ids": torch.tensor([ids + [self.pad_token_id] * (length - len(ids)) for ids, _, _ in rows]),
            "labels": torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels, _ in rows]),
            "attention_mask": torch.tensor([[1] * seen + [0] * (length - seen) for _, _, seen in rows]),
        }

    def _pack(self, rows: Sequence[tuple[list[int], list[int], int]]) -> dict[str, Tensor]:
        ids, labels, positions = [], [], []
        for sample_ids, sample_labels, seen in rows:
            ids += sample_ids
            # What stands before a sample must not learn to predict its first token.
            labels += [IGNORED, *sample_labels[1:]]
            positions += [*range(seen), *range(len(sample_ids) - seen)]
        return {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.tensor([positions]),
        }
