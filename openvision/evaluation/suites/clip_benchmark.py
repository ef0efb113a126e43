"""Our checkpoints in clip_benchmark, as a model type of its own:

    python -m openvision.evaluation.suites.clip_benchmark eval --model_type openvision --model openvision \\
        --pretrained runs/quickstart/model --dataset wds/PATH --task zeroshot_classification --no_amp

clip_benchmark 1.6 keeps its model types in a table and offers no other hook: this adds a row to it and hands over.
"""

import importlib
from collections.abc import Callable
from typing import SupportsFloat

import torch
from PIL import Image
from torch import Tensor, nn

from openvision.errors import OpenVisionError
from openvision.images.preprocess import prepare, to_batch
from openvision.models.openvision import OpenVision
from openvision.models.vision import normalize
from openvision.weights.load import Request, load_checkpoint

MODEL_TYPE = "openvision"


class BenchmarkModel(nn.Module):
    """The two methods that clip_benchmark calls; it makes the vectors unit itself."""

    def __init__(self, model: OpenVision) -> None:
        super().__init__()
        self.model = model

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> (B, E)."""
        return self.model.encode_image(images)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Ids (B, L) -> (B, E)."""
        return self.model.encode_text(ids)


def load_openvision(
    model_name: str = "openvision",
    pretrained: str = "runs/quickstart/model",
    cache_dir: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[BenchmarkModel, Callable[[Image.Image], Tensor], Callable[[list[str]], Tensor]]:
    """Model, transform and tokenizer as clip_benchmark wants them; `pretrained` is anything `openvision.load` reads.

    `model_name` ending in "squash" squashes images to a square as the released configurations say; otherwise they
    are cropped as trained. `cache_dir` is not used: the Hub has its own.
    """
    loaded = load_checkpoint(pretrained, Request())
    if loaded.model is None or loaded.tokenizer is None:
        raise OpenVisionError(f"{pretrained} has no text tower or no vocabulary: clip_benchmark needs both")
    model, tokenizer = loaded.model.to(device), loaded.tokenizer
    side, length = model.config.vision.image_size, model.config.text.context_length
    mode = "squash" if model_name.endswith("squash") else "crop"

    def transform(image: Image.Image) -> Tensor:
        return normalize(to_batch([prepare(image, side, mode)]))[0]

    def tokenize(texts: list[str]) -> Tensor:
        return torch.from_numpy(tokenizer.encode(list(texts), length))

    return BenchmarkModel(model.eval()), transform, tokenize


def register() -> None:
    """Add the model type to clip_benchmark's table; raises OpenVisionError when it is not installed."""
    try:
        models = importlib.import_module("clip_benchmark.models")
    except ImportError as error:
        raise OpenVisionError(
            f"clip_benchmark cannot be imported ({error}); run: pip install clip-benchmark"
        ) from error
    models.TYPE2FUNC[MODEL_TYPE] = load_openvision
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)


def _as_number(value: SupportsFloat) -> float:
    item = getattr(value, "item", None)
    return float(item() if item is not None else value)


def main() -> None:
    """clip_benchmark's own command line, with one model type more."""
    register()
    command = importlib.import_module("clip_benchmark.cli")
    # Its accuracy calls float() on an array of one element, which numpy 2.4 refuses; no released version fixes it.
    vars(importlib.import_module("clip_benchmark.metrics.zeroshot_classification"))["float"] = _as_number
    command.main()


if __name__ == "__main__":
    main()
