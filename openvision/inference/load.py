"""`openvision.load`, `load_vision` and `load_captioner`: from a name to an encoder."""

import os
from pathlib import Path
from typing import Any

from openvision.images.preprocess import Preprocessing, Size
from openvision.inference.captioner import Captioner
from openvision.inference.encoder import Encoder
from openvision.inference.vision import VisionEncoder
from openvision.weights.load import Request, load_checkpoint


def load(
    source: str | os.PathLike[str],
    *,
    resolution: Size | None = None,
    preprocessing: Preprocessing = "crop",
    vocabulary: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    offline: bool = False,
    image_size: int | None = None,
) -> Encoder:
    """Load an encoder of pictures and texts, float32 on CPU.

    `source` is a released name (`openvision.available_models()`), a Hub id, a model folder, or a file of weights in
    our, open_clip's or the original JAX layout. `resolution` in pixels, a square or (height, width), may differ from
    the trained one. `preprocessing` is "crop" (as trained) or "squash" (as the released configurations say).
    `vocabulary` is bert-base-uncased's vocab.txt for weights that bring none; `image_size` the trained resolution of a
    JAX tree, which does not say it. `revision` pins a version on the Hub, `offline` reads the cache only.

    Raises OpenVisionError that says what is missing or broken, and what to do.
    """
    request = _request(vocabulary=vocabulary, revision=revision, offline=offline, image_size=image_size)
    return Encoder.from_checkpoint(load_checkpoint(os.fspath(source), request), resolution, preprocessing)


def load_vision(
    source: str | os.PathLike[str],
    *,
    resolution: Size | None = None,
    preprocessing: Preprocessing = "crop",
    revision: str | None = None,
    offline: bool = False,
    image_size: int | None = None,
) -> VisionEncoder:
    """Load the vision tower alone, of any checkpoint `load` knows and of OpenVision 2's; arguments as for `load`."""
    request = _request(vision_only=True, revision=revision, offline=offline, image_size=image_size)
    return VisionEncoder.from_checkpoint(load_checkpoint(os.fspath(source), request), resolution, preprocessing)


def load_captioner(
    source: str | os.PathLike[str], *, resolution: Size | None = None, preprocessing: Preprocessing = "crop"
) -> Captioner:
    """Load an OpenVision 2 model with its caption decoder: the model folder of a run; arguments as for `load`."""
    return Captioner.from_checkpoint(load_checkpoint(os.fspath(source)), resolution, preprocessing)


def _request(vocabulary: str | os.PathLike[str] | None = None, **settings: Any) -> Request:
    return Request(vocabulary=Path(vocabulary) if vocabulary is not None else None, **settings)
