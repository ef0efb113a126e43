"""The pairs of a contrastive run: equal texts are counted and may be right, sources and passes are checked."""

import copy
import json
from typing import Any

import pytest

from openvision.errors import OpenVisionError
from openvision.recipe.schema import parse_recipe
from openvision.training.setup.data import check_batches, describe_passes, open_training_data
from openvision.training.trainer import Trainer
from tests.conftest import TINY_RECIPE


def recipe_of(samples: int = 8, batch_size: int = 8, **changes):
    recipe = copy.deepcopy(TINY_RECIPE)
    stage = {"resolution": 32, "samples": samples, "batch_size": batch_size, "base_learning_rate": 0.01}
    recipe |= {"stages": [stage], "run": {"log_every": 1, "precision": "float32"}, **changes}
    recipe["data"] = {"train": "train", "vocab_size": 128, **changes.get("data", {})}
    return parse_recipe(recipe, "pairs")


def test_equal_texts_are_counted_and_may_be_right_answers(shapes_folder, tmp_path, capsys):
    choices = {
        "softmax": ({}, "the softmax divides each among its images"),
        "negatives": ({"kind": "sigmoid"}, 'loss.equal_texts = "positives" counts it as right for all'),
        "positives": ({"kind": "sigmoid", "equal_texts": "positives"}, "each counts as right for all its images"),
    }
    found = {}
    for choice, (loss, remark) in choices.items():
        # Four categories are the alt-texts of sixteen images.
        recipe = recipe_of(batch_size=16, samples=16, data={"alt_key": "category"}, loss=loss)
        Trainer(recipe, shapes_folder, tmp_path / choice).run()
        (found[choice],) = map(json.loads, (tmp_path / choice / "metrics.jsonl").read_text().splitlines())
        said = " ".join(capsys.readouterr().out.split())
        assert "texts that occur more than once in a batch of 16: alt 16" in said
        assert remark in said
    assert [line["equal_texts_alt"] for line in found.values()] == [16, 16, 16]
    # An untrained sigmoid loss holds that all pairs are wrong: more right ones cost more.
    assert found["positives"]["contrastive_alt"] > 2 * found["negatives"]["contrastive_alt"]


def test_sources_that_hold_the_same_shard_are_refused(shapes_folder):
    sources = [{"folder": "train"}, {"folder": "validation"}]
    recipe = recipe_of(data={"train": sources})
    data = open_training_data(recipe.data, shapes_folder, reads_synthetic=True)
    with pytest.raises(OpenVisionError, match=r"sources train and validation hold the same shard \(000000.tar\)"):
        check_batches(recipe, data)


def test_a_fine_tune_of_many_passes_says_so(shapes_folder):
    for start, samples, told in (("weights", 16 * 930, True), ("weights", 16 * 9, False), (None, 16 * 930, False)):
        begun: dict[str, Any] = {"start": start} if start else {}
        recipe = recipe_of(samples=samples, **begun)
        lines = describe_passes(recipe, open_training_data(recipe.data, shapes_folder, reads_synthetic=True))
        assert bool(lines) == told
        if told:
            assert lines[0].startswith("this fine-tune makes 930 passes over the 16 images of train")
