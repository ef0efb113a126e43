"""The objectives of training: how a batch goes through the model and which losses come out (spec sections 5 and 9).

An objective keeps apart what couples the samples of a batch (embeddings, which are contrasted with each other) and what
does not (the caption of each sample): that is all gradient caching has to know.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from openvision.data.batch import Batch
from openvision.frozen.autoencoder import as_signed
from openvision.frozen.perceptual import open_perceptual
from openvision.models.decoders.autoregressive import teacher_forcing_ids
from openvision.models.decoders.lengths import Lengths
from openvision.models.layers import Block
from openvision.models.openvision import OpenVision, OpenVisionOutput
from openvision.models.openvision2 import random_patches
from openvision.models.openvision3 import OpenVision3, OpenVision3Output
from openvision.models.protocols import CaptioningModel, ContrastiveModel
from openvision.objectives.caption import caption_loss
from openvision.objectives.contrastive import contrastive_losses, count_equal, joint_info_nce, text_groups
from openvision.objectives.reconstruction import latent_loss, pixel_losses
from openvision.objectives.sigmoid import sigmoid_losses
from openvision.recipe.sections import Loss, Reconstruction, Stage
from openvision.runtime import HostCopy, send
from openvision.training.randomness import SampleRandomness
from openvision.training.setup.parallel import DistributedModel

Terms = dict[str, Tensor]
"""Losses and other scalars by name, shape () each."""
Embeds = tuple[Tensor, ...]
Text = Literal["alt", "sentence"]


class Losses:
    """Scalars of one step by name, on the device; `total` is what is differentiated."""

    def __init__(self, total: Tensor, terms: Mapping[str, Tensor]) -> None:
        self.total = total
        self.terms: Terms = {"loss": total.detach(), **{name: term.detach() for name, term in terms.items()}}

    def finite(self) -> Tensor:
        """Whether each term is neither NaN nor infinite, bool (terms,)."""
        return torch.stack([term.isfinite() for term in self.terms.values()])

    def not_finite(self) -> list[str]:
        """Names of the terms that are NaN or infinite; this waits for the device."""
        return [name for name, finite in zip(self.terms, self.finite().tolist(), strict=True) if not finite]

    def values(self) -> dict[str, float]:
        """The terms as numbers; this waits for the device."""
        names, terms = list(self.terms), torch.stack([term.float() for term in self.terms.values()])
        return dict(zip(names, HostCopy(terms).values(), strict=True))


class Objective(Protocol):
    """A model and its losses, for B samples: a batch or a micro-batch of it."""

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term that enters the total."""
        ...

    @property
    def vision_blocks(self) -> Sequence[Block]:
        """The blocks that stochastic depth applies to."""
        ...

    def embed(self, batch: Batch) -> Embeds:
        """The embeddings that couple the samples, which are their dimension -2; () where nothing does."""
        ...

    def forward(self, batch: Batch, randomness: SampleRandomness, target_tokens: Tensor) -> tuple[Embeds, Terms]:
        """`embed`, and the terms that are sums over samples, divided by the number of `target_tokens`."""
        ...

    def coupled(self, embeds: Embeds, batch: Batch) -> Terms:
        """The terms that the embeddings of all samples of the batch have together, and the logit scale."""
        ...

    def equal_texts(self, batch: Batch) -> Terms:
        """How many texts of the global batch occur in it more than once, by kind; all processes must call it."""
        ...


