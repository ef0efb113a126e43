"""What patch tokens are near to, without a probe: texts of classes, and the same patches in another view.

- Text: every patch is pooled alone, in the space that the mean was trained in, and gets the class whose text is nearest
  (MaskCLIP, arXiv 2112.01071). It is scored on the patches of objects: a ground has no name.
- Views: an image is mirrored, and its middle enlarged. Where each patch went is known, so the nearest patch of the
  other view is right when it is at most one patch off (as correspondence is scored in Probe3D, arXiv 2404.08636).
  Positions alone, the patches' pixels and an untrained tower are measured too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import PositiveInt
from torch import Tensor

from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import ImageSet
from openvision.evaluation.data.masks import GROUND, WORD, Truth, open_masks
from openvision.evaluation.data.options import open_images
from openvision.evaluation.data.prompts import classifier, protocol
from openvision.evaluation.evaluators.base import Evaluator, Measured
from openvision.evaluation.evaluators.model import EvaluatedModel, Features
from openvision.evaluation.evaluators.patch_probe import pixels_of_patches, present_iou, refuse_native
from openvision.evaluation.metrics.bootstrap import Outcomes, interval
from openvision.runtime import send

# Side of the middle that a view enlarges, against the image's.
MIDDLE = 0.75
# How far, in patches, the nearest patch may be from the right place.
TOLERANCE = 1.0


class TextPatches(Evaluator):
    """`miou` and `accuracy` of the patches of objects, averaged over images, and `majority_miou`."""

    needs_one_grid: ClassVar[bool] = True
    kind: Literal["text_patches"] = "text_patches"
    limit: PositiveInt | None = 400
    """Images to measure on."""
    mask: str = "mask_png"
    """Json field with the mask, a PNG in base64: 0 ground, 1, 2, ... the objects, 255 a printed word."""
    objects: str = "objects"
    """Json field with the names of the objects of the mask, in order."""
    prompts: str | tuple[str, ...] = "plain"
    """How a name becomes texts: as in `zero_shot`."""

    def measure(self, model: EvaluatedModel, root: str | Path) -> Measured:
        """Name every patch of an object by the nearest text."""
        refuse_native(self.kind, model)
        data = open_masks(self.data, root, self.mask, self.objects, self.limit)
        names = sorted({name for own in data.objects for name in own})
        how = protocol(self.prompts, None if "://" in str(root) else Path(root))
        texts = torch.from_numpy(classifier(model.texts, names, how))
        vision = model.vision

        def nearest(batch: Tensor) -> Tensor:
            patches = vision.embed_patches(vision.forward_features(batch).patch_tokens).float()
            return (patches @ send(texts, patches.device).T).argmax(dim=2).float()

        rows, found = model.map_images(data.images, (model.grid[0] * model.grid[1],), nearest)
        answers, beyond = found.astype(np.int64), 2
        truth = data.truth(rows, [GROUND, WORD, *names], model.grid) - beyond
        shown = truth >= 0
        kept = np.flatnonzero(shown.any(axis=1))
        if not len(kept):
            raise OpenVisionError(f"{self.data}: no patch shows an object; measure at a larger --resolution")
        most = np.full_like(truth, np.bincount(truth[shown]).argmax())
        result = Measured(data={data.images.name: data.images.identity})
        result.add("miou", Outcomes.of(_iou(answers, truth, shown, kept), rows[kept]))
        right = np.array([(answers == truth)[row][shown[row]].mean() for row in kept])
        result.add("accuracy", Outcomes.of(right, rows[kept]))
        result.values["majority_miou"] = float(_iou(most, truth, shown, kept).mean())
        result.facts = {"images": len(kept), "classes": len(names), "patches": int(shown.sum()), "prompts": how.name}
        return result


def _iou(answers: Truth, truth: Truth, shown: NDArray[np.bool_], kept: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean IoU of the classes of each image `kept`, over its patches that are `shown`."""
    return np.array([present_iou(answers[row][None, shown[row]], truth[row][None, shown[row]])[0] for row in kept])


