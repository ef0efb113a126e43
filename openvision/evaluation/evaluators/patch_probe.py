"""Patch-token probe: what does a patch show? A logistic regression on the frozen patch tokens.

- Without masks, on drawings on one ground, the truth is in the pixels: a patch counts as drawing when at least half of
  its pixels differ from the ground. Nothing needs to be labelled, and an encoder that loses where things are cannot
  pass.
- With masks a patch shows what covers most of it: the ground, one of the named objects, or a printed word. The nearest
  training patches answer too, and so do the patches' own pixels and an untrained tower.
"""

from collections.abc import Callable
from functools import partial
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
from openvision.evaluation.data.masks import GROUND, WORD, Masks, Truth, open_masks
from openvision.evaluation.data.options import open_images
from openvision.evaluation.evaluators.base import Measured, TrainedEvaluator
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.metrics.bootstrap import Outcomes, interval
from openvision.evaluation.metrics.linear import LinearModel, fit_logistic
from openvision.evaluation.metrics.probes import NEIGHBOURS, nearest_neighbours

# A channel that differs by no more is still ground: antialiasing and JPEG leave traces.
TOLERANCE = 12
# Patches are baselines at so many pixels a side at most.
_PATCH_PIXELS = 8

Tokens = NDArray[np.float32]


def refuse_native(kind: str, model: EvaluatedModel) -> None:
    """Raise OpenVisionError for images of several grids."""
    if model.preprocessing == "native":
        raise OpenVisionError(f"{kind} compares patches of one grid: measure it without --native")


class PatchProbe(TrainedEvaluator):
    """`patch_accuracy` and `miou` (mean IoU of drawing and ground), both averaged over images.

    With `mask`: `linear_miou`, `knn_miou` (mean IoU of what is in an image, averaged over images), `linear_accuracy`,
    the first two of `pixels` and `untrained`, and `majority_miou`.
    """

    needs_text: ClassVar[bool] = False
    needs_one_grid: ClassVar[bool] = True
    kind: Literal["patch_probe"] = "patch_probe"
    limit: PositiveInt | None = 400
    """Images to measure on."""
    train_limit: PositiveInt = 200
    """Images to learn from."""
    ground: tuple[int, int, int] = (255, 255, 255)
    """Colour of the background, RGB; without `mask`."""
    strength: float = 0.1
    """C of the logistic regression."""
    mask: str | None = None
    """Json field with the mask, a PNG in base64: 0 ground, 1, 2, ... the objects, 255 a printed word."""
    objects: str = "objects"
    """Json field with the names of the objects of the mask, in order."""
    train_patches: PositiveInt = 10_000
    """With `mask`: learn from so many patches at most."""

    def measure(self, model: EvaluatedModel, root: str | Path) -> Measured:
        """Learn from patches of `train`, answer for those of `data`."""
        refuse_native(self.kind, model)
        return self._measure_drawn(model, root) if self.mask is None else self._measure_masks(model, root)

    def _measure_drawn(self, model: EvaluatedModel, root: str | Path) -> Measured:
        result = Measured()
        known, truth, _ = self._drawn_patches(model, self.train, root, self.train_limit, result)
        tokens, asked, rows = self._drawn_patches(model, self.data, root, self.limit, result)
        if truth.min() == truth.max():
            raise OpenVisionError(
                f"every patch of {self.train} is {'drawing' if truth.all() else 'ground'}; is `ground` its background?"
            )
        flat = known.reshape(-1, known.shape[-1])
        (probe,) = fit_logistic(flat, truth.reshape(-1).astype(np.int64), [self.strength], model.device)
        scores = probe.scores(tokens.reshape(-1, tokens.shape[-1]))
        answers = scores.argmax(axis=1).reshape(asked.shape) > 0
        result.add("patch_accuracy", Outcomes.of((answers == asked).mean(axis=1), rows))
        result.add("miou", Outcomes.of(mean_iou(answers, asked), rows))
        majority = np.full_like(asked, asked.mean() >= 0.5)
        result.facts = {
            "images": len(rows),
            "patches": int(asked.shape[1]),
            "drawing": float(asked.mean()),
            "miou_majority": float(mean_iou(majority, asked).mean()),
        }
        return result

    def _drawn_patches(
        self, model: EvaluatedModel, data: str, root: str | Path, limit: int | None, result: Measured
    ) -> tuple[Tokens, NDArray[np.bool_], NDArray[np.int64]]:
        """Tokens (n, N, D), whether each patch is drawing (n, N), and the numbers of the n images."""
        images = open_images(data, root, limit)
        result.data[images.name] = images.identity
        vision = model.vision
        rows, columns = vision.config.grid(model.pixels, model.pixels)

        def tokens_and_truth(batch: Tensor) -> Tensor:
            tokens = vision.forward_features(batch).patch_tokens.float()
            truth = torch.from_numpy(drawn(batch.cpu().numpy(), self.ground, vision.config.patch_size))
            return torch.cat([tokens, truth.to(tokens)[..., None]], dim=2)

        kept, found = model.map_images(images, (rows * columns, vision.config.width + 1), tokens_and_truth)
        return found[..., :-1], found[..., -1] > 0, kept

    def _measure_masks(self, model: EvaluatedModel, root: str | Path) -> Measured:
        known = open_masks(self.train, root, self.mask or "", self.objects, self.train_limit)
        asked = open_masks(self.data, root, self.mask or "", self.objects, self.limit)
        names = [GROUND, WORD, *sorted({name for one in (known, asked) for own in one.objects for name in own})]
        result = Measured(data={one.images.name: one.images.identity for one in (asked, known)})
        for prefix, subject in (("", model), ("pixels_", model), ("untrained_", model.untrained())):
            read = patch_pixels if prefix == "pixels_" else patch_tokens
            key = ("patches", prefix, known.images.identity, self.train_patches, self.strength, tuple(names))
            learn = partial(self._learn, subject, known, names, read)
            probe, bank, labels = subject.keep(key, learn)
            rows, tokens = read(subject, asked.images)
            truth = asked.truth(rows, names, subject.grid)
            flat = tokens.reshape(-1, tokens.shape[-1])
            linear = probe.scores(flat).argmax(axis=1).reshape(truth.shape)
            near = nearest_neighbours(bank, labels, flat, NEIGHBOURS).reshape(truth.shape)
            found = {
                "linear_miou": Outcomes.of(present_iou(linear, truth), rows),
                "knn_miou": Outcomes.of(present_iou(near, truth), rows),
                "linear_accuracy": Outcomes.of((linear == truth).mean(axis=1), rows),
            }
            for metric, outcomes in found.items():
                if not prefix:
                    result.add(metric, outcomes)
                elif metric != "linear_accuracy":
                    result.values[prefix + metric] = outcomes.mean
                    result.intervals[prefix + metric] = interval(outcomes)
            if not prefix:
                most = np.full_like(truth, np.bincount(labels).argmax())
                result.values["majority_miou"] = float(present_iou(most, truth).mean())
                result.facts = {"images": len(rows), "patches": int(truth.shape[1]), "classes": len(names)}
                result.facts |= {"train_patches": len(labels), "ground": float((truth == 0).mean())}
        return result

    def _learn(
        self, model: EvaluatedModel, known: Masks, names: list[str], read: "Read"
    ) -> tuple[LinearModel, Tokens, Truth]:
        """The probe, and the patches that neighbours are looked for among, with their classes."""
        rows, tokens = read(model, known.images)
        truth = known.truth(rows, names, model.grid).reshape(-1)
        chosen = np.random.default_rng(0).permutation(len(truth))[: self.train_patches]
        bank, labels = tokens.reshape(-1, tokens.shape[-1])[chosen], truth[chosen]
        (probe,) = fit_logistic(bank, labels, [self.strength], model.device, len(names))
        return probe, bank, labels


