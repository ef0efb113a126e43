"""Encode images and texts with a model: unit vectors, class embeddings, captions. Evaluation and inference use it.

- Version 1 captions from the image and an alt-text, which for a held-out image is the model's own zero-shot guess. All
  positions are predicted at once, so neighbours may choose the same token: direct repetitions are collapsed.
- OpenVision 2, 3 and GenLIP caption from the image only, token by token, and read every patch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openvision.errors import OpenVisionError
from openvision.models.openvision3 import OpenVision3
from openvision.models.protocols import CaptioningModel, ContrastiveModel, ImageEncoder, Model, Module
from openvision.runtime import describe_memory, explain_out_of_memory, send
from openvision.text.tokenizer import Tokenizer


@contextmanager
def evaluating(model: Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; yields the model's device and restores the mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


@contextmanager
def batch_memory(device: torch.device, images: int, size: tuple[int, int], remedy: str = "") -> Iterator[None]:
    """Batches of `images` images of (height, width) pixels: running out of memory raises OpenVisionError.

    `remedy` is what to do about it, by default to use smaller batches.
    """
    fewer = f"use smaller batches, e.g. --batch-size {max(1, images // 4)}" if images > 1 else "use a lower resolution"
    height, width = size
    with explain_out_of_memory(
        lambda: (
            f"out of memory on {describe_memory(device)} with {images} images of {height} x {width} px at a time; "
            f"{remedy or fewer}"
        )
    ):
        yield


def encode_images(model: ImageEncoder, images: Tensor, batch_size: int = 256) -> NDArray[np.float32]:
    """uint8 (n, 3, H, W) -> unit vectors float32 (n, E); raises OpenVisionError on NaN or infinity."""
    batches = images.split(batch_size)
    with evaluating(model) as device, batch_memory(device, len(batches[0]), _size(images)):
        parts = [model.encode_image(send(batch, device)).float() for batch in batches]
        features = torch.cat(parts).cpu().numpy()
    check_features(features, "image features")
    return features


def encode_texts(
    model: ContrastiveModel | OpenVision3, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = 256
) -> NDArray[np.float32]:
    """n texts -> unit vectors float32 (n, E); raises OpenVisionError on NaN or infinity.

    Equal texts are encoded once, so that their vectors are bit-identical whatever their batch.
    """
    distinct, place = once(texts)
    ids = torch.from_numpy(tokenizer.encode(distinct, model.config.text.context_length))
    with evaluating(model) as device:
        parts = [model.encode_text(send(batch, device)).float() for batch in ids.split(batch_size)]
        features = torch.cat(parts).cpu().numpy()
    check_features(features, "text features")
    return features[place]


def once(texts: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct texts in order of first appearance, and the index of every text among them."""
    number = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    return list(number), np.array([number[text] for text in texts], dtype=np.int64)


def text_encoder(
    model: ContrastiveModel | OpenVision3, tokenizer: Tokenizer, batch_size: int = 256
) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """`encode_texts` of one model as a function of the texts."""
    return lambda texts: encode_texts(model, tokenizer, texts, batch_size)


def collapse_repeats(ids: Iterable[int]) -> list[int]:
    """Collapse runs of one token: [5, 5, 7, 5] -> [5, 7, 5]."""
    return [token for token, _ in groupby(ids)]


def generate_captions(
    model: ContrastiveModel, tokenizer: Tokenizer, images: Tensor, alts: Sequence[str], batch_size: int = 64
) -> list[str]:
    """Captions of images uint8 (n, 3, H, W) with an alt-text each; raises OpenVisionError without a decoder."""
    require_decoder(model)
    if len(alts) != len(images):
        raise OpenVisionError(f"there are {len(images)} images but {len(alts)} alt-texts")
    alt_ids = torch.from_numpy(tokenizer.encode(list(alts), model.config.text.context_length))
    captions: list[str] = []
    with evaluating(model) as device, batch_memory(device, min(batch_size, len(images)), _size(images)):
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            logits = model.caption_logits(send(images[rows], device), send(alt_ids[rows], device))
            captions += [_decode(tokenizer, row) for row in logits.argmax(dim=-1).cpu().numpy()]
    return captions


def write_captions(
    model: CaptioningModel | OpenVision3,
    tokenizer: Tokenizer,
    images: Tensor,
    batch_size: int = 64,
    max_length: int | None = None,
) -> list[str]:
    """Captions of images uint8 (n, 3, H, W) by OpenVision 2 or 3, at most `max_length` tokens each."""
    captions: list[str] = []
    with evaluating(model) as device, batch_memory(device, min(batch_size, len(images)), _size(images)):
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            ids = model.generate(send(batch, device), tokenizer.bos_id, tokenizer.eos_id, max_length)
            captions += [tokenizer.decode(row) for row in ids.cpu().numpy()]
    return captions


def _size(images: Tensor) -> tuple[int, int]:
    """Height and width of images (n, 3, H, W)."""
    return images.shape[2], images.shape[3]


def require_decoder(model: Model) -> int:
    """Length of the decoder's captions in tokens; raises OpenVisionError without a decoder."""
    if model.decoder is None:
        raise OpenVisionError("this model has no caption decoder: it was trained without the captioning objective")
    return model.decoder.config.caption_length


def _decode(tokenizer: Tokenizer, ids: NDArray[np.integer]) -> str:
    return tokenizer.decode(np.array(collapse_repeats(ids.tolist()), dtype=np.int64))


PLAIN = ("{}",)
"""The list of prompt templates that is the name itself."""
EncodeTexts = Callable[[Sequence[str]], NDArray[np.float32]]


def check_templates(templates: Sequence[str]) -> None:
    """Raise OpenVisionError unless every template has exactly one `{}` for the name."""
    if not templates:
        raise OpenVisionError('the list of prompt templates is empty; give at least "{}"')
    for template in templates:
        if template.count("{}") != 1:
            raise OpenVisionError(f'the prompt template {template!r} must have "{{}}" exactly once, for the name')


def class_embeddings(
    encode: EncodeTexts, names: Sequence[str], templates: Sequence[str] = PLAIN
) -> NDArray[np.float32]:
    """Unit vectors (c, E) of c class names: normalised mean over templates of unit text vectors."""
    check_templates(templates)
    prompts = [template.replace("{}", name) for name in names for template in templates]
    vectors = encode(prompts)
    mean = vectors.reshape(len(names), len(templates), -1).mean(axis=1)
    return (mean / (np.linalg.norm(mean, axis=1, keepdims=True) + 1e-8)).astype(np.float32)


def check_features(features: NDArray[np.floating], what: str) -> None:
    """Raise OpenVisionError when `features` (n, ...) have NaN or infinity, naming the first such row."""
    if len(features) == 0:
        raise OpenVisionError(f"there are no {what}: the split is empty")
    bad = ~np.isfinite(features).reshape(len(features), -1).all(axis=1)
    if bad.any():
        raise OpenVisionError(
            f"{int(bad.sum())} of {len(features)} {what} have NaN or infinity, row {int(bad.argmax())} first: "
            "the model has diverged; train with a lower learning rate"
        )