@dataclass(frozen=True)
class ImageTextObjective:
    """OpenVision 1 and plain CLIP: contrast with each kind of text, and caption where there is a decoder."""

    model: ContrastiveModel | OpenVision3
    loss: Loss
    call: Callable[..., OpenVisionOutput] | None = None
    """Calls the model in `forward`, e.g. DDP around it; None is the model itself."""
    group: dist.ProcessGroup | None = None
    """Processes whose samples are contrasted with each other; None for this one alone."""

    @property
    def weights(self) -> dict[str, float]:
        """Contrast and caption."""
        return {"contrastive": self.loss.contrastive, "caption": self.loss.caption}

    @property
    def vision_blocks(self) -> Sequence[Block]:
        """Those of the vision tower."""
        return _vision_blocks(self.model)

    def embed(self, batch: Batch) -> Embeds:
        """Image embeddings (B, E) and text embeddings (K, B, E), unit vectors."""
        texts = self.texts(batch)
        text_embeds = self.model.encode_text(torch.cat(texts), self.text_lengths(batch)).unflatten(0, (len(texts), -1))
        return self.model.encode_image(batch.images), text_embeds

    def forward(self, batch: Batch, randomness: SampleRandomness, target_tokens: Tensor) -> tuple[Embeds, Terms]:
        """Embeddings, and the caption loss where there is a decoder."""
        return self.terms(self.output(batch), batch, target_tokens)

    def output(self, batch: Batch) -> OpenVisionOutput:
        """What the model makes of the batch."""
        call = self.call or self.model
        return call(
            batch.images,
            *self.texts(batch),
            caption_lengths=_caption_lengths(batch),
            text_lengths=self.text_lengths(batch),
        )

    def terms(self, output: OpenVisionOutput, batch: Batch, target_tokens: Tensor) -> tuple[Embeds, Terms]:
        """What `forward` returns, of the model's output."""
        terms = {}
        if self.model.decoder is not None and output.caption_states is not None:
            terms["caption"] = _caption(output.caption_states, batch, self.model.decoder.head.weight, target_tokens)
        return (output.image_embeds, output.text_embeds), terms

    def coupled(self, embeds: Embeds, batch: Batch) -> Terms:
        """One contrastive loss for each kind of text, their mean, and the logit scale, exp of the parameter.

        Of captions that are right together there is one loss; logit scales and bias are there as the recipe has them.
        """
        image_embeds, text_embeds = embeds
        scale, numbers = self._scale()
        if self.loss.captions == "joint":
            joint = joint_info_nce(image_embeds, text_embeds, scale, group=self.group)
            return {"contrastive_joint": joint, "contrastive": joint, **numbers}
        if self.model.logit_bias is not None:
            numbers["logit_bias"] = bias = self.model.logit_bias
            positives = self.loss.equal_texts == "positives"
            groups = text_groups(torch.stack(self.texts(batch))) if positives else None
            per_text = sigmoid_losses(image_embeds, text_embeds, scale, bias, group=self.group, groups=groups)
        else:
            per_text = contrastive_losses(image_embeds, text_embeds, scale, group=self.group)
        terms = {f"contrastive_{kind}": term for kind, term in zip(self.loss.texts, per_text, strict=True)}
        return terms | {"contrastive": per_text.mean(), **numbers}

    def _scale(self) -> tuple[Tensor, Terms]:
        """The logit scale, (), or that of each kind of text, (K,); and what the log calls them."""
        if self.model.logit_scale_sentence is None:
            scale = self.model.logit_scale.exp()
            return scale, {"logit_scale": scale}
        scales = torch.stack([self.model.log_scale(kind) for kind in self.loss.texts]).exp()
        return scales, {"logit_scale": scales[0], "logit_scale_sentence": scales[1]}

    def equal_texts(self, batch: Batch) -> Terms:
        """The kinds of text that are contrasted."""
        groups = text_groups(torch.stack(self.texts(batch)))
        return {kind: count_equal(own, self.group) for kind, own in zip(self.loss.texts, groups, strict=True)}

    def texts(self, batch: Batch) -> list[Tensor]:
        """Ids (B, context_length) of each kind of text that is contrasted."""
        ids: dict[Text, Tensor] = {"alt": batch.alt_ids, "sentence": batch.sentence_ids}
        return [ids[kind] for kind in self.loss.texts]

    def text_lengths(self, batch: Batch) -> Lengths | None:
        """Lengths of these texts, one kind after the other, (K * B,); None where they are not trimmed."""
        if batch.text_lengths is None:
            return None
        kinds: dict[Text, Tensor] = dict(zip(("alt", "sentence"), batch.text_lengths.unbind(dim=1), strict=True))
        return _on_host(torch.cat([kinds[kind] for kind in self.loss.texts]), batch)


