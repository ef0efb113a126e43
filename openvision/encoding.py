"""Encode images and texts with a model: unit vectors, class embeddings, captions.

Below evaluation and inference, which both use it.

- Version 1 captions from the image and an alt-text. For a held-out image the alt-text is the model's own zero-shot
  guess, never the true one. All positions are predicted at once, so neighbouring positions may choose the same token:
  direct repetitions are collapsed, nothing else is repaired.
- OpenVision 2 captions from the image alone, token after token; every patch is read.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openvision.errors import OpenVisionError
from openvision.images.preprocess import normalize
from openvision.models.protocols import CaptioningModel, ContrastiveModel, ImageEncoder, Model, Module
from openvision.text.tokenizer import Tokenizer


@contextmanager
def evaluating(model: Module) -> Iterator[torch.device]:
    """Eval mode without gradients inside, the mode as it was afterwards; yields the model's device."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def encode_images(model: ImageEncoder, images: Tensor, batch_size: int = 256) -> NDArray[np.float32]:
    """uint8 (n, 3, H, W) -> unit vectors float32 (n, E); raises OpenVisionError on NaN or infinity."""
    with evaluating(model) as device:
        parts = [model.encode_image(normalize(batch.to(device))).float().cpu() for batch in images.split(batch_size)]
    features = torch.cat(parts).numpy()
    check_features(features, "image features")
    return features


def encode_texts(
    model: ContrastiveModel, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = 256
) -> NDArray[np.float32]:
    """n texts -> unit vectors float32 (n, E); raises OpenVisionError on NaN or infinity.

    Equal texts are encoded once, so that they tie to the last bit whatever batch they would have been in.
    """
    distinct, place = once(texts)
    ids = torch.from_numpy(tokenizer.encode(distinct, model.config.text.context_length))
    with evaluating(model) as device:
        parts = [model.encode_text(batch.to(device)).float().cpu() for batch in ids.split(batch_size)]
    features = torch.cat(parts).numpy()
    check_features(features, "text features")
    return features[place]


def once(texts: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct texts in order of first appearance, and the place of every text among them."""
    number = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    return list(number), np.array([number[text] for text in texts], dtype=np.int64)


def text_encoder(
    model: ContrastiveModel, tokenizer: Tokenizer, batch_size: int = 256
) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """`encode_texts` of one model, as a function of the texts."""
    return lambda texts: encode_texts(model, tokenizer, texts, batch_size)


def collapse_repeats(ids: Iterable[int]) -> list[int]:
    """Runs of one token become one: [5, 5, 7, 5] -> [5, 7, 5]."""
    return [token for token, _ in groupby(ids)]


def generate_captions(
    model: ContrastiveModel, tokenizer: Tokenizer, images: Tensor, alts: Sequence[str], batch_size: int = 64
) -> list[str]:
    """Captions of pictures uint8 (n, 3, H, W), given an alt-text each; raises OpenVisionError without a decoder."""
    require_decoder(model)
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
    model: CaptioningModel, tokenizer: Tokenizer, images: Tensor, batch_size: int = 64, max_length: int | None = None
) -> list[str]:
    """Captions of pictures uint8 (n, 3, H, W) by OpenVision 2, at most `max_length` tokens each."""
    captions: list[str] = []
    with evaluating(model) as device:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            ids = model.generate(normalize(batch.to(device)), tokenizer.bos_id, tokenizer.eos_id, max_length)
            captions += [tokenizer.decode(row) for row in ids.cpu().numpy()]
    return captions


def require_decoder(model: Model) -> int:
    """Length of the decoder's captions; raises OpenVisionError without a decoder."""
    if model.decoder is None:
        raise OpenVisionError("this model has no caption decoder: it was trained without the captioning objective")
    return model.decoder.config.caption_length


def _decode(tokenizer: Tokenizer, ids: NDArray[np.integer]) -> str:
    return tokenizer.decode(np.array(collapse_repeats(ids.tolist()), dtype=np.int64))


# The name as it stands. Which of the lists serves best is a question for the validation split.
PLAIN = ("{}",)


EncodeTexts = Callable[[Sequence[str]], NDArray[np.float32]]


def check_templates(templates: Sequence[str]) -> None:
    """Raise OpenVisionError unless every template has exactly one place for the name."""
    if not templates:
        raise OpenVisionError('the list of prompt templates is empty; give at least "{}"')
    for template in templates:
        if template.count("{}") != 1:
            raise OpenVisionError(f'the prompt template {template!r} must hold "{{}}" exactly once, for the name')


def class_embeddings(
    encode: EncodeTexts, names: Sequence[str], templates: Sequence[str] = PLAIN
) -> NDArray[np.float32]:
    """Unit vectors (c, E) of class names: the mean over templates of unit text vectors, made unit again."""
    check_templates(templates)
    prompts = [template.replace("{}", name) for name in names for template in templates]
    vectors = encode(prompts)
    mean = vectors.reshape(len(names), len(templates), -1).mean(axis=1)
    return (mean / (np.linalg.norm(mean, axis=1, keepdims=True) + 1e-8)).astype(np.float32)


def check_features(features: NDArray[np.floating], what: str) -> None:
    """Raise OpenVisionError when `features` (n, ...) hold NaN or infinity, naming the first row that does."""
    if len(features) == 0:
        raise OpenVisionError(f"there are no {what} to measure: the split is empty")
    bad = ~np.isfinite(features).reshape(len(features), -1).all(axis=1)
    if bad.any():
        raise OpenVisionError(
            f"{int(bad.sum())} of {len(features)} {what} hold NaN or infinity, row {int(bad.argmax())} first: "
            "the model has diverged; train with a lower learning rate"
        )
