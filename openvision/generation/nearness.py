"""How near generated images are to true ones: a Frechet distance, and whether the encoder sees what was asked for.

    generated           images made for the texts of true images that the generator was not trained on
    reconstructed       those true images through encoder and decoder: no generator can be expected to be nearer
    true                those true images themselves: the distance that the choice of images alone makes
    one colour          the median colour: what a generator of nothing gives

Each is compared with as many other true images. The distance is on EfficientNet-Lite0 and is not FID. The agreement is
that of the encoder's own text tower, from which the condition comes too: it is no independent judge.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openvision.data.shards.store import join_folder
from openvision.encoding import encode_images, encode_texts, evaluating, once
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import ShardImages, spread
from openvision.evaluation.metrics.reconstruction import frechet_distance
from openvision.evaluation.report.generated import Generated
from openvision.evaluation.suites.own import suite_of_run
from openvision.frozen.autoencoder import as_signed, as_uint8
from openvision.frozen.perceptual import EfficientNetDistance, open_stand_in, resized
from openvision.generation.generate import GUIDANCE, STEPS, OpenGenerator, open_generator
from openvision.images.decode import BadSampleError
from openvision.images.preprocess import prepare, to_batch
from openvision.models.openvision3 import OpenVision3

COUNT, SHOWN = 200, 12
_BATCH = 16
# The network of the distance was trained at this resolution.
_FEATURE_PIXELS = 224


def measure_for_run(folder: Path, run: Path, data: str | Path | None, device: torch.device) -> Generated:
    """Measure the generator in `folder` on the held-out images of the run whose encoder it belongs to.

    `data` is by default what the run was trained on. Raises OpenVisionError for the generator of another encoder.
    """
    opened = open_generator(folder, device, str(run / "model"))
    suite, root = suite_of_run(run, data)
    return measure_generator(opened, join_folder(root, suite.sets[0]))


def measure_generator(
    opened: OpenGenerator, shards: str | Path, count: int = COUNT, shown: int = SHOWN, seed: int = 0
) -> Generated:
    """Measure on `count` images of `shards` and their texts, against as many others; fewer where there are fewer.

    Raises OpenVisionError when fewer than four images have a text.
    """
    asked, texts, others = _two_lots(opened, shards, count)
    made = torch.from_numpy(opened.images(texts, seed=seed)).permute(0, 3, 1, 2).contiguous()
    with evaluating(opened.encoder) as device:
        again = [as_uint8(opened.encoder.reconstruct(part.to(device))).cpu() for part in asked.split(_BATCH)]
    reconstructed = torch.cat(again)
    colour = others.transpose(0, 1).flatten(1).median(dim=1).values[:, None, None].expand_as(asked)
    network = open_stand_in().to(device)
    reference = _features(network, others, device)
    candidates, right = once(texts)
    classes = encode_texts(opened.encoder, opened.tokenizer, candidates)
    rows = {
        name: {
            "fd_efficientnet_lite0": frechet_distance(_features(network, images, device), reference),
            "agreement": _agreement(opened.encoder, images, classes, right),
        }
        for name, images in (
            ("generated", made),
            ("reconstructed", reconstructed),
            ("true", asked),
            ("one colour", colour),
        )
    }
    facts = {"field": opened.text, "images": len(asked), "texts": len(candidates)}
    facts |= {"steps": STEPS, "guidance": GUIDANCE, "seed": seed}
    few = spread(len(asked), min(shown, len(asked)))
    sides = (each[few].permute(0, 2, 3, 1).contiguous().numpy() for each in (asked, reconstructed, made))
    return Generated(rows, facts, [texts[row] for row in few], *sides)


def _two_lots(opened: OpenGenerator, shards: str | Path, count: int) -> tuple[Tensor, list[str], Tensor]:
    """Images uint8 (n, 3, R, R) with their texts, and n others, taking turns in the order of the shards."""
    data, side = ShardImages(shards), opened.encoder.config.vision.image_size
    images = data.images()
    texts = [" ".join(each) for each in data.texts(opened.text)]
    there = [row for row, text in enumerate(texts) if text and row not in data.bad]
    chosen = [there[place] for place in spread(len(there), min(2 * count, len(there)))] if there else []
    found: list[tuple[NDArray[np.uint8], str]] = []
    for row in chosen:
        try:
            found.append((prepare(images.load(row), side), texts[row]))
        except BadSampleError:
            continue
    if len(found) < 4:
        raise OpenVisionError(
            f"{shards}: fewer than four images have a {opened.text!r}, which the generator was conditioned on; give "
            "shards with that field"
        )
    half = len(found) // 2
    asked, others = found[: 2 * half : 2], found[1 : 2 * half : 2]
    return to_batch([one for one, _ in asked]), [text for _, text in asked], to_batch([one for one, _ in others])


def _features(network: EfficientNetDistance, images: Tensor, device: torch.device) -> NDArray[np.float32]:
    """Features float32 (n, 1280) of images uint8 (n, 3, R, R)."""
    with torch.inference_mode():
        parts = [
            network.features(resized(as_signed(part.to(device)), _FEATURE_PIXELS)).float().cpu()
            for part in images.split(_BATCH)
        ]
    return torch.cat(parts).numpy()


def _agreement(
    encoder: OpenVision3, images: Tensor, classes: NDArray[np.float32], right: Sequence[int] | NDArray[np.int64]
) -> float:
    """Share of images whose own text is nearer than every other; ties count against it."""
    scores = encode_images(encoder, images, _BATCH) @ classes.T
    own = scores[np.arange(len(images)), right]
    return float(((scores >= own[:, None]).sum(axis=1) == 1).mean())
