"""Captions from the parallel decoder, greedily.

The decoder reads the picture and an alt-text. For a held-out picture the alt-text is the model's own zero-shot guess,
never the true one. All positions are predicted at once, so neighbouring positions may choose the same token: direct
repetitions are collapsed, nothing else is repaired.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openvision.data.images import normalize
from openvision.errors import OpenVisionError
from openvision.evaluation.features import evaluating
from openvision.models.openvision import OpenVision
from openvision.text.tokenizer import Tokenizer


def collapse_repeats(ids: Iterable[int]) -> list[int]:
    """Runs of one token become one: [5, 5, 7, 5] -> [5, 7, 5]."""
    return [token for token, _ in groupby(ids)]


def generate_captions(
    model: OpenVision, tokenizer: Tokenizer, images: Tensor, alts: Sequence[str], batch_size: int = 64
) -> list[str]:
    """Captions of pictures uint8 (n, 3, H, W), given an alt-text each; raises OpenVisionError without a decoder."""
    if model.decoder is None:
        raise OpenVisionError("this model has no caption decoder: it was trained without the captioning objective")
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


def _decode(tokenizer: Tokenizer, ids: NDArray[np.integer]) -> str:
    return tokenizer.decode(np.array(collapse_repeats(ids.tolist()), dtype=np.int64))
