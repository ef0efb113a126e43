"""Evaluators in a recipe: kept as written when it is parsed, checked and completed before training begins."""

import tomllib

import pytest
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.recipe.schema import dump_recipe, load_recipe, parse_recipe
from openvision.recipe.smoke import smoke_recipe
from openvision.recipe.view import show_recipe
from openvision.training.run.folder import claim_recipe
from openvision.training.setup.evaluators import build_evaluators, complete_evaluators
from openvision.training.trainer import Trainer

KNN = {"kind": "knn", "data": "validation", "train": "train", "k": 3}
NAMES = {"kind": "zero_shot", "name": "names", "data": "validation", "prompts": "plain", "every": 3}


@pytest.fixture
def content(tiny_recipe) -> dict:
    return {**tomllib.loads(dump_recipe(tiny_recipe)), "evaluate": [KNN, NAMES]}


def test_a_recipe_with_evaluators_survives_a_round_trip(content, tiny_recipe):
    recipe = parse_recipe(content, "r")
    assert recipe.evaluate is not None
    assert [(one.title, one.every) for one in recipe.evaluate] == [("knn", None), ("names", 3)]
    assert "evaluate" not in tomllib.loads(dump_recipe(tiny_recipe))
    complete = complete_evaluators(recipe, "r")
    for each in (recipe, complete, smoke_recipe(recipe)):
        assert parse_recipe(tomllib.loads(dump_recipe(each)), "again") == each


def test_defaults_are_filled_in(content, tiny_recipe, shapes_folder):
    recipe = parse_recipe(content, "r")
    complete = complete_evaluators(recipe, "r")
    first = tomllib.loads(dump_recipe(complete))["evaluate"][0]
    assert {"split": "test", "image": "image", **KNN}.items() <= first.items()
    assert "split" not in tomllib.loads(dump_recipe(recipe))["evaluate"][0]
    assert complete_evaluators(tiny_recipe, "r") is tiny_recipe
    assert [one.title for one in build_evaluators(recipe, shapes_folder)] == ["knn", "names"]
    assert build_evaluators(tiny_recipe, shapes_folder) == []


def test_a_run_begun_with_completed_evaluators_is_resumed_by_the_typed_recipe(content, tmp_path):
    recipe = parse_recipe(content, "r")
    claim_recipe(complete_evaluators(recipe, "r"), tmp_path)
    assert claim_recipe(recipe, tmp_path) == []
    other = parse_recipe({**content, "evaluate": [{**KNN, "k": 4}, NAMES]}, "r")
    with pytest.raises(OpenVisionError, match=r"-k = 3\n  \+k = 4"):
        claim_recipe(other, tmp_path)


def test_a_wrong_option_is_refused_before_training(content, shapes_folder, tmp_path):
    path = tmp_path / "wrong.toml"
    wrong = parse_recipe({**content, "evaluate": [NAMES, {**KNN, "kay": 3}]}, "r")
    path.write_text(dump_recipe(wrong))
    message = r"evaluate\.1: unknown key kay"
    with pytest.raises(OpenVisionError, match=message):
        Trainer(wrong, shapes_folder, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.toml").exists()
    checked = CliRunner().invoke(app, ["recipe", "validate", str(path)])
    assert f"recipe {path}, evaluate.1: unknown key kay" in checked.output
    shown = CliRunner().invoke(app, ["recipe", "show", str(path)])
    assert "unknown key kay" in str(shown.exception)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([{**KNN, "kind": "kn"}], r"recipe tiny, evaluate\.0: unknown kind of evaluator 'kn'; did you mean 'knn'"),
        ([{"kind": "knn", "train": "train"}], r"evaluate\.0: key data is missing"),
        ([{**KNN, "name": "a/b"}], r"the name 'a/b' must not hold a '/'"),
        ([{**KNN, "data": "nowhere"}], r"evaluator 'knn': .*nowhere is missing"),
    ],
)
def test_one_clear_sentence_when_evaluators_are_built(tables, message, content, shapes_folder):
    with pytest.raises(OpenVisionError, match=message):
        build_evaluators(parse_recipe({**content, "evaluate": tables}, "r"), shapes_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": [NAMES, NAMES]}, "two evaluators named 'names'"),
        ({"evaluate": [{"data": "x"}]}, r"key evaluate\.0\.kind is missing"),
        ({"evaluate": [{**KNN, "every": 0}]}, r"evaluate\.0\.every: it is 0, and must be at least 1"),
        ({"run": {"checkpoint_best": "nmes/top1"}}, "no evaluator is named 'nmes'"),
    ],
)
def test_one_clear_sentence_when_the_recipe_is_parsed(changes, message, content):
    with pytest.raises(OpenVisionError, match=message):
        parse_recipe({**content, **changes}, "r")


def test_what_is_shown_has_the_defaults_and_is_the_recipe_again(content, tmp_path):
    path, copy = tmp_path / "r.toml", tmp_path / "copy.toml"
    path.write_text(dump_recipe(parse_recipe(content, "r")))
    copy.write_text(show_recipe(path, load=lambda file, _: complete_evaluators(load_recipe(file), "r")))
    assert load_recipe(copy) == complete_evaluators(load_recipe(path), "r")