def patch_tokens(model: EvaluatedModel, images: ImageSet) -> tuple[NDArray[np.int64], Tokens]:
    """Numbers of the images that can be decoded (r,), and their patch tokens (r, N, D)."""
    shape = model.grid[0] * model.grid[1], model.vision.config.width
    return model.map_images(images, shape, lambda batch: model.vision.forward_features(batch).patch_tokens.float())


def patch_pixels(model: EvaluatedModel, images: ImageSet) -> tuple[NDArray[np.int64], Tokens]:
    """Numbers of the images that can be decoded (r,), and the pixels of their patches, 0 to 1, (r, N, 3 * side^2)."""
    grid, patch = model.grid, model.vision.config.patch_size
    shape = grid[0] * grid[1], 3 * min(patch, _PATCH_PIXELS) ** 2
    return model.map_images(images, shape, lambda batch: pixels_of_patches(batch, grid, patch))


def pixels_of_patches(batch: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """uint8 (B, 3, H, W) -> pixels of each patch, 0 to 1, averaged to `_PATCH_PIXELS` a side at most, (B, N, C)."""
    (rows, columns), side = grid, min(patch, _PATCH_PIXELS)
    whole = batch[..., : rows * patch, : columns * patch].float() / 255
    small = F.adaptive_avg_pool2d(whole, (rows * side, columns * side))
    return F.pixel_unshuffle(small, side).flatten(2).transpose(1, 2)


Read = Callable[[EvaluatedModel, ImageSet], tuple[NDArray[np.int64], Tokens]]


def drawn(images: NDArray[np.uint8], ground: tuple[int, int, int], patch: int) -> NDArray[np.bool_]:
    """Whether at least half of each patch's pixels differ from `ground`: uint8 (n, 3, H, W) -> (n, N)."""
    off = np.abs(images.astype(np.int16) - np.array(ground, dtype=np.int16)[:, None, None]).max(axis=1) > TOLERANCE
    rows, columns = off.shape[1] // patch, off.shape[2] // patch
    blocks = off[:, : rows * patch, : columns * patch].reshape(len(off), rows, patch, columns, patch)
    return (blocks.mean(axis=(2, 4)) >= 0.5).reshape(len(off), rows * columns)


def mean_iou(answers: NDArray[np.bool_], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean of the IoUs of drawing and of ground for every image, (n,); a kind that is nowhere counts as found."""
    ious = []
    for kind in (True, False):
        both = ((answers == kind) & (truth == kind)).sum(axis=1)
        either = ((answers == kind) | (truth == kind)).sum(axis=1)
        ious.append(np.where(either > 0, both / np.maximum(either, 1), 1.0))
    return np.mean(ious, axis=0)


def present_iou(answers: Truth, truth: Truth) -> NDArray[np.float64]:
    """Mean, for every image, of the IoUs of the classes that are in it: class numbers (n, N) both -> (n,)."""
    found = np.empty(len(truth))
    for row, (given, own) in enumerate(zip(answers, truth, strict=True)):
        kinds = np.unique(own)[:, None]
        right, asked = given == kinds, own == kinds
        found[row] = ((right & asked).sum(axis=1) / (right | asked).sum(axis=1)).mean()
    return found
