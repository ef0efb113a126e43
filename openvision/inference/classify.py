"""Which of your labels fits a picture: softmax over labels of the scaled cosine, as in training."""

from collections.abc import Sequence

import numpy as np

from openvision.errors import OpenVisionError
from openvision.evaluation.zero_shot import PLAIN, class_embeddings
from openvision.inference.encoder import Encoder
from openvision.inference.vision import ImageInput


def classify(
    encoder: Encoder, image: ImageInput, labels: Sequence[str], templates: Sequence[str] = PLAIN
) -> list[tuple[str, float]]:
    """Labels with their probabilities, most probable first; of equal ones the earlier label first.

    The probabilities sum to 1 over the given labels: they say which label fits best, not whether any does.
    """
    distinct = clean_labels(labels)
    classes = class_embeddings(lambda texts: encoder.encode_texts(texts).numpy(), distinct, templates)
    cosines = classes.astype(np.float64) @ encoder.encode_images([image])[0].numpy().astype(np.float64)
    logits = encoder.scale * cosines
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    return [(distinct[i], float(shares[i])) for i in order]


def clean_labels(labels: Sequence[str]) -> list[str]:
    """Labels stripped, without empty ones and repetitions; raises OpenVisionError when none is left."""
    if isinstance(labels, str):
        raise OpenVisionError(f"labels must be a list of texts, not the one text {labels!r}; split it first")
    distinct = list(dict.fromkeys(label.strip() for label in labels if label.strip()))
    if not distinct:
        raise OpenVisionError('there are no labels to choose from; give some, e.g. --labels "a cat,a dog,a car"')
    return distinct