@dataclass(frozen=True)
class CaptionObjective:
    """OpenVision 2 and GenLIP: the caption alone, from a random share of the patches or from all."""

    model: CaptioningModel
    loss: Loss
    bos_id: int
    call: Callable[..., Tensor] | None = None
    """As in ImageTextObjective."""

    @property
    def weights(self) -> dict[str, float]:
        """The caption."""
        return {"caption": self.loss.caption}

    @property
    def vision_blocks(self) -> Sequence[Block]:
        """Those of the vision tower."""
        return _vision_blocks(self.model)

    def embed(self, batch: Batch) -> Embeds:
        """Nothing: captions are predicted one by one."""
        return ()

    def forward(self, batch: Batch, randomness: SampleRandomness, target_tokens: Tensor) -> tuple[Embeds, Terms]:
        """The caption loss, from the patches drawn for these samples."""
        config = self.model.config
        ids = teacher_forcing_ids(batch.labels, self.bos_id)
        keep = None
        if config.keep_ratio is not None:
            rows, columns = config.vision.grid(*batch.images.shape[-2:])
            keep = random_patches(randomness.positions, rows * columns, config.keep_ratio, randomness.seed)
            keep = send(keep, ids.device)
        call = self.call or self.model
        states = call(batch.images, ids, keep, caption_lengths=_caption_lengths(batch))
        return (), {"caption": _caption(states, batch, self.model.decoder.head.weight, target_tokens)}

    def coupled(self, embeds: Embeds, batch: Batch) -> Terms:
        """Nothing."""
        return {}

    def equal_texts(self, batch: Batch) -> Terms:
        """Nothing: no text is an answer for another image."""
        return {}


@dataclass(frozen=True)
class UnifiedObjective:
    """OpenVision 3: contrast, caption token by token, and reconstruct from noisy tokens."""

    model: OpenVision3
    loss: Loss
    bos_id: int
    call: Callable[..., OpenVision3Output] | None = None
    """As in ImageTextObjective."""
    group: dist.ProcessGroup | None = None
    """As in ImageTextObjective."""
    perceptual: float = 0.0
    """lambda of the stage; at 0 the perceptual network is never opened."""

    @property
    def weights(self) -> dict[str, float]:
        """Both terms of understanding, and those of reconstruction times the weight of the branch."""
        branch = self._reconstruction
        weights = {"contrastive": self.loss.contrastive, "caption": self.loss.caption}
        weights |= {"pixels": branch.weight * branch.pixels, "latents": branch.weight * branch.latents}
        return weights | ({"perceptual": branch.weight * self.perceptual} if self.perceptual else {})

    @property
    def vision_blocks(self) -> Sequence[Block]:
        """Those of the vision tower."""
        return _vision_blocks(self.model)

    def embed(self, batch: Batch) -> Embeds:
        """Image embeddings (B, E) and text embeddings (K, B, E), unit vectors."""
        return self._contrast.embed(batch)

    def forward(self, batch: Batch, randomness: SampleRandomness, target_tokens: Tensor) -> tuple[Embeds, Terms]:
        """Embeddings, the caption loss and the reconstruction losses; `token_rms` is what the noise compares with."""
        branch, device = self.model.config.reconstruction, batch.images.device
        rows, columns = self.model.vision.grid_of(batch.images)
        noise = None
        if branch.noise:
            noise = randomness.token_noise(rows * columns, self.model.config.vision.width, branch.noise, device)
        call = self.call or self.model
        output = call(
            batch.images,
            *self._contrast.texts(batch),
            input_ids=teacher_forcing_ids(batch.labels, self.bos_id),
            noise=noise,
            caption_lengths=_caption_lengths(batch),
            text_lengths=self._contrast.text_lengths(batch),
        )
        terms = {
            "caption": _caption(output.caption_states, batch, self.model.decoder.head.weight, target_tokens),
            "latents": randomness.share * latent_loss(output.latents, output.predicted),
            "token_rms": randomness.share * output.token_rms.mean(),
            **self._pixels(batch, randomness, output.predicted),
        }
        return (output.image_embeds, output.text_embeds), terms

    def coupled(self, embeds: Embeds, batch: Batch) -> Terms:
        """As in ImageTextObjective."""
        return self._contrast.coupled(embeds, batch)

    def equal_texts(self, batch: Batch) -> Terms:
        """As in ImageTextObjective."""
        return self._contrast.equal_texts(batch)

    def _pixels(self, batch: Batch, randomness: SampleRandomness, predicted: Tensor) -> Terms:
        """Pixel and perceptual loss, of the samples whose position `pixels_of` divides."""
        config = self.model.config.reconstruction
        images, autoencoder = batch.images, self.model.vision.autoencoder(batch.images.device)
        samples = len(images)
        if config.pixels_of > 1:
            chosen = send(torch.from_numpy((randomness.positions % config.pixels_of == 0).nonzero()[0]), images.device)
            images, predicted = images[chosen], predicted[chosen]
        distance = None
        if self.perceptual:
            distance = open_perceptual(self._reconstruction.perceptual, self._reconstruction.folder).to(images.device)
        sums = pixel_losses(autoencoder.decode, as_signed(images), predicted, distance, config.decoded_at_once)
        # The expected number of samples, not that of this micro-batch: its sums add up to those of the batch.
        pixels, perceptual = (randomness.share * sums * config.pixels_of / samples).unbind()
        return {"pixels": pixels} | ({"perceptual": perceptual} if self.perceptual else {})

    @property
    def _reconstruction(self) -> Reconstruction:
        assert self.loss.reconstruction is not None
        return self.loss.reconstruction

    @property
    def _contrast(self) -> ImageTextObjective:
        return ImageTextObjective(self.model, self.loss, None, self.group)


