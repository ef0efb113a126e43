"""Renamed names: an error in a typed recipe, translated in stored files."""

import json
import tomllib

import pytest

from openvision.errors import OpenVisionError
from openvision.recipe.schema import Recipe, dump_recipe, load_recipe
from openvision.renamed import RENAMED_KEYS, RENAMED_METRICS, new_key, read_metrics, translate_recipe
from openvision.training.run.folder import claim_recipe
from openvision.training.run.log import MetricsLog


def old_text(recipe: Recipe) -> str:
    """The recipe as it was written before the keys were renamed."""
    text = dump_recipe(recipe)
    for old, new in RENAMED_KEYS.items():
        text = text.replace(f"\n{new} =", f"\n{old.rpartition('.')[2]} =")
    assert "accumulate = 1" in text
    return text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("stages.0.accumulate", "micro_batches"),
        ("augment.crop_law", "crop_sampling"),
        ("parallel.step_seconds", "step_timeout_seconds"),
    ],
)
def test_a_typed_recipe_must_use_the_new_name(old, new, tiny_recipe, tmp_path):
    assert new_key(old) == new
    path = tmp_path / "mine.toml"
    path.write_text(dump_recipe(tiny_recipe))
    with pytest.raises(OpenVisionError, match=f"mine.toml: unknown key {old}: it was renamed, write {new}"):
        load_recipe(path, [f"{old}=1"])
    path.write_text(old_text(tiny_recipe))
    with pytest.raises(OpenVisionError, match=f"unknown key {old}: it was renamed, write {new}"):
        load_recipe(path)


def test_every_new_name_is_a_key(tiny_recipe):
    recipe = tomllib.loads(old_text(tiny_recipe))
    translate_recipe(recipe)
    assert Recipe.model_validate(recipe) == tiny_recipe
    translate_recipe(recipe)
    assert Recipe.model_validate(recipe) == tiny_recipe


@pytest.mark.parametrize("beside", ["sessions.json", "data.json", "model.safetensors"])
def test_the_recipe_of_a_run_or_model_is_translated(beside, tiny_recipe, tmp_path):
    stored = tmp_path / "recipe.toml"
    stored.write_text(old_text(tiny_recipe))
    with pytest.raises(OpenVisionError, match="it was renamed"):
        load_recipe(stored)
    assert load_recipe(stored, stored=True) == tiny_recipe
    (tmp_path / beside).touch()
    assert load_recipe(stored) == tiny_recipe
    with pytest.raises(OpenVisionError, match="it was renamed"):
        load_recipe(stored, ["stages.0.accumulate=2"])


def test_a_run_with_old_names_is_resumed(tiny_recipe, tmp_path):
    (tmp_path / "recipe.toml").write_text(old_text(tiny_recipe))
    assert claim_recipe(tiny_recipe, tmp_path) == []
    assert (tmp_path / "recipe.toml").read_text() == dump_recipe(tiny_recipe)


def test_metrics_are_translated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    old, new = {"step": 1, "temperature": 14.0, "pictures": 9}, {"step": 1, "logit_scale": 14.0, "images": 9}
    assert RENAMED_METRICS["temperature"] == "logit_scale"
    path.write_text(json.dumps(old) + "\n" + json.dumps({**old, "step": 2}) + "\n")
    assert read_metrics(path)[0] == new
    MetricsLog(path, resume_step=1).close()
    assert json.loads(path.read_text()) == new
