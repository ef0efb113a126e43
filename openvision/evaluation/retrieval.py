"""Image-text retrieval: recall at 1, 5 and 10, text to image and image to text.

Either from embeddings, in blocks, or from a score matrix, as baselines without embeddings give it.
"""

import numpy as np
from numpy.typing import NDArray

from openvision.evaluation.metrics import retrieval_ranks, target_ranks, with_interval, within

RECALLS = (1, 5, 10)


def retrieval(
    images: NDArray[np.floating],
    texts: NDArray[np.floating],
    image_of_text: NDArray[np.integer] | None = None,
    prefix: str = "",
    chunk: int = 2048,
) -> dict[str, float | list[float]]:
    """Recall both ways for images (N, E) and texts (M, E), unit vectors.

    `image_of_text` (M,) holds the image's row of every text; None: text i belongs to image i. Text to image: the
    text's own image is among the first k. Image to text: any of the image's texts is. Keys: `{prefix}t2i_r1`,
    `{prefix}t2i_r1_ci` and so on.
    """
    image_ids = np.arange(len(images))
    owners = np.arange(len(texts)) if image_of_text is None else image_of_text
    return _recalls(
        text_to_image=retrieval_ranks(texts, images, owners, image_ids, chunk),
        image_to_text=retrieval_ranks(images, texts, image_ids, owners, chunk),
        prefix=prefix,
    )


def retrieval_from_scores(scores: NDArray[np.floating], prefix: str = "") -> dict[str, float | list[float]]:
    """Recall both ways from scores (N images, N texts) where text i belongs to image i."""
    own = np.arange(len(scores))
    return _recalls(text_to_image=target_ranks(scores.T, own), image_to_text=target_ranks(scores, own), prefix=prefix)


def _recalls(
    text_to_image: NDArray[np.integer], image_to_text: NDArray[np.integer], prefix: str
) -> dict[str, float | list[float]]:
    result: dict[str, float | list[float]] = {}
    for direction, ranks in (("t2i", text_to_image), ("i2t", image_to_text)):
        for k in RECALLS:
            result |= with_interval(f"{prefix}{direction}_r{k}", within(ranks, k))
    return result
