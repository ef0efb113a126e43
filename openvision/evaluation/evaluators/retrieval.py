"""Image-text retrieval: recall at 1, 5 and 10 both ways, with any number of captions per image.

Text to image: an image of the text is among the first k. Image to text: any of the image's texts is. Where images share
a text, as in a set that is labelled with class names, it is right for all of them: no model could tell them apart.
Published splits (`annotations`) count as published, the own pair alone. With one text per image these
are open_clip's metrics, with several clip_benchmark's recall; ties count against the model.
"""

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from openvision.evaluation.data.images import Captioned
from openvision.evaluation.data.options import TextOptions, open_captioned
from openvision.evaluation.data.prompts import classifier, protocol
from openvision.evaluation.evaluators.base import Evaluator, Measured
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.evaluation.evaluators.zero_shot import candidates_of
from openvision.evaluation.metrics.bootstrap import Outcomes
from openvision.evaluation.metrics.ranks import EqualTexts, Right, retrieval_ranks
from openvision.runtime import SINGLE_PROCESS, Processes

RECALLS = (1, 5, 10)


class Retrieval(Evaluator, TextOptions):
    """`t2i_r1` ... `i2t_r10`, and the median ranks `t2i_median`, `i2t_median` (from 1)."""

    kind: Literal["retrieval"] = "retrieval"
    prompts: str | tuple[str, ...] | None = None
    """Put each text into prompts, as `zero_shot` does with names; by default texts are encoded as they are."""

    def missing(self, root: str | Path) -> str | None:
        """The folder of images, or the annotations."""
        if self.annotations is not None and not (Path(root) / self.annotations).is_file():
            return str(Path(root) / self.annotations)
        return super().missing(root)

    def measure(self, model: EvaluatedModel, root: str | Path) -> Measured:
        """Measure on every image that can be decoded, with its texts."""
        data = open_captioned(self.data, root, self, self.limit)
        texts = self.encode_texts(model, data, root)
        encoded, images = model.embeds(data.images)
        kept = np.isin(data.owner, encoded.rows)
        # What is compared is what was encoded.
        _, numbers = candidates_of(data.texts)
        shared = numbers[kept] if self.annotations is None else None
        result = retrieve(images, texts[kept], encoded.rows, data.owner[kept], model.processes, text_ids=shared)
        result.facts = {
            "images": len(encoded.rows),
            "texts": int(kept.sum()),
            "different_texts": len(np.unique(numbers[kept])),
            "rejected": encoded.rejected,
            "resolution": model.pixels,
            "preprocessing": model.preprocessing,
        }
        result.arrays |= {"rows": encoded.rows, "owner": data.owner[kept]}
        result.data[data.images.name] = data.images.identity
        return result

    def encode_texts(self, model: EvaluatedModel, data: Captioned, root: str | Path) -> NDArray[np.float32]:
        """Unit vectors (m, E) of all texts of `data`."""
        if self.prompts is None:
            return model.texts(data.texts)
        names, place = candidates_of(data.texts)
        how = protocol(self.prompts, None if "://" in str(root) else Path(root))
        return classifier(model.texts, names, how)[place]


def retrieve(
    images: NDArray[np.floating],
    texts: NDArray[np.floating],
    image_ids: NDArray[np.integer] | None = None,
    owner: NDArray[np.integer] | None = None,
    processes: Processes = SINGLE_PROCESS,
    chunk: int = 2048,
    text_ids: NDArray[np.integer] | None = None,
) -> Measured:
    """Recall and median ranks both ways for images (n, E) and texts (m, E), unit vectors.

    `owner` (m,) holds the id of the image of every text, `image_ids` (n,) the ids of the images, 0, 1, ... by default;
    without `owner` text i belongs to image i. `text_ids` (m,) are numbers that equal texts share: each is right for the
    images of all. Each process ranks its own queries.
    """
    image_ids = np.arange(len(images)) if image_ids is None else image_ids
    owner = image_ids if owner is None else owner
    result = Measured()
    shared = EqualTexts(owner, text_ids, image_ids) if text_ids is not None else None
    directions = {
        "t2i": (texts, images, owner, image_ids, shared and shared.of_texts),
        "i2t": (images, texts, image_ids, owner, shared and shared.of_images),
    }
    for direction, (queries, gallery, query_ids, gallery_ids, right) in directions.items():
        mine = np.array(processes.rows(len(queries)), dtype=np.int64)
        among = partial(_of_mine, right, mine) if right is not None else None
        own = mine
        if len(mine):
            own = retrieval_ranks(queries[mine], gallery, query_ids[mine], gallery_ids, chunk, among)
        ranks = processes.gather_rows(own, len(queries))
        for metric, outcomes in recalls(direction, ranks, query_ids).items():
            result.add(metric, outcomes)
        result.values[f"{direction}_median"] = float(np.floor(np.median(ranks)) + 1)
        result.arrays[f"{direction}_rank"] = ranks
    return result


def _of_mine(right: Right, mine: NDArray[np.int64], rows: NDArray[np.int64], columns: slice) -> NDArray[np.bool_]:
    """`right` for rows of this process's queries."""
    return right(mine[rows], columns)


def recalls(direction: str, ranks: NDArray[np.integer], units: NDArray[np.integer]) -> dict[str, Outcomes]:
    """Recall at 1, 5 and 10 of queries with ranks from 0, (q,), each about the image `units`, (q,)."""
    return {f"{direction}_r{k}": Outcomes.of(ranks < k, units) for k in RECALLS}