class Correspondence(Evaluator):
    """`correspondence`: share of patches found again, averaged over images, and that of three baselines."""

    needs_text: ClassVar[bool] = False
    needs_one_grid: ClassVar[bool] = True
    kind: Literal["correspondence"] = "correspondence"
    limit: PositiveInt | None = 400
    """Images to measure on."""
    mask: str | None = None
    """Json field with the mask, as of `patch_probe`: then patches of the ground, which are alike, do not count."""
    objects: str = "objects"
    """Json field with the names of the objects of the mask, in order."""

    def measure(self, model: EvaluatedModel, root: str | Path) -> Measured:
        """Look for the patches of a view among those of the image."""
        refuse_native(self.kind, model)
        images = open_images(self.data, root, self.limit)
        result = Measured(data={images.name: images.identity})
        expected = expected_places(model.grid, model.vision.config.patch_size, model.pixels)
        rows, counted = self._counted(model, images, root, expected)
        for prefix, subject in (("", model), ("pixels_", model), ("untrained_", model.untrained())):
            read = _pixels_of(subject) if prefix == "pixels_" else _tokens_of(subject)
            same, views = _both_views(subject, images, read)
            found = np.stack([nearest_patches(*pair) for pair in zip(same, views, strict=True)])
            outcomes = Outcomes.of(_shares(is_near(found, expected, model.grid), counted), rows)
            if prefix:
                result.values[f"{prefix}correspondence"] = outcomes.mean
                result.intervals[f"{prefix}correspondence"] = interval(outcomes)
            else:
                result.add("correspondence", outcomes)
        still = np.broadcast_to(is_near(np.arange(len(expected)), expected, model.grid), counted.shape)
        result.values["same_place_correspondence"] = float(_shares(still, counted).mean())
        result.facts = {"images": len(rows), "patches": int(counted.sum()), "tolerance": TOLERANCE}
        return result

    def _counted(
        self, model: EvaluatedModel, images: ImageSet, root: str | Path, expected: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Rows (r,) of the images that can be decoded, and which patches of their views count, (r, N)."""
        rows, _ = model.map_images(images, (1,), lambda batch: batch.new_zeros(len(batch), 1))
        if self.mask is None:
            return rows, np.ones((len(rows), len(expected)), dtype=np.bool_)
        masks = open_masks(self.data, root, self.mask, self.objects, self.limit)
        names = sorted({name for own in masks.objects for name in own})
        truth = masks.truth(rows, [GROUND, WORD, *names], model.grid)
        place = np.clip(np.rint(expected).astype(np.int64), 0, np.array(model.grid) - 1)
        return rows, truth[:, place[:, 0] * model.grid[1] + place[:, 1]] > 0


Compute = Callable[[Tensor], Tensor]


def other_view(images: Tensor) -> Tensor:
    """uint8 (B, 3, R, R) -> the same shape: the middle, mirrored and enlarged to the whole."""
    side = round(images.shape[-1] * MIDDLE)
    first = (images.shape[-1] - side) // 2
    middle = images[..., first : first + side, first : first + side].flip(-1).float()
    larger = F.interpolate(middle, images.shape[-2:], mode="bilinear", align_corners=False)
    return larger.round().clamp(0, 255).to(torch.uint8)


def expected_places(grid: tuple[int, int], patch: int, pixels: int) -> NDArray[np.float64]:
    """Where the middle of each patch of the view is in the image: row and column in patches, (N, 2)."""
    side = round(pixels * MIDDLE)
    first, scale = (pixels - side) // 2, side / pixels
    rows, columns = ((np.arange(count) + 0.5) * patch for count in grid)
    y, x = first + rows * scale, first + (pixels - columns) * scale
    return np.stack(np.meshgrid(y / patch - 0.5, x / patch - 0.5, indexing="ij"), axis=-1).reshape(-1, 2)


def nearest_patches(tokens: Features, views: Features) -> NDArray[np.int64]:
    """For each patch of a view (N, D) the patch (N, D) of the image with the largest cosine, (N,)."""
    image, view = (one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-8) for one in (tokens, views))
    return (view @ image.T).argmax(axis=1)


def is_near(found: NDArray[np.int64], expected: NDArray[np.float64], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Whether patches (..., N) are at most one patch off their expected places (N, 2), in rows and in columns."""
    row, column = np.divmod(found, grid[1])
    off = np.maximum(np.abs(row - expected[:, 0]), np.abs(column - expected[:, 1]))
    return off <= TOLERANCE


def _shares(right: NDArray[np.bool_], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Share of the counted patches that are right, (r,); an image of which none counts is all right."""
    return np.where(counted.any(axis=1), (right & counted).sum(axis=1) / np.maximum(counted.sum(axis=1), 1), 1.0)


def _both_views(model: EvaluatedModel, images: ImageSet, read: Compute) -> tuple[Features, Features]:
    """Features of the patches of the images and of their views, (r, N, D) each."""
    patches = model.grid[0] * model.grid[1]
    width = read(torch.zeros(1, 3, model.pixels, model.pixels, dtype=torch.uint8, device=model.device)).shape[-1]
    _, found = model.map_images(
        images, (2 * patches, width), lambda batch: torch.cat([read(batch), read(other_view(batch))], dim=1)
    )
    return found[:, :patches], found[:, patches:]


def _tokens_of(model: EvaluatedModel) -> Compute:
    @torch.inference_mode()
    def read(batch: Tensor) -> Tensor:
        return model.vision.forward_features(batch).patch_tokens.float()

    return read


def _pixels_of(model: EvaluatedModel) -> Compute:
    return lambda batch: pixels_of_patches(batch, model.grid, model.vision.config.patch_size)
