"""What one's own shards allow to measure: names or alt-texts as classes, retrieval by each text there is.

Training measures the validation split by these evaluators; `openvision eval` and the report of a run measure it by the
suite `heldout_own`, which adds baselines and the caption loss.
"""

import hashlib
from pathlib import Path

from openvision.data.shards.dataset import ShardDataset
from openvision.data.shards.store import join_folder
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import ShardImages
from openvision.evaluation.evaluators.base import Evaluator, absent
from openvision.evaluation.evaluators.baselines import Baselines
from openvision.evaluation.evaluators.caption_loss import CaptionLoss
from openvision.evaluation.evaluators.retrieval import Retrieval
from openvision.evaluation.evaluators.zero_shot import ZeroShot
from openvision.evaluation.suites.suite import OWN, Suite, title_on

VALIDATION, TRAIN = "validation", "train"
# Baselines look at so many training images.
_TRAIN_LIMIT = 4000
_NOTES = (
    "The images are the validation split of the run's own data: training measured it, and choices may have been made "
    "on it.",
    "Classes are the names of the images, or, where not every image has one, their alt-texts: several images may "
    "share one.",
)


def validation_evaluators(dataset: ShardDataset, has_text: bool) -> list[Evaluator]:
    """What the texts of the shards allow to measure; raises OpenVisionError when not every image has an alt-text.

    Images without names are told apart by their alt-texts.
    """
    data, alt, synthetic = str(dataset.folder), dataset.alt_key, dataset.synthetic_key
    if not has_text:
        return [CaptionLoss(data=data, text=synthetic, alt=alt)]
    shards = ShardImages(dataset.folder)
    # Bad samples are left out, whatever is measured.
    texts = {name: shards.texts(name) for name in ("name", alt, synthetic)}
    good = [row for row in range(len(shards.places)) if row not in shards.bad]
    complete = {name: all(found[row] for row in good) for name, found in texts.items()}
    categories = shards.values("category")
    complete["category"] = all(isinstance(categories[row], str) and categories[row] for row in good)
    label = "name" if complete["name"] else alt
    if not complete[label]:
        raise OpenVisionError(
            f"{data}: not every sample has a {alt!r}; validation needs a name or an alt-text for each"
        )
    evaluators: list[Evaluator] = [
        ZeroShot(name="names", data=data, label=label),
        Retrieval(name="name retrieval", data=data, text=label, captions=1, prompts="plain"),
    ]
    if complete[alt]:
        evaluators.append(Retrieval(name="alt-texts", data=data, text=alt, captions=1))
    if complete[synthetic]:
        sentence = Retrieval(name="first sentences", data=data, text=synthetic, sentences=True, captions=1)
        evaluators.append(sentence)
    if complete["category"]:
        evaluators.append(ZeroShot(name="groups", data=data, label="category", words=True))
    return evaluators


def own_suite(root: str | Path) -> Suite:
    """The suite of a data folder with the shards `validation`, and `train` for the baselines where they are there."""
    dataset = ShardDataset(join_folder(root, VALIDATION))
    found = [
        one.model_copy(update={"name": title_on(VALIDATION, one.title), "data": VALIDATION})
        for one in validation_evaluators(dataset, has_text=True)
    ]
    label = next(one.label for one in found if isinstance(one, ZeroShot))
    found.append(CaptionLoss(name=title_on(VALIDATION, "captions"), data=VALIDATION))
    if absent(TRAIN, root) is None:
        name = title_on(VALIDATION, "baselines, names")
        found.append(
            Baselines(name=name, data=VALIDATION, train=TRAIN, train_limit=_TRAIN_LIMIT, label=label, text=label)
        )
    digest = hashlib.sha256("\n".join(one.model_dump_json() for one in found).encode()).hexdigest()
    return Suite(OWN, "the validation split of one's own data", found, digest, (VALIDATION,), _NOTES)
