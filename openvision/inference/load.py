"""`openvision.load`, `load_vision` and `load_captioner`: the public way from a name to an encoder."""

import os
from pathlib import Path

import torch

from openvision.images.preprocess import Preprocessing, Size
from openvision.inference.captioner import Captioner
from openvision.inference.encoder import Encoder
from openvision.inference.vision import VisionEncoder
from openvision.runtime import resolve_device
from openvision.weights.load import Request, load_checkpoint

Where = str | torch.device
"""A device, by name as of `runtime.resolve_device`, or torch's."""


def load(
    source: str | os.PathLike[str],
    *,
    device: Where = "cpu",
    dtype: torch.dtype | None = None,
    resolution: Size | None = None,
    preprocessing: Preprocessing = "crop",
    vocabulary: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    offline: bool = False,
    image_size: int | None = None,
) -> Encoder:
    """Load an encoder of images and texts, in evaluation mode.

    Args:
        source: a released name (`openvision.available_models()`), a Hub id, a model folder, or a file of weights in
            this project's, open_clip's or the original JAX layout.
        device: "auto" (CUDA, else MPS, else CPU), "cpu", "cuda", "cuda:1", "mps", or a torch.device.
        dtype: of the weights, e.g. torch.bfloat16; None keeps float32. Embeddings are float32 on the CPU either way.
        resolution: pixels, a square or (height, width); may differ from the trained resolution, the default.
        preprocessing: "crop" as in training, or "squash" as in the released configurations, or "native",
            which keeps the aspect of each image within the patches of the square.
        vocabulary: vocab.txt of bert-base-uncased, for weights that come without one.
        revision: branch, tag or commit on the Hub.
        offline: read the local cache of the Hub only.
        image_size: trained resolution in pixels of a JAX tree, which does not contain it.

    Raises OpenVisionError that names what is missing or broken, and the remedy.
    """
    words = Path(vocabulary) if vocabulary is not None else None
    request = Request(vocabulary=words, revision=revision, offline=offline, image_size=image_size)
    where = _device(device)
    encoder = Encoder.from_checkpoint(load_checkpoint(os.fspath(source), request), resolution, preprocessing)
    return encoder.to(where, dtype)


def load_vision(
    source: str | os.PathLike[str],
    *,
    device: Where = "cpu",
    dtype: torch.dtype | None = None,
    resolution: Size | None = None,
    preprocessing: Preprocessing = "crop",
    revision: str | None = None,
    offline: bool = False,
    image_size: int | None = None,
    autoencoder: str | os.PathLike[str] | None = None,
) -> VisionEncoder:
    """Load the vision tower of any source of `load`, and of OpenVision 2 and 3 checkpoints; arguments as of `load`.

    `autoencoder` is the folder or Hub id of the one that stands before an OpenVision 3 encoder; by default the one that
    the checkpoint names, opened with the first image.
    """
    own = None if autoencoder is None else os.fspath(autoencoder)
    request = Request(vision_only=True, revision=revision, offline=offline, image_size=image_size, autoencoder=own)
    where = _device(device)
    encoder = VisionEncoder.from_checkpoint(load_checkpoint(os.fspath(source), request), resolution, preprocessing)
    return encoder.to(where, dtype)


def load_captioner(
    source: str | os.PathLike[str],
    *,
    device: Where = "cpu",
    dtype: torch.dtype | None = None,
    resolution: Size | None = None,
    preprocessing: Preprocessing = "crop",
) -> Captioner:
    """Load an OpenVision 2 or 3 model with its caption decoder from a run's model folder; arguments as of `load`."""
    where = _device(device)
    captioner = Captioner.from_checkpoint(load_checkpoint(os.fspath(source)), resolution, preprocessing)
    return captioner.to(where, dtype)


def _device(device: Where) -> torch.device:
    """Before weights are read: a device that is not there is an error at once."""
    return device if isinstance(device, torch.device) else resolve_device(device)
