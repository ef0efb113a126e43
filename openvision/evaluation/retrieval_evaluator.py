"""Image-text retrieval as an evaluator: recall at 1, 5 and 10 both ways, with any number of captions a picture.

Text to image: the text's own picture is among the first k. Image to text: any of the picture's texts is. With one text
a picture these are open_clip's metrics, with several clip_benchmark's recall; ties count against the model.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from openvision.evaluation.bootstrap import Outcomes
from openvision.evaluation.data_options import TextOptions, open_captioned
from openvision.evaluation.evaluators import Evaluator, Measured
from openvision.evaluation.metrics import retrieval_ranks
from openvision.evaluation.retrieval import RECALLS
from openvision.evaluation.subject import Subject


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
            mine = np.array(subject.workers.rows(len(queries)), dtype=np.int64)
            own = retrieval_ranks(queries[mine], gallery, query_ids[mine], gallery_ids) if len(mine) else mine
            ranks = subject.workers.gather(own, len(queries))
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
