"""Which suite a run is measured by: the held-out sets of generated data, or else the suite `own`.

`own` is what the validation shards of a run allow to measure, e.g. those that `openvision data make` wrote.

The same evaluators measure the validation split during training (training/validation.py). Here the training-free
baselines stand beside them, as in the suite `heldout`, whose form the results have.
"""

import hashlib
import json
import tomllib
from pathlib import Path

from openvision.data.shards.dataset import ALT_MEMBER, ShardDataset
from openvision.data.shards.store import join_folder
from openvision.errors import OpenVisionError
from openvision.evaluation.data.images import ShardImages
from openvision.evaluation.evaluators.base import Evaluator, absent
from openvision.evaluation.evaluators.baselines import Baselines
from openvision.evaluation.evaluators.caption_loss import CaptionLoss
from openvision.evaluation.evaluators.reconstruction import Reconstruction
from openvision.evaluation.evaluators.retrieval import Retrieval
from openvision.evaluation.evaluators.zero_shot import ZeroShot
from openvision.evaluation.suites.suite import HELD_OUT, HELD_OUT_SCENES, OWN, Suite, load_suite, title_on
from openvision.files import JsonObject, read_json

QUICKSTART_DATA = "runs/scenes"
OF_RUNS = (HELD_OUT, HELD_OUT_SCENES, OWN)
"""Suites that stand in the folder of a run and in its report."""
_NOTES = (
    "The images are the validation split of the run's own data: training measured it, and choices may have been made "
    "on it.",
    "Classes are the names of the images, or, where not every image has one, their alt-texts.",
)


def suite_of_run(run: Path, data: str | Path | None = None, name: str | None = None) -> tuple[Suite, str | Path]:
    """The suite that a run is measured by, and the folder of its data.

    The folder is by default that of the training. The suite is by default `heldout` or `heldout_scenes` where the
    folder has their sets, else `own`; `heldout` stands for both of the former. Raises OpenVisionError when there is
    nothing to measure on.
    """
    if run.name == "model" and (run.parent / "data.json").is_file():
        run = run.parent
    folder = data if data is not None else _data_folder(run) or QUICKSTART_DATA
    if name in (None, HELD_OUT):
        generated = (HELD_OUT, HELD_OUT_SCENES)
        there = [one for one in generated if all(absent(each, folder) is None for each in load_suite(one).sets)]
        if name is None and recipe_of_run(run).get("model", {}).get("kind") == "openvision3":
            # The generated sets do not ask for reconstructions.
            return own_suite(run, folder), folder
        own = OWN if name is None and _validation(run) is not None else HELD_OUT
        name = there[0] if there else own
    return (own_suite(run, folder) if name == OWN else load_suite(name)), folder


def own_suite(run: Path, data: str | Path) -> Suite:
    """What the validation shards of a run allow to measure; raises OpenVisionError when its recipe names none."""
    settings, validation = _settings(run), _validation(run)
    if validation is None:
        raise OpenVisionError(
            f"{run}: its recipe names no validation shards, which the suite {OWN!r} measures on; make some with "
            "`openvision data make --holdout`, or give --suite and --data"
        )
    dataset = ShardDataset(
        join_folder(data, validation), settings.get("synthetic_key", "synthetic"), settings.get("alt_key", ALT_MEMBER)
    )
    has_text = recipe_of_run(run).get("model", {}).get("kind", "openvision") not in ("openvision2", "genlip")
    evaluators = validation_evaluators(dataset, has_text)
    if recipe_of_run(run).get("model", {}).get("kind") == "openvision3":
        evaluators.append(Reconstruction(data=validation))
    train = settings.get("train")
    if has_text and isinstance(train, str):
        label = str(getattr(evaluators[0], "label", ALT_MEMBER))
        evaluators.append(Baselines(name="baselines, names", data=validation, train=train, label=label, text=label))
    placed = [
        one.model_copy(update={"data": validation, "name": title_on(validation, one.title)}) for one in evaluators
    ]
    options = json.dumps([one.model_dump(mode="json") for one in placed], sort_keys=True)
    description = "zero-shot, retrieval and training-free baselines on the validation shards of the run"
    return Suite(OWN, description, placed, hashlib.sha256(options.encode()).hexdigest(), (validation,), _NOTES)


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


def _data_folder(run: Path) -> str | None:
    """The data folder that the run was trained on; runs of earlier versions do not know it."""
    path = run / "data.json"
    folder = read_json(path).get("folder") if path.is_file() else None
    return folder if isinstance(folder, str) and absent(folder, ".") is None else None


def _validation(run: Path) -> str | None:
    validation = _settings(run).get("validation")
    return validation if isinstance(validation, str) else None


def _settings(run: Path) -> JsonObject:
    settings = recipe_of_run(run).get("data", {})
    return settings if isinstance(settings, dict) else {}


def recipe_of_run(run: Path) -> JsonObject:
    """RUN/recipe.toml as it stands, empty without one; raises OpenVisionError when it cannot be read."""
    path = run / "recipe.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OpenVisionError(f"{path} cannot be read: {error}") from error
