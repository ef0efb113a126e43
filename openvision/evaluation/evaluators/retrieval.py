"""Image-text retrieval: recall at 1, 5 and 10 both ways, with any number of captions per image.

Text to image: the text's own image is among the first k. Image to text: any of the image's texts is. With one text per
image these are open_clip's metrics, with several clip_benchmark's recall; ties count against the model.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from openvision.evaluation.data.options import TextOptions, open_captioned
from openvision.evaluation.evaluators.base import Evaluator, Measured
from openvision.evaluation.evaluators.model import Subject
from openvision.evaluation.metrics.bootstrap import Outcomes
from openvision.evaluation.metrics.ranks import retrieval_ranks, target_ranks, with_interval, within

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


class Retrieval(Evaluator, TextOptions):
    """`t2i_r1` ... `i2t_r10`, and the median ranks `t2i_median`, `i2t_median` (from 1)."""

    kind: Literal["retrieval"] = "retrieval"

    def missing(self, root: str | Path) -> str | None:
        """The folder of pictures, or the annotations."""
        if self.annotations is not None and not (Path(root) / self.annotations).is_file():
            return str(Path(root) / self.annotations)
        return super().missing(root)

    def measure(self, subject: Subject, root: str | Path) -> Measured:
        """Measure on every picture that can be decoded, with its texts."""
        data = open_captioned(self.data, root, self)
        texts = subject.texts(data.texts)
        encoded, images = subject.embeds(data.pictures)
        kept = np.isin(data.owner, encoded.rows)
        owner = data.owner[kept]
        result = Measured()
        ways = {
            "t2i": (texts[kept], images, owner, encoded.rows),
            "i2t": (images, texts[kept], encoded.rows, owner),
        }
        for way, (queries, gallery, query_ids, gallery_ids) in ways.items():
            mine = np.array(subject.processes.rows(len(queries)), dtype=np.int64)
            own = retrieval_ranks(queries[mine], gallery, query_ids[mine], gallery_ids) if len(mine) else mine
            ranks = subject.processes.gather_rows(own, len(queries))
            for k in RECALLS:
                result.add(f"{way}_r{k}", Outcomes.of(ranks < k, query_ids))
            result.values[f"{way}_median"] = float(np.floor(np.median(ranks)) + 1)
            result.arrays[f"{way}_rank"] = ranks
        result.facts = {
            "pictures": len(encoded.rows),
            "texts": len(owner),
            "rejected": encoded.rejected,
            "resolution": subject.pixels,
            "preprocessing": subject.preprocessing,
        }
        result.arrays |= {"rows": encoded.rows, "owner": owner}
        result.data[data.pictures.name] = data.pictures.identity
        return result
