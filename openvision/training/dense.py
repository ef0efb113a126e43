"""The dense objective: a student predicts an averaged tower's features of patches that it sees worse, or not at all.

Beside its own losses the student reads each image once more, and a small head predicts what an exponential moving
average of the student's tower makes of its patches. Two kinds:

- masked: a share of the patches is replaced by a learned token, and these are predicted (iBOT, arXiv 2111.07832, and
  data2vec, arXiv 2202.03555; beside contrast with texts in TIPS, arXiv 2410.16512);
- crops: the student reads a part of the image, drawn to half of the image's side, and predicts what the average, which
  reads the image, has at the places of the crop's patches (DINO's local crops, arXiv 2104.14294, and SILC, arXiv
  2310.13355, predict one vector from a crop; here it is patch by patch, as in VICRegL, arXiv 2210.01571).

The averaged tower, the token and the head are parameters of the run, not of the model: checkpoints hold them, so that a
resumed run is the uninterrupted one, and they are left out of what is evaluated and written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from openvision.data.batch import Batch
from openvision.models.layers import Block, LayerNorm
from openvision.models.openvision2 import random_patches
from openvision.models.vision import MaskedPatches, VisionConfig, VisionTransformer
from openvision.objectives.dense import crop_boxes, crop_grid, patch_targets, read_crops
from openvision.objectives.distillation import cosine_distance
from openvision.recipe.sections import Dense
from openvision.runtime import send
from openvision.training.objective import Embeds, Objective, Terms
from openvision.training.randomness import SampleRandomness
from openvision.training.setup.parallel import DistributedModel

PREDICTOR = "dense"
"""Name of the predictor among the modules of a model in training."""
# Masks are drawn apart from the patches that the decoder of OpenVision 2 reads.
_STREAM = 0x6D61736B


class DensePredictor(nn.Module):
    """The averaged tower, the head that predicts, and for masks the token that stands for a masked patch."""

    def __init__(self, vision: VisionConfig, kind: Literal["masked", "crops"] = "masked") -> None:
        super().__init__()
        # Nobody pools what it sees.
        self.averaged = VisionTransformer(replace(vision, pool="mean"), None).requires_grad_(False)
        self.mask_token = nn.Parameter(torch.empty(vision.width)) if kind == "masked" else None
        # The tokens of the last block have no norm behind them yet.
        self.head = nn.Sequential(
            LayerNorm(vision.width),
            nn.Linear(vision.width, vision.width),
            nn.GELU(),
            nn.Linear(vision.width, vision.width),
        )

    def init_weights(self) -> None:
        """Initialise the token; the average begins with `follow`."""
        self.averaged.init_weights()
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    @torch.no_grad()
    def follow(self, vision: VisionTransformer, decay: float) -> None:
        """average = decay * average + (1 - decay) * parameter, for each parameter of the student's tower."""
        trained = dict(vision.named_parameters())
        averages = dict(self.averaged.named_parameters())
        torch._foreach_lerp_(list(averages.values()), [trained[name].detach() for name in averages], 1 - decay)


@dataclass(frozen=True)
class DenseObjective:
    """An objective, and the prediction of patches beside it."""

    inner: Objective
    vision: VisionTransformer
    predictor: DensePredictor
    table: Dense

    @property
    def weights(self) -> dict[str, float]:
        """Those of the objective, and of the prediction."""
        return self.inner.weights | {"dense": self.table.weight}

    @property
    def vision_blocks(self) -> Sequence[Block]:
        """Those of the student."""
        return self.inner.vision_blocks

    def embed(self, batch: Batch) -> Embeds:
        """As the objective does: the prediction couples no samples."""
        return self.inner.embed(batch)

    def forward(self, batch: Batch, randomness: SampleRandomness, target_tokens: Tensor) -> tuple[Embeds, Terms]:
        """What the objective returns, and the distance of prediction and average: a sum over samples."""
        embeds, terms = self.inner.forward(batch, randomness, target_tokens)
        return embeds, terms | {"dense": self._distance(batch.images, randomness)}

    def coupled(self, embeds: Embeds, batch: Batch) -> Terms:
        """As the objective does."""
        return self.inner.coupled(embeds, batch)

    def equal_texts(self, batch: Batch) -> Terms:
        """As the objective does."""
        return self.inner.equal_texts(batch)

    def follow(self) -> None:
        """Move the average towards the student, after an update; a skipped update still lets it come closer."""
        self.predictor.follow(self.vision, self.table.decay)

    def _distance(self, images: Tensor, randomness: SampleRandomness) -> Tensor:
        read = self._crops if self.table.kind == "crops" else self._masked
        seen, targets = read(images, randomness)
        share = torch.full((len(images),), randomness.share / len(images), device=images.device)
        return cosine_distance(self.predictor.head(seen), targets, share)

    def _masked(self, images: Tensor, randomness: SampleRandomness) -> tuple[Tensor, Tensor]:
        """Tokens and targets (B, K, D) of the K patches of each image that the student does not see."""
        rows, columns = self.vision.grid_of(images)
        drawn = random_patches(randomness.positions, rows * columns, self.table.mask, randomness.seed ^ _STREAM)
        hidden = send(drawn, images.device)
        mask = torch.zeros(len(images), rows * columns, dtype=torch.bool, device=images.device)
        assert self.predictor.mask_token is not None
        masked = MaskedPatches(mask.scatter(1, hidden, True), self.predictor.mask_token)
        targets = self._targets(images)
        chosen = targets.gather(1, hidden[..., None].expand(-1, -1, targets.shape[-1]))
        return self.vision.patch_tokens(images, hidden, masked), chosen

    def _crops(self, images: Tensor, randomness: SampleRandomness) -> tuple[Tensor, Tensor]:
        """Tokens (B, K, D) of a crop's K patches, and targets at their places in the image."""
        rows, columns = self.vision.grid_of(images)
        patch, size = self.vision.config.patch_size, crop_grid((rows, columns))
        boxes = crop_boxes(send(randomness.crop_numbers(), images.device), self.table.crop_area)
        # The tower leaves out what is no whole patch.
        whole = self.vision.inputs(images)[..., : rows * patch, : columns * patch]
        crops = read_crops(whole, boxes, (size[0] * patch, size[1] * patch))
        targets = self._targets(whole).mT.unflatten(2, (rows, columns))
        return self.vision.patch_tokens(crops), read_crops(targets, boxes, size).flatten(2).mT

    @torch.no_grad()
    def _targets(self, images: Tensor) -> Tensor:
        """What the average makes of all patches of images (B, 3, H, W), (B, N, D)."""
        return patch_targets(self.predictor.averaged.patch_tokens(images))


def with_dense(objective: Objective, model: DistributedModel, table: Dense | None) -> Objective:
    """The objective with what [dense] adds to it; itself without the table."""
    if table is None:
        return objective
    predictor = model.module.get_submodule(PREDICTOR)
    assert isinstance(predictor, DensePredictor)
    return DenseObjective(objective, model.module.vision, predictor, table)
