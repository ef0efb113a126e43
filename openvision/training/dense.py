"""The dense objective: a student predicts an averaged tower's features of patches that it does not see.

Beside its own losses the student reads each image once more with a share of its patches replaced by a learned token,
and a small head predicts what an exponential moving average of the student's tower makes of these patches (iBOT, arXiv
2111.07832, and data2vec, arXiv 2202.03555; beside contrast with texts in TIPS, arXiv 2410.16512).

The averaged tower, the token and the head are parameters of the run, not of the model: checkpoints hold them, so that a
resumed run is the uninterrupted one, and they are left out of what is evaluated and written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from openvision.data.batch import Batch
from openvision.models.layers import Block, LayerNorm
from openvision.models.openvision2 import random_patches
from openvision.models.vision import MaskedPatches, VisionConfig, VisionTransformer
from openvision.objectives.distillation import cosine_distance
from openvision.objectives.masked_prediction import patch_targets
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
    """The averaged tower, the token that stands for a masked patch, and the head that predicts."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        # Nobody pools what it sees.
        self.averaged = VisionTransformer(replace(vision, pool="mean"), None).requires_grad_(False)
        self.mask_token = nn.Parameter(torch.empty(vision.width))
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
        nn.init.normal_(self.mask_token, std=0.02)

    @torch.no_grad()
    def follow(self, vision: VisionTransformer, decay: float) -> None:
        """average = decay * average + (1 - decay) * parameter, for each parameter of the student's tower."""
        trained = dict(vision.named_parameters())
        averages = dict(self.averaged.named_parameters())
        torch._foreach_lerp_(list(averages.values()), [trained[name].detach() for name in averages], 1 - decay)


@dataclass(frozen=True)
class DenseObjective:
    """An objective, and the masked prediction of patches beside it."""

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
        rows, columns = self.vision.grid_of(images)
        drawn = random_patches(randomness.positions, rows * columns, self.table.mask, randomness.seed ^ _STREAM)
        hidden = send(drawn, images.device)
        mask = torch.zeros(len(images), rows * columns, dtype=torch.bool, device=images.device)
        masked = MaskedPatches(mask.scatter(1, hidden, True), self.predictor.mask_token)
        predicted = self.predictor.head(self.vision.patch_tokens(images, hidden, masked))
        with torch.no_grad():
            targets = patch_targets(self.predictor.averaged.patch_tokens(images))
            targets = targets.gather(1, hidden[..., None].expand(-1, -1, targets.shape[-1]))
        share = torch.full((len(images),), randomness.share / len(images), device=images.device)
        return cosine_distance(predicted, targets, share)


def with_dense(objective: Objective, model: DistributedModel, table: Dense | None) -> Objective:
    """The objective with what [dense] adds to it; itself without the table."""
    if table is None:
        return objective
    predictor = model.module.get_submodule(PREDICTOR)
    assert isinstance(predictor, DensePredictor)
    return DenseObjective(objective, model.module.vision, predictor, table)
