"""What a model is trained for: how a batch goes in and which losses come out (spec sections 5 and 9).

An objective says apart what couples the samples of a batch (embeddings, which are contrasted with each other) and what
does not (the caption of each): that is all gradient caching has to know.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from openvision.data.loader import Batch
from openvision.models.autoregressive import teacher_forcing_ids
from openvision.models.layers import Block
from openvision.models.openvision import OpenVision
from openvision.models.openvision2 import OpenVision2, OpenVision2Config, random_patches
from openvision.objectives.caption import caption_loss
from openvision.objectives.contrastive import contrastive_losses
from openvision.recipe.schema import Loss, Recipe
from openvision.training.losses import Losses, Terms
from openvision.training.randomness import Draws

Embeds = tuple[Tensor, ...]


class Objective(Protocol):
    """How a model is trained; B samples of a batch, or of a chunk of it."""

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term that enters the total."""
        ...

    def embed(self, model: Any, batch: Batch) -> Embeds:
        """What couples the samples, each tensor with the samples along its dimension -2; () where nothing does."""
        ...

    def forward(self, model: Any, batch: Batch, draws: Draws, count: Tensor) -> tuple[Embeds, Terms]:
        """`embed` and the terms that are sums over samples, divided by `count` target tokens."""
        ...

    def coupled(self, model: Any, embeds: Embeds) -> Terms:
        """The terms that the embeddings of all samples have together, and the temperature."""
        ...


@dataclass(frozen=True)
class ImageTextObjective:
    """OpenVision 1 and plain CLIP: contrast with each kind of text, and caption where there is a decoder."""

    recipe: Loss
    group: Any = None
    """Processes whose samples are contrasted with each other; None for this one alone."""

    @property
    def weights(self) -> dict[str, float]:
        """Contrast and caption."""
        return {"contrastive": self.recipe.contrastive, "caption": self.recipe.caption}

    def embed(self, model: OpenVision, batch: Batch) -> Embeds:
        """Image embeddings (B, E) and text embeddings (K, B, E), unit vectors."""
        texts = self._texts(batch)
        text_embeds = model.encode_text(torch.cat(texts)).unflatten(0, (len(texts), -1))
        return model.encode_image(batch.images), text_embeds

    def forward(self, model: OpenVision, batch: Batch, draws: Draws, count: Tensor) -> tuple[Embeds, Terms]:
        """Embeddings, and the caption loss where there is a decoder."""
        output = model(batch.images, *self._texts(batch), caption_lengths=_lengths(batch))
        terms = {}
        if model.decoder is not None:
            head = model.decoder.head.weight
            terms["caption"] = _caption(output.caption_states, batch, head, count)
        return (output.image_embeds, output.text_embeds), terms

    def coupled(self, model: OpenVision, embeds: Embeds) -> Terms:
        """One contrastive loss for each kind of text, their mean, and the temperature."""
        image_embeds, text_embeds = embeds
        scale = model.logit_scale.exp()
        per_kind = contrastive_losses(image_embeds, text_embeds, scale, group=self.group)
        terms = {f"contrastive_{kind}": term for kind, term in zip(self.recipe.texts, per_kind, strict=True)}
        return terms | {"contrastive": per_kind.mean(), "temperature": scale}

    def _texts(self, batch: Batch) -> list[Tensor]:
        ids = {"alt": batch.alt_ids, "sentence": batch.sentence_ids}
        return [ids[kind] for kind in self.recipe.texts]


@dataclass(frozen=True)
class CaptionObjective:
    """OpenVision 2: the caption alone, from a random share of the patches."""

    recipe: Loss
    bos_id: int

    @property
    def weights(self) -> dict[str, float]:
        """The caption."""
        return {"caption": self.recipe.caption}

    def embed(self, model: OpenVision2, batch: Batch) -> Embeds:
        """Nothing: captions are predicted one by one."""
        return ()

    def forward(self, model: OpenVision2, batch: Batch, draws: Draws, count: Tensor) -> tuple[Embeds, Terms]:
        """The caption loss, with the patches drawn for these samples."""
        config = model.config
        rows, columns = config.vision.grid(*batch.images.shape[-2:])
        keep = random_patches(draws.positions, rows * columns, config.keep_ratio, draws.seed)
        ids = teacher_forcing_ids(batch.labels, self.bos_id)
        keep = keep.to(ids.device, non_blocking=True)
        states = model(batch.images, ids, keep, caption_lengths=_lengths(batch))
        return (), {"caption": _caption(states, batch, model.decoder.head.weight, count)}

    def coupled(self, model: OpenVision2, embeds: Embeds) -> Terms:
        """Nothing."""
        return {}


def build_objective(recipe: Recipe, bos_id: int, group: Any = None) -> Objective:
    """The objective that fits the recipe's model; `bos_id` is the tokenizer's, `group` the processes of the run."""
    if isinstance(recipe.model, OpenVision2Config):
        return CaptionObjective(recipe.loss, bos_id)
    return ImageTextObjective(recipe.loss, group)


def total(objective: Objective, terms: Terms) -> Losses:
    """Weigh the terms."""
    weighed = [weight * terms[name] for name, weight in objective.weights.items() if name in terms]
    return Losses(sum(weighed[1:], start=weighed[0]), terms)


def vision_blocks(model: Any) -> Sequence[Block]:
    """The blocks of the vision tower, which stochastic depth applies to."""
    return list(model.vision.blocks)


def _lengths(batch: Batch) -> Tensor | None:
    """Positions up to the last target of each caption; None where reading them would make an accelerator wait."""
    mask = batch.label_mask
    if mask.device.type != "cpu" or not mask.shape[1]:
        return None
    positions = torch.arange(1, mask.shape[1] + 1)
    return (mask * positions).amax(dim=1)


def _caption(states: Tensor, batch: Batch, head: Tensor, count: Tensor) -> Tensor:
    """Cross-entropy of this batch's captions, divided by the target tokens of the batch it is part of."""
    return caption_loss(states, batch.labels, batch.label_mask, head, count=count)
