"""Caption loss of a split: how well a model predicts captions written before.

The loss is that of training: nats per target token over the whole split. It is what is measured of a model without a
text tower, which has no zero-shot classification.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from openvision.encoding import evaluating, require_decoder
from openvision.evaluation.data.split import Split
from openvision.models.autoregressive import teacher_forcing_ids
from openvision.models.openvision import OpenVision
from openvision.models.openvision2 import OpenVision2
from openvision.text.tokenizer import Tokenizer


def measure_captions(
    model: OpenVision | OpenVision2, tokenizer: Tokenizer, split: Split, batch_size: int = 16
) -> dict[str, float]:
    """How well `model` predicts the split's own captions: `caption_loss`, `caption_perplexity`, `caption_tokens`.

    The loss is the mean over all target tokens of the split, nats; every patch is read. The target of a sample without
    a synthetic caption is its alt-text, as in training; version 1 reads the true alt-text, as in training.
    Raises OpenVisionError without a decoder.
    """
    rows = [slice(start, start + batch_size) for start in range(0, len(split), batch_size)]
    total, tokens = caption_nats(model, tokenizer, split, rows)
    loss = total / tokens
    return {"caption_loss": loss, "caption_perplexity": math.exp(loss), "caption_tokens": tokens}


def caption_nats(
    model: OpenVision | OpenVision2, tokenizer: Tokenizer, split: Split, batches: Iterable[slice]
) -> tuple[float, int]:
    """Sum of the cross-entropies of the target tokens in these batches of the split, nats, and their number."""
    length = require_decoder(model)
    texts = [caption or alt for caption, alt in zip(split.captions, split.alts, strict=True)]
    labels, mask = (torch.from_numpy(array) for array in tokenizer.encode_target(texts, length))
    total, tokens = 0.0, 0
    with evaluating(model) as device:
        for rows in batches:
            wanted, counts = labels[rows].to(device), mask[rows].to(device)
            images = split.images[rows].to(device)
            if isinstance(model, OpenVision2):
                logits = model.caption_logits(images, teacher_forcing_ids(wanted, tokenizer.bos_id))
            else:
                alts = tokenizer.encode(split.alts[rows], model.config.text.context_length)
                logits = model.caption_logits(images, torch.from_numpy(alts).to(device))
            total += F.cross_entropy(logits[counts], wanted[counts], reduction="sum").item()
            tokens += int(counts.sum())
    return total, tokens
