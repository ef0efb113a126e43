"""What a run computes and keeps beside its model: frozen teachers, and the dense objective's second pass and average.

A teacher that reads batches computes one forward pass; one with a cache computes nothing. Its features stay for the
whole batch, its largest layers for a micro-batch. Projections and predictor are trained and kept like the model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from openvision.hardware import Range
from openvision.models.flops import TowerFlops, patch_embed_flops, patches_of, vision_flops
from openvision.models.openvision2 import ModelConfig, kept_patches
from openvision.models.vision import VisionTransformer
from openvision.objectives.dense import crop_grid
from openvision.planning.memory import FLOAT, NOTHING, Beside, Setting, Stack, stacks
from openvision.recipe.schema import Recipe
from openvision.recipe.sections import Dense, TeacherTable
from openvision.teachers.shape import TeacherShape, teacher_shape

# Results of layers that are there at a time in a forward pass without gradient: lowest and highest.
_AT_A_TIME: Range = (2.0, 4.0)


def additions_of(recipe: Recipe) -> "Additions":
    """What the tables of a recipe add; raises OpenVisionError for a teacher that cannot be read."""
    tables = recipe.teacher or ()
    shapes = [teacher_shape(table.source, table.library, table.resolution) for table in tables]
    return Additions(recipe.model, tuple(zip(tables, shapes, strict=True)), recipe.dense)


@dataclass(frozen=True)
class Additions:
    """The teachers and the dense objective of a recipe."""

    model: ModelConfig
    teachers: Sequence[tuple[TeacherTable, TeacherShape]] = ()
    dense: Dense | None = None

    def trained(self) -> dict[str, int]:
        """Parameters that are trained beside the model's, by name."""
        width = self.model.vision.width
        found = {f"{_title(table)}, projections": _heads(width, table, shape) for table, shape in self.teachers}
        if self.dense is not None:
            # The token of a masked patch, a norm and two linear layers.
            token = width * (self.dense.kind == "masked")
            found["dense head"] = token + 2 * width + 2 * (width + 1) * width
        return {name: count for name, count in found.items() if count}

    def frozen(self) -> dict[str, int]:
        """Parameters that are kept in float32 without gradient or moments, by name."""
        found = {_title(table): shape.parameters for table, shape in self.teachers if table.cache is None}
        if self.dense is not None:
            with torch.device("meta"):
                averaged = VisionTransformer(replace(self.model.vision, pool="mean"), None)
            found["averaged tower"] = sum(parameter.numel() for parameter in averaged.parameters())
        return found

    def flops(self, resolution: int) -> tuple[TowerFlops, ...]:
        """Operations of one training sample, by part."""
        vision = self.model.vision
        patches, found = patches_of(vision, resolution), []
        for table, shape in self.teachers:
            if table.cache is None:
                # Nobody needs a gradient of its weights or its images.
                found.append(TowerFlops(_title(table), shape.forward, 2 * shape.forward, frozen=True))
            heads = 2 * vision.width * shape.pooled_width * bool(table.pooled)
            heads += 2 * vision.width * patches * _channels(shape) * bool(table.patches)
            if heads:
                found.append(TowerFlops(f"{_title(table)}, projections", heads))
        if self.dense is not None:
            tower, masked = replace(vision, pool="mean"), self.dense.kind == "masked"
            seen, (side, predicted) = vision_flops(tower, resolution, None), self._predicted(resolution)
            again = vision_flops(tower, side, None, predicted if masked else None)
            found += [
                TowerFlops("masked pass" if masked else "crops", again, patch_embed_flops(vision, side)),
                TowerFlops("dense head", 4 * predicted * vision.width**2),
                TowerFlops("averaged tower", seen, 2 * seen, frozen=True),
            ]
        return tuple(found)

    def memory(self, resolution: int, texts: int, setting: Setting) -> Beside:
        """Bytes that are kept and worked with."""
        patches, width = patches_of(self.model.vision, resolution), self.model.vision.width
        found = NOTHING
        for table, shape in self.teachers:
            kept = 0
            batch = FLOAT * shape.pooled_width
            if table.patches:
                # The projection's norm before and after, both sides of the cosine in float32; the batch has the target.
                batch += setting.item * patches * _channels(shape)
                sides = 2 if setting.bf16 else 1
                kept = patches * (2 * setting.item * width + sides * FLOAT * _channels(shape))
            before = (0.0, 0.0)
            if table.cache is None:
                before = (_AT_A_TIME[0] * setting.item * shape.largest, _AT_A_TIME[1] * FLOAT * shape.largest)
            else:
                # float16 as the loader has brought it, of this batch and of the next one.
                batch += 2 * 2 * (shape.pooled_width + (_whole(shape) if table.patches else 0))
            found += Beside((kept, kept), batch, before=before)
        if self.dense is not None:
            side, predicted = self._predicted(resolution)
            again, tokens = self._second_pass(side, predicted, texts), patches + self.model.vision.prefix_tokens
            pixels = FLOAT * self.model.vision.input_channels * self.model.vision.kernel**2
            # In the head: before and after the norm and the GELU; prediction and target in float32.
            rest = pixels * patches_of(self.model.vision, side) + predicted * width * (4 * setting.item + 2 * FLOAT)
            # Indices of the patches as int64.
            rest += 8 * predicted * width * (self.dense.kind == "masked")
            low, high = again.sample_bytes(setting)
            largest = FLOAT * tokens * self.model.vision.mlp_dim
            found += Beside((low + rest, high + rest), 0.0, during=_AT_A_TIME[1] * largest)
        return found

    def _predicted(self, resolution: int) -> tuple[int, int]:
        """Side of what the student reads once more, and how many of its patches it predicts."""
        assert self.dense is not None
        vision = self.model.vision
        if self.dense.kind == "crops":
            side = crop_grid(vision.grid(resolution, resolution))[0] * vision.patch_size
            return side, patches_of(vision, side)
        return resolution, kept_patches(patches_of(vision, resolution), self.dense.mask)

    def _second_pass(self, side: int, predicted: int, texts: int) -> Stack:
        """The second pass through the tower, of which the last block computes the predicted patches."""
        assert self.dense is not None
        tower = next(stack for stack in stacks(self.model, side, texts) if stack.name == "vision")
        return replace(tower, last_tokens=predicted) if self.dense.kind == "masked" else tower


def _title(table: TeacherTable) -> str:
    """Name of a teacher among the parts of a plan, where no tower of the model has one like it."""
    return f"teacher {table.title}"


def _heads(width: int, table: TeacherTable, shape: TeacherShape) -> int:
    """Parameters of the projections to the widths of a teacher."""
    pooled = (width + 1) * shape.pooled_width if table.pooled else 0
    patches = 2 * width + (width + 1) * _channels(shape) if table.patches else 0
    return pooled + patches


def _channels(shape: TeacherShape) -> int:
    return 0 if shape.patch_map is None else shape.patch_map[0]


def _whole(shape: TeacherShape) -> int:
    """Numbers in the map of patches of an image."""
    return 0 if shape.patch_map is None else math.prod(shape.patch_map)
