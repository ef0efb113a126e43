"""Patch-token probe: is a patch drawing or background? A logistic regression on the frozen patch tokens.

On drawings on one ground the truth is in the pixels: a patch counts as drawing when at least half of its pixels differ
from the ground. Nothing needs to be labelled, and an encoder that loses where things are cannot pass.
"""

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from openvision.data.shards.store import join_folder
from openvision.encoding import evaluating
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import Pictures, ShardPictures, folder_of_classes, take
from openvision.evaluation.evaluators.base import Evaluator, Measured
from openvision.evaluation.evaluators.model import Subject, prepared_batches
from openvision.evaluation.metrics.bootstrap import Outcomes
from openvision.evaluation.metrics.probes import Scaling, _fit

# A channel that differs by no more is still ground: antialiasing and JPEG leave traces.
TOLERANCE = 12


class PatchProbe(Evaluator):
    """`patch_accuracy` and `miou` (mean IoU of drawing and ground), both averaged over pictures."""

    needs_text: ClassVar[bool] = False
    kind: Literal["patch_probe"] = "patch_probe"
    train: str
    """Data to learn from, given as `data` is."""
    limit: PositiveInt | None = 400
    """Pictures to be asked about."""
    train_limit: PositiveInt = 200
    """Pictures to learn from."""
    ground: tuple[int, int, int] = (255, 255, 255)
    """Colour of the background, RGB."""
    strength: float = 0.1
    """C of the logistic regression."""

    def missing(self, root: str | Path) -> str | None:
        """The folder to be asked about or the one to learn from."""
        return super().missing(root) or Evaluator.missing(self.model_copy(update={"data": self.train}), root)

    def measure(self, subject: Subject, root: str | Path) -> Measured:
        """Learn from patches of `train`, answer for those of `data`."""
        result = Measured()
        known, truth, _ = self._patches(subject, self._open(self.train, root, self.train_limit, result))
        tokens, asked, rows = self._patches(subject, self._open(self.data, root, self.limit, result))
        if truth.min() == truth.max():
            raise OpenVisionError(
                f"every patch of {self.train} is {'drawing' if truth.all() else 'ground'}; is `ground` its background?"
            )
        flat = known.reshape(-1, known.shape[-1])
        scaling = Scaling.of(flat)
        model = _fit(scaling(flat), truth.reshape(-1).astype(np.int64), self.strength)
        answers = model.predict(scaling(tokens.reshape(-1, tokens.shape[-1]))).reshape(asked.shape).astype(np.bool_)
        result.add("patch_accuracy", Outcomes.of((answers == asked).mean(axis=1), rows))
        result.add("miou", Outcomes.of(mean_iou(answers, asked), rows))
        majority = np.full_like(asked, asked.mean() >= 0.5)
        result.facts = {
            "pictures": len(rows),
            "patches": int(asked.shape[1]),
            "drawing": float(asked.mean()),
            "miou_majority": float(mean_iou(majority, asked).mean()),
        }
        return result

    def _open(self, data: str, root: str | Path, limit: int | None, result: Measured) -> Pictures:
        place = join_folder(root, data)
        shards = "://" in str(place) or any(Path(place).glob("*.tar"))
        pictures = ShardPictures(place).pictures() if shards else folder_of_classes(Path(place)).pictures
        result.data[pictures.name] = pictures.identity
        if limit is None or limit >= len(pictures):
            return pictures
        return take(pictures, np.linspace(0, len(pictures) - 1, limit).round().astype(int))

    def _patches(
        self, subject: Subject, pictures: Pictures
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]:
        """Tokens (n, N, D), whether each patch is drawing (n, N), and the numbers of the n pictures."""
        mine = subject.processes.rows(len(pictures))
        grid = subject.vision.config.grid(subject.pixels, subject.pixels)
        count = grid[0] * grid[1]
        tokens = np.zeros((len(mine), count, subject.vision.config.width), dtype=np.float32)
        truth = np.zeros((len(mine), count), dtype=np.bool_)
        good = np.zeros(len(mine), dtype=np.bool_)
        with evaluating(subject.vision) as device:
            for places, batch in prepared_batches(pictures, mine, subject):
                features = subject.vision.forward_features(batch.to(device))
                tokens[places] = features.patch_tokens.float().cpu().numpy()
                truth[places] = drawn(batch.numpy(), self.ground, subject.vision.config.patch_size)
                good[places] = True
        gather = subject.processes.gather_rows
        kept = np.flatnonzero(gather(good, len(pictures)))
        if not len(kept):
            raise OpenVisionError(f"none of the pictures of {pictures.name} can be decoded")
        return gather(tokens, len(pictures))[kept], gather(truth, len(pictures))[kept], kept


def drawn(images: NDArray[np.uint8], ground: tuple[int, int, int], patch: int) -> NDArray[np.bool_]:
    """uint8 (n, 3, H, W) -> whether at least half of a patch's pixels differ from the ground, (n, N), row-major."""
    off = np.abs(images.astype(np.int16) - np.array(ground, dtype=np.int16)[:, None, None]).max(axis=1) > TOLERANCE
    rows, columns = off.shape[1] // patch, off.shape[2] // patch
    blocks = off[:, : rows * patch, : columns * patch].reshape(len(off), rows, patch, columns, patch)
    return (blocks.mean(axis=(2, 4)) >= 0.5).reshape(len(off), rows * columns)


def mean_iou(answers: NDArray[np.bool_], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean of the IoUs of drawing and of ground for every picture, (n,); a kind that is nowhere counts as found."""
    ious = []
    for kind in (True, False):
        both = ((answers == kind) & (truth == kind)).sum(axis=1)
        either = ((answers == kind) | (truth == kind)).sum(axis=1)
        ious.append(np.where(either > 0, both / np.maximum(either, 1), 1.0))
    return np.mean(ious, axis=0)
