"""Patch-token probe: is a patch drawing or background? A logistic regression on the frozen patch tokens.

On drawings on one ground the truth is in the pixels: a patch counts as drawing when at least half of its pixels differ
from the ground. Nothing needs to be labelled, and an encoder that loses where things are cannot pass.
"""

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt
from torch import Tensor

from openvision.errors import OpenVisionError
from openvision.evaluation.data.options import open_images
from openvision.evaluation.evaluators.base import Measured, TrainedEvaluator
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.metrics.bootstrap import Outcomes
from openvision.evaluation.metrics.probes import Scaling, fit_logistic_regression

# A channel that differs by no more is still ground: antialiasing and JPEG leave traces.
TOLERANCE = 12


class PatchProbe(TrainedEvaluator):
    """`patch_accuracy` and `miou` (mean IoU of drawing and ground), both averaged over images."""

    needs_text: ClassVar[bool] = False
    kind: Literal["patch_probe"] = "patch_probe"
    limit: PositiveInt | None = 400
    """Images to measure on."""
    train_limit: PositiveInt = 200
    """Images to learn from."""
    ground: tuple[int, int, int] = (255, 255, 255)
    """Colour of the background, RGB."""
    strength: float = 0.1
    """C of the logistic regression."""

    def measure(self, model: EvaluatedModel, root: str | Path) -> Measured:
        """Learn from patches of `train`, answer for those of `data`."""
        result = Measured()
        known, truth, _ = self._patches(model, self.train, root, self.train_limit, result)
        tokens, asked, rows = self._patches(model, self.data, root, self.limit, result)
        if truth.min() == truth.max():
            raise OpenVisionError(
                f"every patch of {self.train} is {'drawing' if truth.all() else 'ground'}; is `ground` its background?"
            )
        flat = known.reshape(-1, known.shape[-1])
        scaling = Scaling.of(flat)
        probe = fit_logistic_regression(scaling(flat), truth.reshape(-1).astype(np.int64), self.strength)
        answers = np.asarray(probe.predict(scaling(tokens.reshape(-1, tokens.shape[-1])))).reshape(asked.shape) > 0
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

    def _patches(
        self, model: EvaluatedModel, data: str, root: str | Path, limit: int | None, result: Measured
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]:
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


def drawn(images: NDArray[np.uint8], ground: tuple[int, int, int], patch: int) -> NDArray[np.bool_]:
    """uint8 (n, 3, H, W) -> whether at least half of a patch's pixels differ from the ground, (n, N), row-major."""
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