def of_stage(objective: Objective, stage: Stage) -> Objective:
    """The objective as a stage has it: the weight of the perceptual distance may differ between stages."""
    if isinstance(objective, UnifiedObjective):
        return replace(objective, perceptual=stage.perceptual or 0.0)
    return objective


def build_objective(model: DistributedModel, loss: Loss, bos_id: int) -> Objective:
    """The objective of a model; `bos_id` is the tokenizer's."""
    module = model.module
    if isinstance(module, OpenVision3):
        return UnifiedObjective(module, loss, bos_id, model.ddp, model.processes.group)
    if isinstance(module, OpenVision):
        return ImageTextObjective(module, loss, model.ddp, model.processes.group)
    return CaptionObjective(module, loss, bos_id, model.ddp)


def weighted_losses(weights: Mapping[str, float], terms: Terms) -> Losses:
    """The losses of a batch: the weighted sum of its terms, and the terms."""
    weighted = [weight * terms[name] for name, weight in weights.items() if name in terms]
    return Losses(sum(weighted[1:], start=weighted[0]), terms)


def _vision_blocks(model: ContrastiveModel | CaptioningModel | OpenVision3) -> list[Block]:
    return list(model.vision.blocks)  # pyright: ignore[reportReturnType]


def _caption_lengths(batch: Batch) -> Lengths | None:
    """Positions up to the last target of each caption; None on an accelerator, unless texts are to be trimmed.

    There batches have other shapes then, which may cost more than the positions that are saved.
    """
    mask = batch.label_mask
    if not mask.shape[1] or (batch.images.device.type != "cpu" and batch.text_lengths is None):
        return None
    positions = torch.arange(1, mask.shape[1] + 1)
    return _on_host((mask * positions).amax(dim=1), batch)


def _on_host(lengths: Tensor, batch: Batch) -> Lengths:
    """Lengths in the form that stays on the host, whatever wraps the model."""
    return lengths if batch.images.device.type == "cpu" else lengths.numpy()


def _caption(states: Tensor, batch: Batch, head: Tensor, target_tokens: Tensor) -> Tensor:
    """Cross-entropy of the captions of a micro-batch, divided by the target tokens of the whole batch."""
    return caption_loss(states, batch.labels, batch.label_mask, head, count=target_tokens)
