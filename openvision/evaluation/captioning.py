"""Captions that a model writes, greedily, and how well it predicts captions written before.

- Version 1 reads the picture and an alt-text. For a held-out picture the alt-text is the model's own zero-shot guess,
  never the true one. All positions are predicted at once, so neighbouring positions may choose the same token: direct
  repetitions are collapsed, nothing else is repaired.
- OpenVision 2 reads the picture alone and writes token after token; every patch is read.
- The caption loss is that of training: nats per target token over a whole split. It is what is measured of a model
  without a text tower, which has no zero-shot classification.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from openvision.data.images import normalize
from openvision.errors import OpenVisionError
from openvision.evaluation.features import Split, evaluating
from openvision.models.autoregressive import teacher_forcing_ids
from openvision.models.openvision import OpenVision
from openvision.models.openvision2 import OpenVision2
from openvision.text.tokenizer import Tokenizer


def collapse_repeats(ids: Iterable[int]) -> list[int]:
    """Runs of one token become one: [5, 5, 7, 5] -> [5, 7, 5]."""
    return [token for token, _ in groupby(ids)]


def generate_captions(
    model: OpenVision, tokenizer: Tokenizer, images: Tensor, alts: Sequence[str], batch_size: int = 64
) -> list[str]:
    """Captions of pictures uint8 (n, 3, H, W), given an alt-text each; raises OpenVisionError without a decoder."""
    _require_decoder(model)
    if len(alts) != len(images):
        raise OpenVisionError(f"there are {len(images)} pictures but {len(alts)} alt-texts")
    alt_ids = torch.from_numpy(tokenizer.encode(list(alts), model.config.text.context_length))
    captions: list[str] = []
    with evaluating(model) as device:
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            logits = model.caption_logits(normalize(images[rows]).to(device), alt_ids[rows].to(device))
            captions += [_decode(tokenizer, row) for row in logits.argmax(dim=-1).cpu().numpy()]
    return captions


def write_captions(
    model: OpenVision2, tokenizer: Tokenizer, images: Tensor, batch_size: int = 64, max_length: int | None = None
) -> list[str]:
    """Captions of pictures uint8 (n, 3, H, W) by OpenVision 2, at most `max_length` tokens each."""
    captions: list[str] = []
    with evaluating(model) as device:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            ids = model.generate(normalize(batch.to(device)), tokenizer.bos_id, tokenizer.eos_id, max_length)
            captions += [tokenizer.decode(row) for row in ids.cpu().numpy()]
    return captions


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
    length = _require_decoder(model)
    texts = [caption or alt for caption, alt in zip(split.captions, split.alts, strict=True)]
    labels, mask = (torch.from_numpy(array) for array in tokenizer.encode_target(texts, length))
    total, tokens = 0.0, 0
    with evaluating(model) as device:
        for rows in batches:
            wanted, counts = labels[rows].to(device), mask[rows].to(device)
            images = normalize(split.images[rows].to(device))
            if isinstance(model, OpenVision2):
                logits = model.caption_logits(images, teacher_forcing_ids(wanted, tokenizer.bos_id))
            else:
                alts = tokenizer.encode(split.alts[rows], model.config.text.context_length)
                logits = model.caption_logits(images, torch.from_numpy(alts).to(device))
            total += F.cross_entropy(logits[counts], wanted[counts], reduction="sum").item()
            tokens += int(counts.sum())
    return total, tokens


def _require_decoder(model: OpenVision | OpenVision2) -> int:
    """Length of the decoder's captions."""
    if model.decoder is None:
        raise OpenVisionError("this model has no caption decoder: it was trained without the captioning objective")
    return model.decoder.config.caption_length


def _decode(tokenizer: Tokenizer, ids: NDArray[np.integer]) -> str:
    return tokenizer.decode(np.array(collapse_repeats(ids.tolist()), dtype=np.int64))
