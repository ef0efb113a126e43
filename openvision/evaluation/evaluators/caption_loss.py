"""Caption loss: how well a model predicts captions written before, in nats per target token, as in training.

It is what is measured of a model without a text tower, which has no zero-shot classification.
"""

import math
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from openvision.data.shards.store import join_folder
from openvision.encoding import batch_memory, evaluating, require_decoder
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import ImageSet, ShardImages
from openvision.evaluation.evaluators.base import Evaluator, Measured
from openvision.evaluation.evaluators.model import EvaluatedModel, prepared_batches
from openvision.models.decoders.autoregressive import teacher_forcing_ids
from openvision.models.protocols import ContrastiveModel, Model, writes_token_by_token
from openvision.runtime import HostCopy, send
from openvision.text.tokenizer import Tokenizer


class CaptionLoss(Evaluator):
    """`caption_loss` and `caption_perplexity`; every patch is read.

    The target of an image without a synthetic caption is its alt-text, as in training; version 1 reads the true
    alt-text, as in training.
    """

    needs_text: ClassVar[bool] = False
    needs_decoder: ClassVar[bool] = True
    kind: Literal["caption_loss"] = "caption_loss"
    text: str = "synthetic"
    """Json field or member of the shards with the caption."""
    alt: str = "txt"
    """Json field or member of the shards with the alt-text."""
    batch_size: PositiveInt = 16
    """Images whose logits over the vocabulary are held at a time."""

    def measure(self, model: EvaluatedModel, root: str | Path) -> Measured:
        """Mean cross-entropy of all target tokens; raises OpenVisionError without a decoder or without texts."""
        shards = ShardImages(join_folder(root, self.data))
        alts = [next(iter(texts), "") for texts in shards.texts(self.alt)]
        captions = [" ".join(texts) for texts in shards.texts(self.text)]
        targets = [caption or alt for caption, alt in zip(captions, alts, strict=True)]
        empty = [shards.places[row][1].key for row, text in enumerate(targets) if not text and row not in shards.bad]
        if empty:
            raise OpenVisionError(
                f"{shards.name}: sample {empty[0]} has neither {self.text!r} nor {self.alt!r}; name the fields that "
                "hold captions and alt-texts"
            )
        images = shards.images()
        total, tokens, count = self._nats(model, images, alts, targets)
        loss = total / tokens
        return Measured(
            values={"caption_loss": loss, "caption_perplexity": math.exp(loss)},
            facts={"images": count, "tokens": tokens, "rejected": len(images) - count, "resolution": model.pixels},
            data={images.name: images.identity},
        )

    def _nats(
        self, model: EvaluatedModel, images: ImageSet, alts: list[str], targets: list[str]
    ) -> tuple[float, int, int]:
        """Sum of the cross-entropies of all target tokens, nats, their number, and the number of images."""
        captioning, tokenizer = model.captioning, model.vocabulary
        labels, mask = (
            torch.from_numpy(array) for array in tokenizer.encode_target(targets, require_decoder(captioning))
        )
        mine = model.processes.rows(len(images))
        sums: list[HostCopy] = []
        tokens, count, side = 0, 0, model.pixels
        with (
            evaluating(captioning) as device,
            model.precision(device),
            batch_memory(device, self.batch_size, (side, side), model.when_out_of_memory),
        ):
            for places, batch in prepared_batches(images, mine, model, self.batch_size):
                rows = [mine[place] for place in places]
                # Which tokens are targets is known on the CPU: an accelerator need not say how many there are.
                targets_at = mask[rows].flatten().nonzero()[:, 0]
                wanted, kept = send(labels[rows], device), send(targets_at, device)
                own = [alts[row] for row in rows]
                logits = caption_logits(captioning, tokenizer, send(batch, device), wanted, own)
                nats = F.cross_entropy(logits.flatten(0, 1)[kept], wanted.flatten()[kept], reduction="sum")
                sums.append(HostCopy(nats))
                tokens += len(targets_at)
                count += len(batch)
        total = sum(copy.values()[0] for copy in sums)
        size = model.processes.size
        all_nats, all_tokens, all_images = (size * mean for mean in model.processes.mean([total, tokens, count]))
        model.check_rejected(len(images) - round(all_images), images)
        return all_nats, round(all_tokens), round(all_images)


def caption_logits(model: Model, tokenizer: Tokenizer, images: Tensor, labels: Tensor, alts: list[str]) -> Tensor:
    """Logits (B, Q, V) of the target tokens `labels` (B, Q) for normalised images (B, 3, H, W)."""
    if writes_token_by_token(model):
        return model.caption_logits(images, teacher_forcing_ids(labels, tokenizer.bos_id))
    contrastive = cast("ContrastiveModel", model)
    ids = torch.from_numpy(tokenizer.encode(alts, contrastive.config.text.context_length))
    return contrastive.caption_logits(images, send(ids, images.device))
